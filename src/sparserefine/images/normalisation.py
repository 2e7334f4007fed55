"""Checks of input images; mean and standard deviation for their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_normalisation(owner: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ``ValueError`` unless ``mean`` and ``std`` are three numbers each and ``std`` is above 0."""
    good = all(
        isinstance(given, (tuple, list)) and len(given) == 3 and all(isinstance(v, Real) for v in given)
        for given in (mean, std)
    )
    if not good or min(std) <= 0:
        raise ValueError(f"{owner}.mean = {mean}, {owner}.std = {std}; expected 3 numbers each, std above 0")


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


def check_image(image: Tensor) -> None:
    """Raises ``ValueError`` unless ``image`` is uint8 or floating point ``[B, 3, H, W]``, and not empty."""
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise ValueError(f"image is {tuple(image.shape)}, expected [B, 3, H, W] with at least one pixel")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}, expected uint8, or floating point in 0..1")
