"""Reads coarse logits and pixels at the sites. The checks are here; an engine computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse import Engine, Sites


def sample(coarse: Coarse, sites: Sites, engine: Engine) -> Tensor:
    """Full-resolution coarse logits at the sites, ``float32 [N, K]``.

    Raises:
        ValueError: batch size, image size or device of the sites differ.
    """
    _check("coarse logits", (coarse.batch, *coarse.size), coarse.device, sites)
    return engine.sample(coarse, sites.coords)


def pixels(image: Tensor, sites: Sites, scale: Tensor, shift: Tensor, engine: Engine) -> Tensor:
    """``image * scale + shift`` at the sites, ``float32 [N, C]``.

    Args:
        image: ``[B, C, H, W]``, uint8 or floating point.
        sites: the N pixels to read.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
        engine: does the reading.

    Raises:
        ValueError: batch size, image size or device of the sites differ, or ``scale`` or ``shift`` is not ``[C]``.
    """
    _check("image", (len(image), *image.shape[2:]), image.device, sites)
    for name, factors in (("scale", scale), ("shift", shift)):
        if tuple(factors.shape) != (image.shape[1],) or factors.dtype != torch.float32:
            raise ValueError(
                f"{name} is {factors.dtype} {tuple(factors.shape)}, expected float32 [{image.shape[1]}], one value for "
                "each channel"
            )
    return engine.pixels(image, sites.coords, scale, shift)


def _check(what: str, batch_and_size: tuple[int, ...], device: torch.device, sites: Sites) -> None:
    expected = (sites.batch_size, sites.height, sites.width)
    if batch_and_size != expected or device != sites.coords.device:
        raise ValueError(
            f"{what} of [B, H, W] = {list(batch_and_size)} on {device}, the sites are of {list(expected)} on "
            f"{sites.coords.device}; expected the same"
        )
