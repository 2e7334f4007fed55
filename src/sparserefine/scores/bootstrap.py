"""How far a score would move with other images: bootstrap intervals (Efron 1979), images drawn again with repeats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0
FEWEST = 3
"""Of images: fewer say nothing about others."""


def resampled(score: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> Tensor:
    """A score of each of 2000 draws of images, ``float64 [2000]``.

    A draw has as many images as there are, with repeats, and their counts are added: a score of a dataset is no mean
    over its images. For equally many images the draws are the same, so that two predictions of the same images can be
    compared draw by draw, and what is hard for both does not count.

    Args:
        score: of counts, ``float64 [2000, ...] -> [2000]``.
        images: counts of each image, integers ``[...]``.

    Returns:
        The scores; all are NaN for fewer than 3 images.
    """
    count = len(images)
    if count < FEWEST:
        return torch.full((RESAMPLES,), math.nan, dtype=torch.float64)
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(SEED))
    times = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    times.scatter_add_(1, draws, torch.ones(1, dtype=torch.float64).expand_as(draws))
    return score(torch.tensordot(times, torch.stack(list(images)).double(), 1))  # whole numbers, so sums are exact


def interval(values: Tensor) -> tuple[float, float] | None:
    """The two ends of the 95 % percentile interval of a score, or of the difference of two.

    Args:
        values: of each draw, ``float64 [draws]``.

    Returns:
        The ends; ``None`` if a value is not finite, which is so where the score of a draw is undefined.
    """
    if not bool(values.isfinite().all()):
        return None
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
