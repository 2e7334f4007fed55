"""How far a score would move with other images: bootstrap intervals (Efron 1979), images drawn again with repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparserefine.scores.counts import Counts

RESAMPLES = 2000
SEED = 0
FEWEST = 3
"""Of images: fewer say nothing about others."""


def interval(
    score: Callable[[Counts], float], images: Sequence[Counts], other: Sequence[Counts] | None = None
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a score over images, or of the difference of two scores of the same images.

    Images are drawn with repeats, as many as there are, 2000 times, and their counts added: a score of a dataset is no
    mean over its images. Equal images give equal intervals, whatever the order of calls.

    Args:
        score: of counts.
        images: counts of each image.
        other: another prediction's counts of the same images; the interval is then of ``images`` minus ``other``, drawn
            together, so that what is hard for both does not count.

    Returns:
        The two ends; ``None`` for fewer than 3 images, or if the score is undefined for a draw.

    Raises:
        ValueError: ``other`` has another number of images.
    """
    if other is not None and len(other) != len(images):
        raise ValueError(f"{len(images)} and {len(other)} images; expected the same ones")
    if len(images) < FEWEST:
        return None
    draws = torch.randint(len(images), (RESAMPLES, len(images)), generator=torch.Generator().manual_seed(SEED))
    times = torch.nn.functional.one_hot(draws, len(images)).sum(1)
    values = _scores(score, images, times)
    if other is not None:
        values = values - _scores(score, other, times)
    if not bool(values.isfinite().all()):
        return None
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _scores(score: Callable[[Counts], float], images: Sequence[Counts], times: Tensor) -> Tensor:
    """The score of each draw, ``float64``; ``times [draws, images]`` says how often each image is in it."""
    weights = times.double()
    matrices = torch.stack([one.matrix for one in images]).double()
    boundaries = torch.stack([one.boundary for one in images]).double()
    sums = zip(
        torch.tensordot(weights, matrices, 1).round().long(),
        torch.tensordot(weights, boundaries, 1).round().long(),
        strict=True,
    )
    return torch.tensor([score(Counts(matrix, boundary)) for matrix, boundary in sums], dtype=torch.float64)
