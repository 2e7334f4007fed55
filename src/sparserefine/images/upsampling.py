"""Where each full-resolution pixel lies in the coarse logits. All upsampling uses this one separable rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Upsampling:
    """How coarse outputs become full-resolution logits. A threshold suits one choice only, so both are stored.

    Attributes:
        mode: ``bilinear`` (``align_corners=False``), or ``nearest``: bilinear to ``input_size``, then nearest, as the
            method's published code does.
        outputs: ``logits``; or ``scores`` >= 0, which are upsampled, normalised to sum 1, then their log is taken
            (Mask2Former).
        input_size: height and width of the base's input [px]; only ``nearest`` needs it.
    """

    mode: Literal["bilinear", "nearest"] = "bilinear"
    outputs: Literal["logits", "scores"] = "logits"
    input_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling mode {self.mode!r}, expected 'bilinear' or 'nearest'")
        if self.outputs not in ("logits", "scores"):
            raise ValueError(f"outputs = {self.outputs!r}, expected 'logits' or 'scores'")
        if self.mode == "nearest" and self.input_size is None:
            raise ValueError("upsampling mode 'nearest' needs input_size, the size of the base's input")
        if self.input_size is not None and (len(self.input_size) != 2 or min(self.input_size) < 1):
            raise ValueError(f"input_size = {self.input_size}, expected height and width of at least 1 pixel")


@dataclass(frozen=True)
class Window:
    """The part of a (possibly resized) image that a crop shows, in pixels of the resized image.

    Attributes:
        full: height and width of the whole resized image [px]; may be fractional.
        offset: top and left of the crop [px]; may be fractional.
    """

    full: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class AxisTaps:
    """Linear interpolation along one axis: output i = lerp(x[low[i]], x[high[i]], weight[i])."""

    low: Tensor
    high: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Axis:
    """Where the pixels along one axis lie in the coarse logits.

    Attributes:
        out: length of the window [px].
        coarse: length of the coarse logits along this axis.
        full: length of the whole image [px].
        offset: start of the window in the image [px].
        input_size: length of the base's input [px] for ``nearest``; ``None`` for ``bilinear``.
    """

    out: int
    coarse: int
    full: float
    offset: float = 0.0
    input_size: int | None = None

    def taps(self, device: torch.device | None = None) -> AxisTaps:
        """The two coarse values that each pixel is interpolated from, and the weight. Default device: CPU."""
        # float64: at 100 megapixels, float32 positions would be wrong by a visible fraction of a coarse pixel.
        centre, full = torch.arange(self.out, dtype=torch.float64) + self.offset + 0.5, self.full
        if self.input_size is not None:
            centre = (centre * (self.input_size / full)).floor().clamp(0, self.input_size - 1) + 0.5
            full = self.input_size
        position = (centre * (self.coarse / full) - 0.5).clamp(0, self.coarse - 1)
        low = position.floor()
        high = (low + 1).clamp(max=self.coarse - 1)
        return AxisTaps(low.long().to(device), high.long().to(device), (position - low).float().to(device))


def normalised(values: Tensor, upsampling: Upsampling, dim: int) -> Tensor:
    """Upsampled base outputs -> logits. Scores become log(p), where p = score / sum, clipped at 1e-10."""
    if upsampling.outputs == "logits":
        return values
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / total, 1 / values.shape[dim]).clamp_min(1e-10).log()


def entropy_limit(num_classes: int) -> float:
    """Ln K, the entropy of a uniform distribution over K classes [nats]."""
    return math.log(num_classes)
