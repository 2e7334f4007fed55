"""Builds plans with index images: the neighbour tables of one set of sites over all levels of a U-Net."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparserefine.engines.reference.convolution import convolve
from sparserefine.sparse.plan import DownKind, Level, Plan, PlanSpec, Stencil, coarser_size, kernel_size
from sparserefine.sparse.sites import Sites


class TableStencil(Stencil):
    """A stencil that holds its tables as tensors, on any device."""

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`Stencil.conv`."""
        return convolve(x, weight, self)

    def transposed(self) -> TableStencil:
        """The stencil of the transposed convolution."""
        return TableStencil(self.reverse, self.table, self.mirrored, self.reverse_single, self.single)


def build_plan(sites: Sites, spec: PlanSpec) -> Plan:
    """Builds the reference plan, on any device, with index images instead of hash maps.

    Sites lie on a grid, so a padded int32 image can hold the row of each active cell. Finding a neighbour costs one
    read.
    """
    levels: list[Level] = []
    index = _index_image(sites)
    for depth in range(spec.levels):
        table = _neighbour_table(sites, index)
        around = TableStencil(table, table, True)
        if depth == spec.levels - 1:
            levels.append(Level(sites, around, None))
            break
        coarser = _coarser_sites(sites, spec.down)
        coarser_index = _index_image(coarser)
        parents, single = _parents_table(sites, coarser, coarser_index, spec.down)
        children = _children_table(coarser, index, spec.down)
        down = TableStencil(children, parents, False, reverse_single=single)
        levels.append(Level(sites, around, down))
        sites, index = coarser, coarser_index
    return Plan(tuple(levels), spec, "torch")


_READ_ROWS = 1 << 18
_PAD = 1  # border of cells that mean "no site", as wide as any stencil here reaches


def _index_image(sites: Sites) -> Tensor:
    """``int32 [B, H+2, W+2]``: the row of the site at each pixel, N where there is no site."""
    image = torch.full(
        (sites.batch_size, sites.height + 2 * _PAD, sites.width + 2 * _PAD),
        len(sites),
        dtype=torch.int32,
        device=sites.coords.device,
    )
    rows = torch.arange(len(sites), dtype=torch.int32, device=image.device)
    image.view(-1)[_position(sites.coords.long(), image)] = rows
    return image


def _position(coords: Tensor, index: Tensor) -> Tensor:
    """Flat positions, in a padded index image, of unpadded coordinates ``int64 [N, 3]``."""
    _, h, w = index.shape
    batch, row, column = coords.unbind(1)
    return (batch * h + row + _PAD) * w + column + _PAD


def _read(index: Tensor, base: Tensor, offsets: list[int]) -> Tensor:
    """``int32 [N, T]``: the index image at ``base + offset`` for each offset."""
    table = torch.empty(len(base), len(offsets), dtype=torch.int32, device=index.device)
    shift = torch.tensor(offsets, device=base.device)
    # In chunks, because positions are int64: for 10 million sites they would take 720 MB, next to a table of 360 MB.
    for part, rows in zip(torch.split(base, _READ_ROWS), torch.split(table, _READ_ROWS), strict=True):
        torch.index_select(index.view(-1), 0, (part[:, None] + shift).view(-1), out=rows.view(-1))
    return table


def _neighbour_table(sites: Sites, index: Tensor) -> Tensor:
    w = index.shape[2]
    offsets = [dr * w + dc for dr in (-1, 0, 1) for dc in (-1, 0, 1)]
    return _read(index, _position(sites.coords.long(), index), offsets)


def _parents(sites: Sites, down: DownKind) -> Iterator[tuple[Tensor, Tensor]]:
    """Coarse cells ``o [N, 3]`` whose window contains the sites, ``2 o + tap`` = site, and those taps ``[N]``.

    A window of 3 is one cell wider than its stride, so an even row 2o also lies in the window of cell o - 1. An odd row
    lies in one window only, which is then yielded twice. Cells -1 and those past the last lie in the padding: there is
    no such cell.
    """
    coords = sites.coords.long()
    reaches = (0, 1) if down == "paper" else (0,)
    for row_reach in reaches:
        for column_reach in reaches:
            cells = coords - coords.new_tensor([0, row_reach, column_reach])
            cells[:, 1:] >>= 1
            _, row, column = (coords - 2 * cells).unbind(1)
            yield cells, row * kernel_size(down) + column


def _coarser_sites(sites: Sites, down: DownKind) -> Sites:
    """The cells of the next coarser level that have a site in their window."""
    h, w = coarser_size(sites.height, down), coarser_size(sites.width, down)
    active = torch.zeros(sites.batch_size, h + 2 * _PAD, w + 2 * _PAD, dtype=torch.bool, device=sites.coords.device)
    for cells, _ in _parents(sites, down):
        active.view(-1)[_position(cells, active)] = True
    return Sites.from_mask(active[:, _PAD:-_PAD, _PAD:-_PAD])


def _children_table(coarser: Sites, index: Tensor, down: DownKind) -> Tensor:
    """``int32 [N_coarse, T]``: the row of site ``2 o + tap`` for each coarse cell ``o``."""
    width, size = index.shape[2], kernel_size(down)
    coords = coarser.coords.long()
    coords[:, 1:] *= 2
    # With odd sizes, `cell` reads one row or column past the image. That is padding and means "no site".
    return _read(index, _position(coords, index), [r * width + c for r in range(size) for c in range(size)])


def _parents_table(sites: Sites, coarser: Sites, coarser_index: Tensor, down: DownKind) -> tuple[Tensor, Tensor | None]:
    """``int32 [N, T]``: per tap, the row of coarse cell ``o`` with ``2 o + tap`` = site. Also ``Stencil.single``."""
    taps = kernel_size(down) ** 2
    table = torch.full((len(sites), taps), len(coarser), dtype=torch.int32, device=sites.coords.device)
    single = None
    for cells, tap in _parents(sites, down):
        parent = coarser_index.view(-1).index_select(0, _position(cells, coarser_index))
        table.scatter_(1, tap[:, None], parent[:, None])
        if down == "cell":
            single = parent * taps + tap.to(torch.int32)
    return table, single
