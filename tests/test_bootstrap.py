"""Bootstrap intervals."""

from __future__ import annotations

import pytest
import torch

from sparserefine.scores.bootstrap import interval
from sparserefine.scores.counts import Counts


def counts(*matrix: int) -> Counts:
    """Counts of an image with two classes."""
    return Counts(torch.tensor(matrix).view(2, 2), torch.zeros(2, 2, dtype=torch.int64))


def accuracy(value: Counts) -> float:
    return value.accuracy()


def test_equal_images_leave_no_doubt():
    assert interval(accuracy, [counts(3, 1, 1, 3)] * 5) == (0.75, 0.75)


def test_matches_the_binomial_distribution():
    # Ten images of one pixel, half of them right: the score of a draw is a binomial number over ten.
    images = [counts(1, 0, 0, 0)] * 5 + [counts(0, 1, 0, 0)] * 5
    found = interval(accuracy, images)
    assert found == pytest.approx((0.2, 0.8))  # P(X <= 1) = 0.011, P(X <= 2) = 0.055


def test_counts_are_added_and_scores_not_averaged():
    images = [counts(0, 0, 0, 1000)] * 3 + [counts(0, 1, 0, 0)] * 3  # one pixel is wrong where a thousand are right
    low, high = interval(accuracy, images)
    assert low > 0.99
    assert low < high <= 1


def test_a_difference_is_drawn_together():
    hard, easy = counts(10, 90, 0, 0), counts(90, 10, 0, 0)
    better = [counts(11, 89, 0, 0), counts(91, 9, 0, 0)]
    low, high = interval(accuracy, better * 4, [hard, easy] * 4)
    assert (low, high) == pytest.approx((0.01, 0.01))
    alone = interval(accuracy, better * 4)
    assert alone[1] - alone[0] > 0.3


def test_too_few_images_and_undefined_scores():
    assert interval(accuracy, [counts(1, 0, 0, 0)] * 2) is None
    nothing = counts(0, 0, 0, 0)  # some draws have no pixel of class 1
    assert interval(lambda value: value.dice(), [nothing, nothing, counts(0, 0, 0, 5)]) is None
    with pytest.raises(ValueError, match="3 and 2 images"):
        interval(accuracy, [nothing] * 3, [nothing] * 2)
