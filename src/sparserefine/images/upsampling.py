"""Where each full-resolution pixel lies in the coarse logits: one separable rule for all uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Upsampling:
    """How coarse outputs become full-resolution logits. Thresholds belong to this choice, so it is stored with them.

    Attributes:
        mode: ``bilinear`` (``align_corners=False``), or ``nearest``: bilinear to ``input_size``, then nearest, as the
            method's published code does.
        outputs: ``logits``, or ``scores`` >= 0 that are upsampled, normalised to sum 1 and then logged (Mask2Former).
        input_size: the base's input size [px], needed by ``nearest`` only.
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


@dataclass(frozen=True)
class Window:
    """The part of a (possibly resized) image that a crop shows, in pixels of the resized image.

    Attributes:
        full: height and width of the whole resized image [px]; need not be whole numbers.
        offset: top and left of the crop [px].
    """

    full: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class AxisTaps:
    """Linear interpolation along one axis: output i = lerp(x[low[i]], x[high[i]], weight[i])."""

    low: Tensor
    high: Tensor
    weight: Tensor


def axis_taps(
    out: int, coarse: int, full: float, offset: float, input_size: int | None, device: torch.device
) -> AxisTaps:
    """Taps of pixels 0..out-1 of a window that starts at ``offset`` in an axis of ``full`` pixels.

    Args:
        out: pixels of the window.
        coarse: length of the coarse axis.
        full: length of the whole axis [px].
        offset: start of the window [px].
        input_size: length of the base's input for ``nearest``; ``None`` for ``bilinear``.
        device: where the taps shall lie.
    """
    # float64: at 100 megapixels, float32 positions would be off by visible fractions of a coarse pixel.
    centre = torch.arange(out, dtype=torch.float64) + offset + 0.5
    if input_size is not None:
        centre = (centre * (input_size / full)).floor().clamp(0, input_size - 1) + 0.5
        full = input_size
    position = (centre * (coarse / full) - 0.5).clamp(0, coarse - 1)
    low = position.floor()
    high = (low + 1).clamp(max=coarse - 1)
    return AxisTaps(low.long().to(device), high.long().to(device), (position - low).float().to(device))


def taps_of(logits: Tensor, size: tuple[int, int], how: Upsampling, window: Window | None) -> tuple[AxisTaps, AxisTaps]:
    """Row and column taps of a full-resolution ``size`` (or of a window of it) in ``logits [..., h, w]``."""
    window = window or Window((float(size[0]), float(size[1])))
    nearest = how.input_size if how.mode == "nearest" else None
    rows, columns = (
        axis_taps(
            size[axis],
            logits.shape[axis - 2],
            window.full[axis],
            window.offset[axis],
            nearest[axis] if nearest else None,
            logits.device,
        )
        for axis in (0, 1)
    )
    return rows, columns


def normalised(values: Tensor, how: Upsampling, dim: int) -> Tensor:
    """Upsampled base outputs -> logits: scores become log(p), p = score / sum, clipped at 1e-10."""
    if how.outputs == "logits":
        return values
    total = values.sum(dim, keepdim=True)
    return torch.where(total > 0, values / total, 1 / values.shape[dim]).clamp_min(1e-10).log()


def entropy_limit(num_classes: int) -> float:
    """Ln K, the entropy of a uniform distribution over K classes [nats]."""
    return math.log(num_classes)
