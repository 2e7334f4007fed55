"""Plan: the neighbour tables of one set of sites over all levels of a U-Net, built once and passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from sparserefine.sparse.sites import PaddedSites, Sites

if TYPE_CHECKING:
    from sparserefine.sparse.interface import Engine


DownKind = Literal["paper", "cell"]
"""``paper``: 3x3, stride 2, no padding. ``cell``: 2x2, stride 2, every site has exactly one parent."""


@dataclass(frozen=True)
class PlanSpec:
    """What a network needs of its geometry: the number of levels and the kind of down-sampling between them."""

    levels: int
    down: DownKind

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels = {self.levels}, expected at least 1")
        if self.down not in ("paper", "cell"):
            raise ValueError(f"down = {self.down!r}, expected 'paper' or 'cell'")

    @property
    def taps(self) -> int:
        """Taps of the convolution between two levels: 9 or 4."""
        return 9 if self.down == "paper" else 4


@dataclass(frozen=True)
class Stencil:
    """Which input rows each output row of a convolution reads: ``y[n] = sum_t x[table[n, t]] @ W[t]``.

    Attributes:
        table: ``int32 [N_out, T]``, rows of the input, ``N_in`` where there is none (read as zero).
        reverse: ``int32 [N_in, T]``, the transposed relation: rows of the output, ``N_out`` where there is none.
        mirrored: ``reverse`` lists the taps in opposite order; true for the submanifold stencil, which is its own
            transpose but for that.
        engine: what executes convolutions with this stencil.
        single: ``int32 [N_out]``: ``T i + t`` where each output reads just one input i, by tap t; ``None`` elsewhere.
        reverse_single: the same of the transposed relation.
    """

    table: Tensor
    reverse: Tensor
    mirrored: bool
    engine: Engine
    single: Tensor | None = None
    reverse_single: Tensor | None = None

    @property
    def num_inputs(self) -> int:
        """N_in."""
        return self.reverse.shape[0]

    @property
    def num_outputs(self) -> int:
        """N_out."""
        return self.table.shape[0]

    @property
    def taps(self) -> int:
        """T."""
        return self.table.shape[1]

    def transposed(self) -> Stencil:
        """The stencil of the transposed convolution."""
        return Stencil(self.reverse, self.table, self.mirrored, self.engine, self.reverse_single, self.single)


@dataclass(frozen=True)
class Level:
    """One level of the U-Net.

    Attributes:
        sites: the level's active cells.
        around: the submanifold 3x3 stencil.
        down: from this level to the next coarser one; ``None`` on the last. Up-sampling is ``down.transposed()``.
    """

    sites: Sites
    around: Stencil
    down: Stencil | None


@dataclass(frozen=True)
class Plan:
    """All levels of one site set, full size first."""

    levels: tuple[Level, ...]
    spec: PlanSpec

    @property
    def sites(self) -> Sites:
        """Those of the first level."""
        return self.levels[0].sites

    @property
    def rows(self) -> tuple[int, ...]:
        """Sites of each level."""
        return tuple(len(level.sites) for level in self.levels)


@dataclass(frozen=True)
class PaddedLevel:
    """As :class:`Level`, with room for a fixed number of cells."""

    sites: PaddedSites
    around: Stencil
    down: Stencil | None


@dataclass(frozen=True)
class PaddedPlan:
    """A plan with room for a fixed number of rows at each level, whatever the image: for CUDA graphs.

    It is for packed networks, which stop at the rows in use. Entries of tables past them are undefined. Sites past a
    capacity are left out, and read as missing by their neighbours.

    Attributes:
        levels: full size first.
        spec: what it was built for.
        totals: ``int32 [levels]`` on the device: the sites there are, which may be more than the rows.
    """

    levels: tuple[PaddedLevel, ...]
    spec: PlanSpec
    totals: Tensor

    @property
    def sites(self) -> Sites:
        """Rows of the first level, padding included."""
        return self.levels[0].sites.rows

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each level, padding included."""
        return tuple(len(level.sites.rows) for level in self.levels)


def kernel_size(down: DownKind) -> int:
    """Width of the convolution between two levels."""
    return 3 if down == "paper" else 2


def coarser_size(size: int, down: DownKind) -> int:
    """Height or width of the next level."""
    return max(0, (size - 3) // 2 + 1) if down == "paper" else (size + 1) // 2
