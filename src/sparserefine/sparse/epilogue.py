"""What a fused convolution does with its sums before it stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """One output of an epilogue: ``relu(v * scale + shift)``.

    Attributes:
        out: ``[N, C]``, columns contiguous: float32, on a GPU half precision too, or uint8, rounded.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
    """

    out: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Epilogue:
    """What becomes of results v = sum + bias + residual, ``[N, C]``.

    Attributes:
        residual: ``[N, C]``.
        bias: ``float32 [C]``.
        raw: ``[N, C]``, gets v.
        activated: up to two, for those who read v normalised.
    """

    residual: Tensor | None = None
    bias: Tensor | None = None
    raw: Tensor | None = None
    activated: tuple[Activation, ...] = ()
