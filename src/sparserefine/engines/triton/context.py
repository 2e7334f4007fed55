"""Means over blocks of pixels on a GPU; :mod:`sparserefine.engines.reference.context` defines the results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import context as kernels
from sparserefine.engines.triton.launch import blocks, launch
from sparserefine.engines.triton.uncertainty import launches, taps_tensors
from sparserefine.images.coarse import Coarse

MOST_CLASSES = 1024
"""A program holds all classes of its pixels."""
_VALUES = 2048  # probabilities, and values of channels, that a program holds
_FEWEST, _MOST = 8, 256  # pixels that a program looks at together


def block_means(
    image: Tensor,
    coarse: Coarse,
    valid: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    cells: Sequence[Tensor],
) -> list[Tensor]:
    """See :meth:`sparserefine.sparse.interface.Engine.block_means`; without gradients. The host does not wait.

    Each cell is computed on its own, all its pixels by one program, so results do not depend on what else is there.
    Taps are copied to the GPU on first use, as in :func:`sparserefine.engines.triton.uncertainty.uncertainty`.

    Args:
        image: ``uint8``, ``float16``, ``bfloat16`` or ``float32 [B, C, H, W]``, of any strides.
        coarse: the base's outputs for it, of at most :data:`MOST_CLASSES` classes.
        valid: ``bool [B, H, W]``.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
        cells: of each level, ``int32 [n_l, 3]``: batch, row, column, within the level.

    Returns:
        ``float32 [n_l, C + K]`` of each level.

    Raises:
        ValueError: taps reach outside the logits.
    """
    classes, channels, result = coarse.num_classes, image.shape[1], []
    padded, sums = 1 << (classes - 1).bit_length(), 1 << channels.bit_length()
    at_once = max(_FEWEST, min(_MOST, _VALUES // max(padded, sums)))
    mask = None if valid is None else valid.contiguous().view(torch.uint8)
    for level, coords in enumerate(cells):
        means = torch.empty(len(coords), channels + classes, dtype=torch.float32, device=coarse.device)
        pixels = min(4**level, at_once)
        for part, logits, rows, columns in launches(coarse):
            launch(
                kernels.block_means,
                (blocks(len(coords), at_once // pixels),),
                coarse.device,
                *(logits, *logits.stride(), classes, *taps_tensors(rows), *taps_tensors(columns)),
                *(image, *image.stride(), image if mask is None else mask, *coarse.size),
                *(coords, *coords.stride(), len(coords), level, part.start),
                *(scale.contiguous(), shift.contiguous(), means),
                SINGLE=len(logits) < coarse.batch,
                SCORES=coarse.upsampling.outputs == "scores",
                MASKED=mask is not None,
                CELLS=at_once // pixels,
                PIXELS=pixels,
                CLASSES=padded,
                CHANNELS=channels,
                SUMS=sums,
            )
        result.append(means)
    return result
