"""Builds plans on the GPU, from a mask of the sites to the tables of all levels.

The host waits once for the GPU, for padded plans never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparserefine.engines.reference.convolution import convolve
from sparserefine.engines.triton.convolution import DTYPES, Order, triton_conv
from sparserefine.engines.triton.kernels import geometry as kernels
from sparserefine.engines.triton.launch import blocks, launch, runs_on
from sparserefine.sparse.plan import (
    DownKind,
    Level,
    PaddedLevel,
    PaddedPlan,
    Plan,
    PlanSpec,
    Stencil,
    coarser_size,
    kernel_size,
)
from sparserefine.sparse.sites import PaddedSites, Sites

NAME = "triton"
"""Name of the engine and of its plans."""

_BLOCK = 1024  # most cells per program; even, so that every block starts in an even column
_CHUNK = 2048  # blocks summed at once
_ROWS = 256  # rows per program that fills tables
_LARGEST = 2**31 - 1
_ALIGNED = 16  # bytes and entries; less aligned pointers would compile other kernels


@dataclass(frozen=True)
class GpuStencil(Stencil):
    """A stencil for the GPU kernels. Its tables are stored tap by tap, with strides ``(1, at least N)``.

    Attributes:
        order: the outputs grouped by parity, set for up-sampling, where each output uses few taps.
        reverse_order: the inputs grouped by parity, for the transposed relation.
        count: ``int32 [1]`` on the device: number of outputs in use, the rest is padding; ``None``: all.
        reverse_count: the same for the inputs.
    """

    order: Order | None = None
    reverse_order: Order | None = None
    count: Tensor | None = None
    reverse_count: Tensor | None = None

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`Stencil.conv`. Uses the kernels if they support dtype and device, otherwise the torch engine.

        Raises:
            ValueError: the stencil belongs to a padded plan.
        """
        if self.count is not None:
            raise ValueError("a padded plan is for packed networks only; for single layers, build one with engine.plan")
        if x.dtype not in DTYPES or not runs_on(x.device):
            return convolve(x, weight, self)
        y: Tensor = triton_conv(*self.operands(x, weight))
        return y

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """Arguments of :func:`sparserefine.engines.triton.convolution.triton_conv`."""
        forward = (self.table, *_tensors(self.order, self.table))
        transposed = (self.reverse, *_tensors(self.reverse_order, self.table))
        return (x, weight, *forward, *transposed, self.mirrored)

    def transposed(self) -> GpuStencil:
        """The stencil of the transposed convolution."""
        return GpuStencil(
            self.reverse,
            self.table,
            self.mirrored,
            self.reverse_single,
            self.single,
            self.reverse_order,
            self.order,
            self.reverse_count,
            self.count,
        )


def _tensors(order: Order | None, like: Tensor) -> tuple[Tensor, Tensor]:
    return (order.rows, order.counts) if order else (like.new_empty(0), like.new_empty(0))


def build_plan(mask: Tensor, spec: PlanSpec) -> Plan:
    """The plan that :mod:`sparserefine.engines.reference` defines. The host waits once, for the number of sites.

    Args:
        mask: ``bool [B, H, W]``, true at the sites.
        spec: levels and kind of down-sampling.

    Returns:
        A plan of :class:`GpuStencil`, which have orders instead of ``single``.

    Raises:
        ValueError: the mask has another shape or dtype, or more cells than int32 can number.
    """
    cells = _count(mask, spec, None)
    return Plan(_levels(cells, spec, cells.totals.tolist(), padded=False), spec, NAME)


def build_padded_plan(mask: Tensor, spec: PlanSpec, capacities: Sequence[int]) -> PaddedPlan:
    """:func:`build_plan` with a fixed number of rows. The host does not wait, so a CUDA graph can capture it.

    Args:
        mask: ``bool [B, H, W]``, true at the sites.
        spec: levels and kind of down-sampling.
        capacities: rows of each level.

    Raises:
        ValueError: as for :func:`build_plan`, or there is not one valid capacity per level.
    """
    if len(capacities) != spec.levels or not all(0 <= rows <= _LARGEST for rows in capacities):
        raise ValueError(f"capacities = {tuple(capacities)}, expected {spec.levels} numbers from 0 to {_LARGEST}")
    cells = _count(mask, spec, capacities)
    levels = tuple(
        PaddedLevel(PaddedSites(level.sites, kept[:1]), level.around, level.down)
        for level, kept in zip(_levels(cells, spec, capacities, padded=True), cells.kept, strict=True)
    )
    return PaddedPlan(levels, spec, NAME, cells.totals)


@dataclass(frozen=True)
class _Cells:
    """The cells of all levels, and how many of them are active.

    Attributes:
        active: ``uint8 [B, h, w]`` of each level, 0 or 1.
        block: consecutive cells of a row that one program handles.
        before: ``int64 [levels, 2, blocks]``: active cells before each block, see the kernels.
        totals: ``int32 [levels]``: active cells.
        kept: ``int32 [levels, 4]``: column 0 holds the active cells that fit the capacity.
        parities: ``int32 [levels, 4]``: the kept cells by parity of row and column.
    """

    active: list[Tensor]
    block: int
    before: Tensor
    totals: Tensor
    kept: Tensor
    parities: Tensor

    @property
    def device(self) -> torch.device:
        return self.totals.device

    @property
    def warps(self) -> int:
        """Warps per program: 4 cells per thread, more do not fit the registers."""
        return max(1, self.block // 128)

    def segments(self, level: int) -> int:
        """Blocks per row. At least one, which also writes the border of images without columns."""
        return max(1, blocks(self.active[level].shape[2], self.block))


def _count(mask: Tensor, spec: PlanSpec, capacities: Sequence[int] | None) -> _Cells:
    cells, storage, offsets = _allocate(mask, spec.levels, spec.down)
    device, stride = cells.device, cells.before.shape[2]
    counts = torch.empty_like(cells.before)
    shapes = torch.empty(spec.levels, 6, dtype=torch.int32, device=device)
    for level, active in enumerate(cells.active):
        finer = cells.active[max(0, level - 1)]
        count = max(1, active.shape[0] * active.shape[1] * cells.segments(level))
        size = active.shape[1:] if len(active) else (0, 0)  # with no images, the one program must read nothing
        launch(
            kernels.activity,
            (count,),
            device,
            *(finer, active, counts, shapes, *finer.shape[1:], *size, cells.segments(level), count),
            *(capacities[level] if capacities else _LARGEST, offsets[level], level, stride),
            warps=cells.warps,
            WINDOW=kernel_size(spec.down) if level else 1,
            BLOCK=cells.block,
        )
    launch(
        kernels.scan,
        (spec.levels,),
        device,
        *(cells.active[0], storage, shapes, counts, cells.before, cells.totals, cells.kept, cells.parities, stride),
        warps=8,
        CAPPED=capacities is not None,
        BLOCK=cells.block,
        CHUNK=_CHUNK,
    )
    return cells


def _allocate(mask: Tensor, levels: int, down: DownKind) -> tuple[_Cells, Tensor, list[int]]:
    """Unfilled cells of all levels but level 0, the storage of those levels, and the offset of each level in it."""
    if mask.dim() != 3 or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool [B, H, W]")
    batch, height, width = mask.shape
    places = batch * (height + 2) * (width + 2)
    if places > _LARGEST:
        raise ValueError(
            f"{batch} images of {height} x {width} pixels have {places} cells with their borders, "
            f"more than {_LARGEST}; use smaller batches or smaller images"
        )
    sizes = [(height, width)]
    for _ in range(levels - 1):
        sizes.append((coarser_size(sizes[-1][0], down), coarser_size(sizes[-1][1], down)))
    offsets = [0, 0]
    for h, w in sizes[1:]:
        offsets.append(offsets[-1] + _aligned(batch * h * w))
    device = mask.device
    storage = torch.empty(offsets[levels], dtype=torch.uint8, device=device)
    active = [mask.contiguous().view(torch.uint8)]
    for offset, (h, w) in zip(offsets[1:], sizes[1:], strict=False):
        active.append(storage[offset : offset + batch * h * w].view(batch, h, w))
    # Narrow images get narrower blocks. The minimum of 32 cells is one per lane of a warp.
    block = min(_BLOCK, max(32, 1 << (width - 1).bit_length()))
    stride = _aligned(batch * height * max(1, blocks(width, block)))
    cells = _Cells(
        active,
        block,
        torch.empty(levels, 2, stride, dtype=torch.int64, device=device),
        torch.empty(levels, dtype=torch.int32, device=device),
        torch.empty(levels, 4, dtype=torch.int32, device=device),
        torch.empty(levels, 4, dtype=torch.int32, device=device),
    )
    return cells, storage, offsets


def _aligned(count: int) -> int:
    return max(1, blocks(count, _ALIGNED)) * _ALIGNED


def _levels(cells: _Cells, spec: PlanSpec, capacities: Sequence[int], *, padded: bool) -> tuple[Level, ...]:
    """The levels, with ``capacities[level]`` rows each; the first ``cells.kept`` of them are in use."""
    numbered = [_number(cells, level, rows, level < spec.levels - 1, padded) for level, rows in enumerate(capacities)]
    found = [_tables(cells, level, numbered, spec.down) for level in range(spec.levels)]
    counts = [cells.kept[level, :1] if padded else None for level in range(spec.levels)]
    levels = []
    for level, (number, made) in enumerate(zip(numbered, found, strict=True)):
        count = counts[level]
        batch, height, width = cells.active[level].shape
        sites = Sites(number.coords, batch, height, width)
        around = GpuStencil(made.around, made.around, True, count=count, reverse_count=count)
        down = None
        if made.parents is not None:
            children = found[level + 1].children
            assert children is not None
            down = GpuStencil(
                *(children, made.parents, False),
                reverse_order=number.order,
                count=counts[level + 1],
                reverse_count=count,
            )
        levels.append(Level(sites, around, down))
    return tuple(levels)


@dataclass(frozen=True)
class _Numbered:
    """A level's index image ``int32 [B, h + 2, w + 2]``, coordinates ``int32 [N, 3]``, and order (not if last)."""

    index: Tensor
    coords: Tensor
    order: Order | None


def _number(cells: _Cells, level: int, rows: int, ordered: bool, padded: bool) -> _Numbered:
    active, device = cells.active[level], cells.device
    batch, height, width = active.shape
    index = torch.empty(batch, height + 2, width + 2, dtype=torch.int32, device=device)
    coords = (torch.zeros if padded else torch.empty)(rows, 3, dtype=torch.int32, device=device)
    order = Order(torch.empty(rows, dtype=torch.int32, device=device), cells.parities[level]) if ordered else None
    segments = cells.segments(level)
    launch(
        kernels.rows,
        (batch * (height + 2) * segments,),
        device,
        *(active, cells.before, cells.parities, index, coords, order.rows if order else None),
        *(height, width, segments, rows, level, cells.before.shape[2]),
        warps=cells.warps,
        BLOCK=cells.block,
    )
    return _Numbered(index, coords, order)


@dataclass(frozen=True)
class _Tables:
    """The tables of one level, a row per cell: its 9 neighbours, its children and its parents."""

    around: Tensor
    children: Tensor | None
    parents: Tensor | None


def _tables(cells: _Cells, level: int, numbered: Sequence[_Numbered], down: DownKind) -> _Tables:
    own = numbered[level]
    finer = numbered[level - 1].index if level else None
    coarser = numbered[level + 1] if level + 1 < len(numbered) else None
    rows, taps = len(own.coords), kernel_size(down) ** 2
    found = _Tables(
        _table(rows, 9, cells.device),
        None if finer is None else _table(rows, taps, cells.device),
        None if coarser is None else _table(rows, taps, cells.device),
    )
    sizes = [size for at in (0, -1, 1) for size in cells.active[min(max(0, level + at), len(numbered) - 1)].shape[1:]]
    launch(
        kernels.tables,
        (blocks(rows, _ROWS),),
        cells.device,
        *(own.coords, cells.kept, own.index, found.around, finer, found.children),
        *(coarser.index if coarser else None, found.parents),
        *(level, *sizes, len(coarser.coords) if coarser else 0, found.around.stride(1)),
        KERNEL=kernel_size(down),
        BLOCK=_ROWS,
    )
    return found


def _table(rows: int, taps: int, device: torch.device) -> Tensor:
    """An uninitialised table ``int32 [rows, taps]``, stored tap by tap."""
    return torch.empty(taps, _aligned(rows), dtype=torch.int32, device=device)[:, :rows].t()
