"""Dataset-wide scores: one confusion matrix over all pixels of all images, then ratios of its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.images.classes import IGNORE


def confusion(labels: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix ``int64 [K, K]``, rows: truth, columns: prediction. Pixels with truth 255 do not count.

    Args:
        labels: predicted classes, integers of any shape.
        truth: true classes, the same shape.
        num_classes: K.
    """
    if labels.shape != truth.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, truth {tuple(truth.shape)}; expected equal shapes")
    valid = truth != IGNORE
    pairs = truth[valid].to(torch.int64) * num_classes + labels[valid].to(torch.int64)
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def binned_confusion(labels: Tensor, truth: Tensor, bins: Tensor, num_classes: int, num_bins: int) -> Tensor:
    """Confusion matrices ``int64 [num_bins, K, K]`` of the pixels of each bin; see :func:`confusion`.

    Args:
        labels: predicted classes, integers of any shape.
        truth: true classes, the same shape.
        bins: the bin of each pixel, integers of the same shape.
        num_classes: K.
        num_bins: how many bins there are.
    """
    valid = truth != IGNORE
    pairs = (bins[valid].to(torch.int64) * num_classes + truth[valid]) * num_classes + labels[valid]
    return torch.bincount(pairs, minlength=num_bins * num_classes**2).view(num_bins, num_classes, num_classes)


def iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, ``float64 [K]``; NaN where a class neither occurs nor is predicted."""
    hits, union = matrix.diag().double(), (matrix.sum(0) + matrix.sum(1) - matrix.diag()).double()
    return hits / union


def dice(matrix: Tensor) -> Tensor:
    """Dice coefficient (F1) of each class, ``float64 [K]``; NaN where a class neither occurs nor is predicted."""
    return 2 * matrix.diag().double() / (matrix.sum(0) + matrix.sum(1)).double()


def accuracy(matrix: Tensor) -> float:
    """Share of the counted pixels that are correct."""
    return float(matrix.diag().sum() / matrix.sum())


def foreground(per_class: Tensor) -> float:
    """One number for tables: class 1 of a two-class task, else the mean over the classes that occur."""
    return float(per_class[1] if len(per_class) == 2 else per_class.nanmean())
