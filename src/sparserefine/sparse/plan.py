"""Plan: the neighbour tables of one set of sites over all levels of a U-Net, built once and passed explicitly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparserefine.sparse.sites import PaddedSites, Sites

DownKind = Literal["paper", "cell"]
"""``paper``: 3x3, stride 2, no padding. ``cell``: 2x2, stride 2, every site has exactly one parent."""


@dataclass(frozen=True)
class PlanSpec:
    """What a network requires of a plan: the number of levels and the kind of down-sampling between them."""

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
class Stencil(ABC):
    """Which input rows each output row of a convolution reads: ``y[n] = sum_t x[table[n, t]] @ W[t]``.

    Each engine has its own subclass, which computes this and may hold further tables.

    Attributes:
        table: ``int32 [N_out, T]``, rows of the input, ``N_in`` where there is none (read as zero).
        reverse: ``int32 [N_in, T]``, the transposed relation: rows of the output, ``N_out`` where there is none.
        mirrored: whether ``reverse`` lists the taps in opposite order. True for the submanifold stencil: its transpose
            is the stencil itself with the taps reversed.
        single: ``int32 [N_out]``, ``T i + t``: set only if every output reads exactly one input i, through tap t;
            otherwise ``None``.
        reverse_single: the same for the transposed relation.
    """

    table: Tensor
    reverse: Tensor
    mirrored: bool
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

    @abstractmethod
    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """The primitive, differentiable in both arguments. Does not check them; :func:`layers.conv` does.

        Args:
            x: ``[N_in, C_in]``, floating point.
            weight: ``[T, C_in, C_out]``, of the same dtype.

        Returns:
            ``[N_out, C_out]``.
        """

    @abstractmethod
    def transposed(self) -> Stencil:
        """The stencil of the transposed convolution."""


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
    """All levels of one site set.

    Attributes:
        levels: full size first.
        spec: what the plan was made for.
        engine: name of the engine that made it, for messages.
    """

    levels: tuple[Level, ...]
    spec: PlanSpec
    engine: str

    @property
    def sites(self) -> Sites:
        """The sites of the first level."""
        return self.levels[0].sites

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of sites at each level."""
        return tuple(len(level.sites) for level in self.levels)


@dataclass(frozen=True)
class PaddedLevel:
    """A :class:`Level` with room for a fixed number of cells."""

    sites: PaddedSites
    around: Stencil
    down: Stencil | None


@dataclass(frozen=True)
class PaddedPlan:
    """A plan with a fixed number of rows at each level, independent of the image, as CUDA graphs require.

    Only packed networks can use it, because they stop at the rows in use; table entries past those rows are undefined.
    Sites past the capacity of a level are left out: their neighbours see them as missing.

    Attributes:
        levels: full size first.
        spec: what it was built for.
        engine: name of the engine that built it.
        totals: ``int32 [levels]`` on the device: number of sites found, which may exceed the number of rows.
    """

    levels: tuple[PaddedLevel, ...]
    spec: PlanSpec
    engine: str
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
    """Width of the convolution kernel between two levels [cells]."""
    return 3 if down == "paper" else 2


def coarser_size(size: int, down: DownKind) -> int:
    """Height or width of the next level."""
    return max(0, (size - 3) // 2 + 1) if down == "paper" else (size + 1) // 2
