"""The epilogue of a fused convolution: what it does with its sums before it stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """One output of an epilogue: ``relu(v * scale + shift)``.

    Attributes:
        out: ``[N, C]``, columns contiguous: float32, uint8 (rounded), or on a GPU also float16 and bfloat16.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
    """

    out: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Epilogue:
    """Where the results v = sum + bias + residual, ``[N, C]``, are stored.

    Attributes:
        residual: ``[N, C]``, added to the sums.
        bias: ``float32 [C]``, added to the sums.
        raw: ``[N, C]``, receives v.
        activated: up to two outputs that receive v normalised and activated.
    """

    residual: Tensor | None = None
    bias: Tensor | None = None
    raw: Tensor | None = None
    activated: tuple[Activation, ...] = ()
