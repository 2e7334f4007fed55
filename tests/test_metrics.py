"""Scores against torchmetrics and scipy, which know nothing of ours."""

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torchmetrics.functional.classification import multiclass_confusion_matrix

from sparserefine.images.classes import IGNORE
from sparserefine.scores.boundary import band_overlap, boundary_band, boundary_bands
from sparserefine.scores.confusion import accuracy, confusion, dice, foreground, iou


def labels(k, shape=(37, 53), seed=0, ignored=0.1):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, k, shape, generator=generator)
    truth[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return torch.randint(0, k, shape, generator=generator).to(torch.uint8), truth.to(torch.uint8)


@pytest.mark.parametrize("k", [2, 5, 19])
def test_confusion_is_torchmetrics(k):
    predicted, truth = labels(k)
    expected = multiclass_confusion_matrix(predicted.long(), truth.long(), k, ignore_index=IGNORE)
    assert torch.equal(confusion(predicted, truth, k), expected)


def test_scores_from_sets():
    predicted, truth = labels(3)
    matrix = confusion(predicted, truth, 3)
    counted = truth != IGNORE
    for k in range(3):
        a, b = (predicted == k) & counted, truth == k
        both = (a & b).sum().double()
        assert iou(matrix)[k] == both / (a | b).sum()
        assert dice(matrix)[k] == 2 * both / (a.sum() + b.sum())
    assert accuracy(matrix) == pytest.approx(float((predicted == truth)[counted].double().mean()))


def test_absent_class_is_nan_and_left_out_of_the_mean():
    matrix = confusion(torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 3)
    assert iou(matrix).isnan().tolist() == [False, True, True]
    assert foreground(iou(matrix)) == 1.0


def test_foreground_of_two_classes_is_class_one():
    assert foreground(torch.tensor([0.9, 0.4])) == pytest.approx(0.4)
    assert foreground(torch.tensor([0.9, 0.4, 0.2])) == pytest.approx(0.5)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 2\)"):
        confusion(torch.zeros(2, 2), torch.zeros(3, 2), 2)


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_boundary_band_is_mask_less_erosion(width):
    generator = torch.Generator().manual_seed(1)
    blobs = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 60, 70, generator=generator), 9, 1, 4)[0, 0] > 0.5
    eroded = binary_erosion(blobs.numpy(), np.ones((2 * width + 1, 2 * width + 1)), border_value=0)
    assert np.array_equal(boundary_band(blobs, width).numpy(), blobs.numpy() & ~eroded)


def test_band_overlap_of_a_shifted_square():
    truth, predicted = torch.zeros(20, 20, dtype=torch.uint8), torch.zeros(20, 20, dtype=torch.uint8)
    truth[5:15, 5:15] = 1
    predicted[5:15, 6:16] = 1
    everywhere = torch.ones(20, 20, dtype=torch.bool)
    bands = (boundary_bands(labels, everywhere, 2, 1) for labels in (predicted, truth))
    counts = band_overlap(*bands, 2)
    # Rings of 36 px each; they share top and bottom, 9 px each, and nothing of the sides.
    assert counts[:, 1].tolist() == [18, 54]


def test_published_width_is_two_percent_of_the_diagonal():
    truth = torch.zeros(300, 400, dtype=torch.uint8)  # diagonal 500 px: 10 px
    truth[100:200, 100:200] = 1
    valid = truth < 2
    published, ten = (boundary_bands(truth, valid, 2, width) for width in (None, 10))
    assert torch.equal(band_overlap(published, published, 2), band_overlap(ten, ten, 2))
    assert published[1].sum() == 100**2 - 80**2
