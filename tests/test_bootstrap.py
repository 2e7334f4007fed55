"""Bootstrap intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from sparserefine.scores.bootstrap import interval, resampled


def share(counts: Tensor) -> Tensor:
    """Of counts ``[..., 2]``, right and wrong pixels: the share of the right ones."""
    return counts[..., 0] / counts.sum(-1)


def images(*counts: tuple[int, int]) -> list[Tensor]:
    return [torch.tensor(of_image) for of_image in counts]


def test_equal_images_leave_no_doubt():
    assert interval(resampled(share, images(*[(3, 1)] * 5))) == (0.75, 0.75)


def test_matches_the_binomial_distribution():
    # Ten images of one pixel, half of them right: the score of a draw is a binomial number over ten.
    found = interval(resampled(share, images(*[(1, 0)] * 5, *[(0, 1)] * 5)))
    assert found == pytest.approx((0.2, 0.8))  # P(X <= 1) = 0.011, P(X <= 2) = 0.055


def test_counts_are_added_and_scores_not_averaged():
    # One pixel is wrong where a thousand are right.
    low, high = interval(resampled(share, images(*[(1000, 0)] * 3, *[(0, 1)] * 3)))
    assert low > 0.99
    assert low < high <= 1


def test_a_difference_is_drawn_together():
    better = resampled(share, images(*[(11, 89), (91, 9)] * 4))
    worse = resampled(share, images(*[(10, 90), (90, 10)] * 4))
    assert interval(better - worse) == pytest.approx((0.01, 0.01))
    low, high = interval(better)
    assert high - low > 0.3


def test_too_few_images_and_undefined_scores():
    assert interval(resampled(share, images((1, 0), (1, 0)))) is None
    assert interval(resampled(share, images((0, 0), (0, 0), (5, 0)))) is None  # some draws have no pixel


def test_a_thousand_images_of_many_classes():
    # 150 classes; drawn one image after the other, it would be 2000 x 1000 x 1000 numbers.
    many = [torch.full((3, 150), index % 2) for index in range(1000)]
    low, high = interval(resampled(lambda counts: counts[:, 0, 0] / 1000, many))
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(0.25 / 1000)
    assert (low, high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.004)
