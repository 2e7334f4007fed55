"""The budget on the GPU: no host read, no sorting, and memory of a few kilobytes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.engines.reference import selection as reference
from sparserefine.engines.triton.kernels import selection as kernels
from sparserefine.engines.triton.launch import blocks, launch

_BLOCK, _CHUNKS = 1024, 16
_EXACT = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose values float32 has, too. Others go to the torch engine's code."""


def keep_largest(values: Tensor, mask: Tensor, budget: int) -> None:
    """What :func:`sparserefine.engines.reference.selection.keep_largest` does, bit for bit.

    Seven launches; where an image has fewer candidates than the budget allows, five of them find that there is nothing
    to do. A budget of 0, or of all pixels, needs no count.

    Args:
        values: floating point ``[B, H, W]``.
        mask: ``bool [B, H, W]``, contiguous: what there is to choose from.
        budget: at least 0.
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
