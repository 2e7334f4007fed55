"""What is read at the sites: coarse logits and pixels. Checked here, computed by an engine."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse import Engine, Sites


def sample(coarse: Coarse, sites: Sites, engine: Engine) -> Tensor:
    """Full-resolution coarse logits at the sites, ``float32 [N, K]``.

    Raises:
        ValueError: the sites are of other images, or lie on another device.
    """
    _check("coarse logits", (coarse.batch, *coarse.size), coarse.device, sites)
    return engine.sample(coarse, sites.coords)


def pixels(image: Tensor, sites: Sites, scale: Tensor, shift: Tensor, engine: Engine) -> Tensor:
    """Values of the image at the sites, times ``scale`` plus ``shift``, ``float32 [N, C]``.

    Args:
        image: ``[B, C, H, W]``, uint8 or floating point.
        sites: N pixels of it.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
        engine: what reads them.

    Raises:
        ValueError: the sites are of other images or lie on another device, or there are not C factors.
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
