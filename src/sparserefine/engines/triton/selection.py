"""Applies the budget on the GPU, without a wait of the host, without sorting, and in a few kilobytes of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.engines.reference import selection as reference
from sparserefine.engines.triton.kernels import selection as kernels
from sparserefine.engines.triton.launch import blocks, launch

_BLOCK, _CHUNKS = 1024, 16
_EXACT = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that convert to float32 exactly. Others fall back to the torch engine."""


def keep_largest(values: Tensor, mask: Tensor, budget: int) -> None:
    """Gives exactly the result of :func:`sparserefine.engines.reference.selection.keep_largest`.

    Takes seven launches; for images with fewer candidates than the budget, five of them end at once. A budget of 0, or
    of all pixels, needs no counting.

    Args:
        values: floating point ``[B, H, W]``.
        mask: ``bool [B, H, W]``, contiguous: the candidates.
        budget: the most pixels that stay per image, at least 0.
    """
    if values.dtype not in _EXACT:
        reference.keep_largest(values, mask, budget)
        return
    batch, size = len(mask), mask.shape[1] * mask.shape[2]
    if budget >= size:
        return
    if budget == 0:
        mask.zero_()
        return
    device, grid = mask.device, (blocks(size, _BLOCK * _CHUNKS), batch)
    floats, candidates = values.detach().float().contiguous(), mask.view(torch.uint8).view(batch, size)
    passes, bins = kernels.PASSES.value, kernels.BINS.value
    counts = torch.zeros(batch, passes, bins, dtype=torch.int32, device=device)
    ties = torch.empty(batch, grid[0], dtype=torch.int32, device=device)
    shape = {"BLOCK": _BLOCK, "CHUNKS": _CHUNKS}
    for known in range(passes):
        launch(kernels.count_digits, grid, device, floats, candidates, counts, size, budget, known, **shape)
    launch(kernels.count_ties, grid, device, floats, candidates, counts, ties, size, budget, **shape)
    launch(kernels.clear_rest, grid, device, floats, candidates, counts, ties, size, budget, **shape)
