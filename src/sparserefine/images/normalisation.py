"""Checks of input images and of their number of channels; mean and standard deviation for their normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from sparserefine.files.image_config import MAX_BANDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_CHANNELS = MAX_BANDS
"""Of an image."""
LARGEST = 1e6
"""Of a mean and of a standard deviation, which is also at least 1 / LARGEST: normalised pixels stay within 1e12."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of images and of coarse logits; an image may also be uint8."""
ROUNDING = 1e-3
"""How far floating-point pixels may lie outside 0..1: what resizing and half precision round."""


def default_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images with so many channels: ImageNet's for 3, else 0.5 and 0.25 for each."""
    if channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * channels, (0.25,) * channels


def check_normalisation(owner: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ``ValueError`` unless ``mean`` and ``std`` hold a number per channel that float32 can normalise by."""
    good = all(
        isinstance(given, (tuple, list))
        and 1 <= len(given) <= MOST_CHANNELS
        and all(isinstance(v, Real) and not isinstance(v, bool) and abs(float(v)) <= LARGEST for v in given)
        for given in (mean, std)
    )
    if not good or len(mean) != len(std) or min(std) < 1 / LARGEST:
        raise ValueError(
            f"{owner}.mean = {mean}, {owner}.std = {std}; expected a number for each channel, 1 to {MOST_CHANNELS}, "
            f"and as many in both, std above 0 (from {1 / LARGEST:g}), none above {LARGEST:g}"
        )


def channels_text(count: int) -> str:
    """``1 channel``, ``4 channels``."""
    return f"{count} channel" if count == 1 else f"{count} channels"


_CHANNELS_OF_REFINER = (
    "give the image's bands that the refiner was made for; a new refiner takes as many channels as its mean and std "
    "have numbers"
)

_constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """``values`` as ``float32`` on a device, cached: a copy to the GPU makes the host wait, and breaks a CUDA graph."""
    key = (tuple(values), device)
    if key not in _constants:
        with torch.inference_mode(False):
            made = torch.tensor(key[0], device=device)
        if type(made) is not Tensor:  # a tensor of torch.export or torch.compile: do not cache it
            return made
        _constants[key] = made
    return _constants[key]


def check_image(image: Tensor, channels: int, cure: str = _CHANNELS_OF_REFINER) -> None:
    """Raises ``ValueError`` unless ``image`` is uint8 or floating point ``[B, C, H, W]``, and not empty.

    The check does not look at the pixels, because that makes the host wait for the GPU; see :func:`extremes`.

    Args:
        image: to check.
        channels: C.
        cure: what to do about an image with another number of channels; default: for the image of a refiner.
    """
    expected = f"expected [B, {channels}, H, W] with at least one pixel"
    if image.dim() != 4 or min(image.shape) < 1:
        raise ValueError(f"image is {tuple(image.shape)}, {expected}")
    if image.shape[1] != channels:
        raise ValueError(f"image is {tuple(image.shape)}, {expected}: it has {channels_text(image.shape[1])}; {cure}")
    if image.dtype != torch.uint8 and image.dtype not in FLOATS:
        raise ValueError(f"image is {image.dtype}, expected uint8, or floating point in 0..1")


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value as they become in float32, ``float32 []`` each; NaN if any value is NaN.

    One pass over the values, and the host does not wait for the GPU.
    """
    values = values.detach()
    # torch has no aminmax for Apple's GPUs.
    low, high = (values.amin(), values.amax()) if values.device.type == "mps" else values.aminmax()
    return low.float(), high.float()


def check_pixels(low: float, high: float) -> None:
    """Raises ``ValueError`` unless the smallest and largest value of a floating-point image lie in 0..1."""
    if low >= -ROUNDING and high <= 1 + ROUNDING:  # false for NaN
        return
    seen = "NaN" if math.isnan(low) else f"{low:.4g}..{high:.4g}"
    raise ValueError(
        f"image holds {seen}, expected 0..1 for floating point; divide it by 255, or pass uint8, and do not normalise "
        "it: mean and standard deviation belong to the refiner and its base"
    )
