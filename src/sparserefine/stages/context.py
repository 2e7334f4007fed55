"""Context: what the cells of every level see of all pixels that they cover, not only of the sites."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse import Engine, PaddedPlan, Plan


def block_means(
    image: Tensor,
    coarse: Coarse,
    valid: Tensor | None,
    plan: Plan | PaddedPlan,
    scale: Tensor,
    shift: Tensor,
    engine: Engine,
) -> list[Tensor]:
    """Mean channels and coarse probabilities over the block of pixels of each active cell, level by level.

    Cell (r, c) of level l covers 2^l x 2^l pixels from (r 2^l, c 2^l) on, with both kinds of down-sampling. Only
    pixels of the image count, and only valid ones. At level 0, a cell is a pixel.

    Args:
        image: ``[B, C, H, W]``, uint8 or floating point.
        coarse: the base's outputs for this image; for crops, with their windows.
        valid: ``bool [B, H, W]``, false where the image is padding; default: all of it is image.
        plan: its levels hold the cells.
        scale: the image is multiplied by it, ``float32 [C]``.
        shift: and this is added, ``float32 [C]``.
        engine: does the computing.

    Returns:
        ``float32 [n_l, C + K]`` of each level, without gradients; zeros where no pixel counts. With a padded plan,
        rows past the cells in use are undefined.

    Raises:
        ValueError: batch size, image size or device of the sites differ.
    """
    sites = plan.sites
    expected = (sites.batch_size, sites.height, sites.width)
    shapes = {"image": (len(image), *image.shape[2:]), "coarse logits": (coarse.batch, *coarse.size)}
    if valid is not None:
        shapes["valid"] = tuple(valid.shape)
    for what, shape in shapes.items():
        if shape != expected:
            raise ValueError(f"{what} of [B, H, W] = {list(shape)}, the sites are of {list(expected)}")
    with torch.no_grad():
        return engine.block_means(image, coarse, valid, scale, shift, [level.sites for level in plan.levels])
