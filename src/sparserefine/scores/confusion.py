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


def class_counts(matrix: Tensor) -> Tensor:
    """Pixels of each class that are right, true and predicted, ``int64 [3, K]``: enough for IoU and Dice."""
    return torch.stack([matrix.diag(), matrix.sum(1), matrix.sum(0)])


def iou_of(counts: Tensor) -> Tensor:
    """:func:`iou` of :func:`class_counts`, ``[..., 3, K] -> [..., K]``."""
    right, true, predicted = counts.double().unbind(-2)
    return right / (true + predicted - right)


def dice_of(counts: Tensor) -> Tensor:
    """:func:`dice` of :func:`class_counts`, ``[..., 3, K] -> [..., K]``."""
    right, true, predicted = counts.double().unbind(-2)
    return 2 * right / (true + predicted)


def iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, ``float64 [K]``; NaN where a class neither occurs nor is predicted."""
    return iou_of(class_counts(matrix))


def dice(matrix: Tensor) -> Tensor:
    """Dice coefficient (F1) of each class, ``float64 [K]``; NaN where a class neither occurs nor is predicted."""
    return dice_of(class_counts(matrix))


def accuracy(matrix: Tensor) -> float:
    """Share of the counted pixels that are correct."""
    return float(matrix.diag().sum() / matrix.sum())


def foreground(per_class: Tensor) -> float:
    """One number for tables: class 1 of a two-class task, else the mean over the classes that occur."""
    return float(per_class[1] if len(per_class) == 2 else per_class.nanmean())
