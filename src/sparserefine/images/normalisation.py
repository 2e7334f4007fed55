"""Images as networks want them: what is accepted, means and spreads of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_normalisation(whose: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ``ValueError`` unless there are three numbers of each and the spreads are positive."""
    good = all(
        isinstance(given, (tuple, list)) and len(given) == 3 and all(isinstance(v, Real) for v in given)
        for given in (mean, std)
    )
    if not good or min(std) <= 0:
        raise ValueError(f"{whose}.mean = {mean}, {whose}.std = {std}; expected 3 numbers each, std above 0")


_constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """``float32``, made once: a copy to a GPU waits for it, and is not allowed in a CUDA graph."""
    key = (tuple(values), device)
    if key not in _constants:
        with torch.inference_mode(False):
            made = torch.tensor(key[0], device=device)
        if type(made) is not Tensor:  # a tracer's, which others must not get
            return made
        _constants[key] = made
    return _constants[key]


def check_image(image: Tensor) -> None:
    """Raises ``ValueError`` unless ``image`` is uint8 or floating point ``[B, 3, H, W]`` with pixels."""
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise ValueError(f"image is {tuple(image.shape)}, expected [B, 3, H, W] with at least one pixel")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}, expected uint8, or floating point in 0..1")
