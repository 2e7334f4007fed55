"""Layers built on one primitive: convolution, batch normalisation that works with few rows, residual block."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.sparse.plan import Stencil


def conv(x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
    """Checks the operands and computes ``y[n] = sum_t x[table[n, t]] @ weight[t]``. Every layer calls this function.

    Args:
        x: ``[N_in, C_in]``, floating point.
        weight: ``[T, C_in, C_out]``, the same dtype.
        stencil: which input rows each output row reads.

    Returns:
        ``[N_out, C_out]``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if x.dim() != 2 or x.shape[0] != stencil.num_inputs:
        raise ValueError(f"features are {tuple(x.shape)}, the stencil reads [{stencil.num_inputs}, C_in]")
    if weight.dim() != 3 or weight.shape[0] != stencil.taps or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, expected [{stencil.taps}, {x.shape[1]}, C_out] for these features"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"features are {x.dtype}, weight {weight.dtype}; expected one floating-point dtype")
    return stencil.conv(x, weight)


class SparseConv(nn.Module):
    """Convolution without bias; ``weight [T, C_in, C_out]``, taps row-major (3x3, or 2x2 between ``cell`` levels).

    ``input_max [C_in]`` holds the largest input seen per channel. It exists only after calibration
    (``quantisation.py``) and is then stored with the weights. Training resets it.
    """

    input_max: Tensor | None

    def __init__(self, c_in: int, c_out: int, taps: int = 9) -> None:
        super().__init__()
        self.register_buffer("input_max", None)
        # Keeps the variance through a ReLU network (He et al. 2015), if every tap has a neighbour.
        self.weight = nn.Parameter(torch.randn(taps, c_in, c_out) * math.sqrt(2 / (taps * c_in)))

    def forward(self, x: Tensor, stencil: Stencil) -> Tensor:
        """``[N_in, C_in]`` -> ``[N_out, C_out]``."""
        if self.training and self.input_max is not None:
            self.input_max = None
        return conv(x, self.weight, stencil)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}input_max")
        self.input_max = None if stored is None else self.weight.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        taps, c_in, c_out = self.weight.shape
        return f"{c_in}, {c_out}, taps={taps}"


class SparseBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of ``[N, C]`` rows.

    In training, fewer than 2 rows have no variance. The layer then uses the running statistics and does not update
    them. The parameters still get a gradient, because distributed training waits for one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, C]``."""
        if not self.training or input.shape[0] >= 2:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def folded(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, ``float64 [C]``, of evaluation mode: the result is ``x * scale + shift``."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight.detach().double() / (self.running_var.double() + self.eps).sqrt()
        return scale, self.bias.detach().double() - self.running_mean.double() * scale


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two submanifold 3x3 convolutions (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = SparseBatchNorm(c_in), SparseConv(c_in, c_out)
        self.norm2, self.conv2 = SparseBatchNorm(c_out), SparseConv(c_out, c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Linear(c_in, c_out, bias=False)

    def forward(self, x: Tensor, around: Stencil) -> Tensor:
        """``[N, C_in]`` -> ``[N, C_out]``."""
        y = self.conv1(F.relu(self.norm1(x), inplace=True), around)
        y = self.conv2(F.relu(self.norm2(y), inplace=True), around)
        result: Tensor = y + self.shortcut(x)
        return result
