"""Plans of the CPU engine: one bit per cell and running counts instead of index images.

Tables are made when they are first read.
"""

from __future__ import annotations

from ctypes import byref
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparserefine.engines.cpu.convolution import Relation, cpu_conv
from sparserefine.engines.cpu.kernels import Kernels, Tiles
from sparserefine.engines.cpu.native.structures import Grid
from sparserefine.engines.reference.convolution import convolve
from sparserefine.sparse.plan import DownKind, Level, Plan, PlanSpec, Stencil, coarser_size, kernel_size
from sparserefine.sparse.sites import Sites


class Cells:
    """The active cells of one level, and the tables that depend only on them.

    Attributes:
        sites: the cells.
    """

    def __init__(self, kernels: Kernels, batch: int, height: int, width: int) -> None:
        self.kernels = kernels
        words = kernels.grid_words(batch, height, width)
        self._bits = torch.zeros(words, dtype=torch.int64)
        self._rank = torch.empty(words, dtype=torch.int32)
        self.grid = Grid(self._bits.data_ptr(), self._rank.data_ptr(), batch, height, width)
        self.sites: Sites

    @classmethod
    def of_sites(cls, kernels: Kernels, sites: Sites) -> Cells:
        """The finest level.

        Raises:
            ValueError: sites are out of the image, repeated or not sorted.
        """
        cells = cls(kernels, sites.batch_size, sites.height, sites.width)
        coords = sites.coords.contiguous()
        if coords.dtype != torch.int32 or coords.dim() != 2 or coords.shape[1] != 3:
            raise ValueError(f"coords are {coords.dtype} {tuple(coords.shape)}, expected int32 [N, 3]")
        if kernels.grid_from_sites(byref(cells.grid), coords.data_ptr(), len(coords)):
            raise ValueError(
                f"sites of {sites.batch_size} images of {sites.height} x {sites.width}: some lie outside, are repeated "
                "or not sorted; expected (batch, row, column) in ascending order, as Sites.from_mask gives them"
            )
        cells.sites = sites
        return cells

    def coarser(self, down: DownKind) -> Cells:
        """The next coarser level."""
        size = (coarser_size(side, down) for side in (self.sites.height, self.sites.width))
        cells = Cells(self.kernels, self.sites.batch_size, *size)
        n = self.kernels.grid_coarser(byref(self.grid), byref(cells.grid), kernel_size(down), torch.get_num_threads())
        coords = torch.empty(n, 3, dtype=torch.int32)
        self.kernels.grid_sites(byref(cells.grid), coords.data_ptr(), torch.get_num_threads())
        cells.sites = Sites(coords, cells.grid.batch, cells.grid.height, cells.grid.width)
        return cells

    @cached_property
    def around(self) -> Tensor:
        """Submanifold 3x3 table, ``int32 [N, 9]``."""
        table = torch.empty(len(self.sites), 9, dtype=torch.int32)
        self.kernels.grid_around(byref(self.grid), len(self.sites), table.data_ptr(), torch.get_num_threads())
        return table

    @cached_property
    def tiles(self) -> Tiles:
        """Tiles of 4x4 cells, each with the ring of cells around it."""
        return self._tiles(with_quarters=False)

    @cached_property
    def quarters(self) -> Tiles:
        """The same tiles, with the list of their non-empty quarters."""
        return self._tiles(with_quarters=True)

    def _tiles(self, *, with_quarters: bool) -> Tiles:
        grid, threads = byref(self.grid), torch.get_num_threads()
        counts = torch.empty(self.grid.batch * -(-self.grid.height // 4), 2, dtype=torch.int64)
        totals = torch.empty(2, dtype=torch.int64)
        n = len(self.sites)
        self.kernels.grid_tiles(grid, n, counts.data_ptr(), totals.data_ptr(), None, None, threads)
        tiles, quarters = totals.tolist()
        # At least one row, because a null pointer would ask for the counts.
        table = torch.empty(max(1, tiles), 36, dtype=torch.int32)
        listed = torch.empty(quarters, dtype=torch.int32) if with_quarters else None
        self.kernels.grid_tiles(
            grid, n, counts.data_ptr(), None, table.data_ptr(), None if listed is None else listed.data_ptr(), threads
        )
        return Tiles(table[:tiles], listed)


class Between:
    """Two adjacent levels, with the tables of the convolution down and of the transposed convolution up."""

    def __init__(self, fine: Cells, coarse: Cells, down: DownKind) -> None:
        self.fine, self.coarse, self.size = fine, coarse, kernel_size(down)

    @cached_property
    def children(self) -> Tensor:
        """``int32 [N_coarse, T]``: the rows in the finer level that each coarse cell reads."""
        table = torch.empty(len(self.coarse.sites), self.size**2, dtype=torch.int32)
        self.fine.kernels.grid_children(
            byref(self.fine.grid), byref(self.coarse.grid), self.size, len(self.fine.sites), table.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return table

    @cached_property
    def parents(self) -> Tensor:
        """``int32 [N_fine, T]``: the rows in the coarser level. This engine's own kernels do not need it."""
        n_coarse = len(self.coarse.sites)
        table = torch.full((len(self.fine.sites), self.size**2), n_coarse, dtype=torch.int32)
        self.fine.kernels.grid_parents(
            byref(self.fine.grid),
            byref(self.coarse.grid),
            self.size,
            n_coarse,
            table.data_ptr(),
            torch.get_num_threads(),
        )
        return table

    @cached_property
    def parities(self) -> tuple[Tensor, list[int], Tensor]:
        """The transposed convolution by parity of the sites' row and column.

        Returns:
            Sites ``int32 [N_fine]``, grouped by parity; the size of each group; and a flat ``int32`` table of their
            parents, ``[count, taps]`` per group after the other. For the taps see
            :func:`sparserefine.engines.cpu.convolution.parity_taps`.
        """
        n = len(self.fine.sites)
        counts, rows = torch.empty(4, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
        offsets = torch.empty(self.fine.grid.batch * self.fine.grid.height, 2, dtype=torch.int64)
        # At most 4 taps per site (3x3), or exactly one (2x2).
        table = torch.empty(n * (4 if self.size == 3 else 1), dtype=torch.int32)
        self.fine.kernels.grid_parities(
            byref(self.fine.grid), byref(self.coarse.grid), self.size, len(self.coarse.sites), offsets.data_ptr(),
            counts.data_ptr(), rows.data_ptr(), table.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return rows, counts.tolist(), table


class Around(Stencil):
    """The submanifold stencil of a level. Its tables are made when first read."""

    def __init__(self, cells: Cells) -> None:
        self.__dict__.update(cells=cells, mirrored=True)

    cells: Cells

    @property
    def table(self) -> Tensor:
        """``int32 [N, 9]``."""
        return self.cells.around

    reverse = table

    @property
    def num_inputs(self) -> int:
        """N."""
        return len(self.cells.sites)

    num_outputs = num_inputs

    @property
    def taps(self) -> int:
        """9."""
        return 9

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`Stencil.conv`. Compiled for float32 and bfloat16 on the CPU; for others, as engine ``torch``."""
        return _conv(x, weight, self)

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """Arguments of :func:`sparserefine.engines.cpu.convolution.cpu_conv`."""
        relation = _whole_table(self.table)
        return (x, weight, *relation, *relation, True, self.cells.kernels.library.name)

    def transposed(self) -> Around:
        """The stencil itself: its transpose differs only in the order of the taps."""
        return self


class Across(Stencil):
    """The stencil between two levels, down or up. Its tables are made when first read."""

    def __init__(self, between: Between, *, up: bool) -> None:
        self.__dict__.update(between=between, mirrored=False, up=up)

    between: Between
    up: bool

    @property
    def table(self) -> Tensor:
        """``int32 [N_out, T]``."""
        return self.between.parents if self.up else self.between.children

    @property
    def reverse(self) -> Tensor:
        """``int32 [N_in, T]``."""
        return self.between.children if self.up else self.between.parents

    @property
    def single(self) -> Tensor | None:
        """See :class:`Stencil`. Set for up-sampling by ``cell``."""
        return self._single() if self.up else None

    @property
    def reverse_single(self) -> Tensor | None:
        """See :class:`Stencil`. Set for down-sampling by ``cell``."""
        return None if self.up else self._single()

    def _single(self) -> Tensor | None:
        if self.between.size != 2:
            return None
        parent, tap = self.between.parents.min(1)  # missing entries hold the largest number
        return (parent * 4 + tap).to(torch.int32)

    @property
    def num_inputs(self) -> int:
        """N_in."""
        return len((self.between.coarse if self.up else self.between.fine).sites)

    @property
    def num_outputs(self) -> int:
        """N_out."""
        return len((self.between.fine if self.up else self.between.coarse).sites)

    @property
    def taps(self) -> int:
        """9 or 4."""
        return self.between.size**2

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :meth:`Stencil.conv`. Compiled for float32 and bfloat16 on the CPU; for others, as engine ``torch``."""
        return _conv(x, weight, self)

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """Arguments of :func:`sparserefine.engines.cpu.convolution.cpu_conv`."""
        rows, counts, parents = self.between.parities
        up, down = (parents, rows, counts), _whole_table(self.between.children)
        forward, transposed = (up, down) if self.up else (down, up)
        return (x, weight, *forward, *transposed, False, self.between.fine.kernels.library.name)

    def transposed(self) -> Across:
        """The stencil of the other direction."""
        return Across(self.between, up=not self.up)


def _conv(x: Tensor, weight: Tensor, stencil: Around | Across) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        return convolve(x, weight, stencil)
    y: Tensor = cpu_conv(*stencil.operands(x, weight))
    return y


def _whole_table(table: Tensor) -> Relation:
    return table, table.new_empty(0), []


def build_grid_plan(sites: Sites, spec: PlanSpec, engine: str, kernels: Kernels) -> Plan:
    """Builds the plan of sites on the CPU.

    Its tables equal those of :func:`sparserefine.engines.reference.geometry.build_plan`.

    Args:
        sites: sites of the finest level.
        spec: number of levels and kind of down-sampling.
        engine: name of the engine, stored in the plan.
        kernels: the compiled kernels.
    """
    cells = Cells.of_sites(kernels, sites)
    levels = []
    for depth in range(spec.levels):
        down = None
        finer = cells
        if depth < spec.levels - 1:
            cells = finer.coarser(spec.down)
            down = Across(Between(finer, cells, spec.down), up=False)
        levels.append(Level(finer.sites, Around(finer), down))
    return Plan(tuple(levels), spec, engine)
