"""Counts of pixels, which can be added: the scores of a dataset are those of its sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparserefine.scores.boundary import boundary_bands
from sparserefine.scores.confusion import dice, iou
from sparserefine.scores.counts import Counts

K = 3


def images(count: int) -> list[tuple[Tensor, Tensor]]:
    """Predicted and true labels; some pixels are ignored."""
    made = [tuple(torch.randint(0, K, (2, 9, 11)).unbind()) for _ in range(count)]
    for _, truth in made:
        truth[0, :4] = 255
    return made  # type: ignore[return-value]


def counts_of(labels: Tensor, truth: Tensor, where: Tensor | None = None) -> Counts:
    valid = truth != 255
    bands = boundary_bands(labels, valid, K, 1), boundary_bands(truth, valid, K, 1)
    return Counts.of(labels, truth, K, bands=bands, where=where)


def test_the_sum_of_images_is_one_large_image() -> None:
    made = images(3)
    total = sum((Counts.of(*pair, K) for pair in made), Counts.zero(K))
    whole = Counts.of(*(torch.cat(side) for side in zip(*made, strict=True)), K)
    assert torch.equal(total.matrix, whole.matrix)
    for name in ("dice", "iou", "mean_iou", "accuracy", "class_iou"):
        assert getattr(total, name)() == getattr(whole, name)()
    assert total.matrix.sum() == 3 * (9 * 11 - 4)


def test_adding_leaves_the_parts_as_they_were() -> None:
    first, second = (counts_of(*pair) for pair in images(2))
    before = first.matrix.clone(), first.boundary.clone()
    both = first + second
    assert torch.equal(first.matrix, before[0])
    assert torch.equal(first.boundary, before[1])
    assert torch.equal(both.boundary, first.boundary + second.boundary)


def test_parts_of_an_image_add_up_to_it() -> None:
    ((labels, truth),) = images(1)
    where = torch.rand(labels.shape) < 0.5
    parts = counts_of(labels, truth, where) + counts_of(labels, truth, ~where)
    assert torch.equal(parts.matrix, counts_of(labels, truth).matrix)
    assert torch.equal(parts.boundary, counts_of(labels, truth).boundary)
    assert parts.boundary[1].sum() > 0


def test_of_two_classes_the_second_is_scored() -> None:
    labels, truth = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 0, 1]])
    counts = Counts.of(labels, truth, 2)
    assert counts.dice() == float(dice(counts.matrix)[1]) == 0.5
    assert counts.iou() == float(iou(counts.matrix)[1]) == pytest.approx(1 / 3)
    assert counts.accuracy() == 0.5


def test_no_image_has_no_score() -> None:
    empty = Counts.zero(K)
    assert all(math.isnan(value) for value in (empty.dice(), empty.iou(), empty.boundary_iou(), *empty.class_iou()))


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="counts of 3 and of 2 classes"):
        Counts.zero(3) + Counts.zero(2)
