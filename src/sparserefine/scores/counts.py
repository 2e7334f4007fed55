"""The accumulator: counts of pixels that all scores are computed from. Counts of parts of a dataset can be added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.scores.boundary import band_overlap
from sparserefine.scores.confusion import accuracy, confusion, dice, foreground, iou


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts over any number of images, on the CPU. Scores come from the sums, never from a mean over images.

    Attributes:
        matrix: confusion matrix, ``int64 [K, K]``, rows: truth, columns: prediction.
        boundary: intersection and union of the boundary bands of each class, ``int64 [2, K]``.
    """

    matrix: Tensor
    boundary: Tensor

    @classmethod
    def zero(cls, num_classes: int) -> Counts:
        """Counts of no image, for K = ``num_classes``."""
        matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        return cls(matrix, torch.zeros(2, num_classes, dtype=torch.int64))

    @classmethod
    def of(
        cls,
        labels: Tensor,
        truth: Tensor,
        num_classes: int,
        *,
        bands: tuple[dict[int, Tensor], dict[int, Tensor]] | None = None,
        where: Tensor | None = None,
    ) -> Counts:
        """Counts of one image.

        Args:
            labels: predicted classes, integers ``[H, W]``.
            truth: true classes ``[H, W]``; pixels with 255 do not count.
            num_classes: K.
            bands: boundary bands of ``labels`` and of ``truth``, each by class, see
                :func:`sparserefine.scores.boundary.boundary_bands`; ``None``: boundaries are not counted.
            where: ``bool [H, W]``, the pixels to count; ``None``: all.

        Raises:
            ValueError: the shapes differ.
        """
        chosen = (labels, truth) if where is None else (labels[where], truth[where])
        boundary = torch.zeros(2, num_classes, dtype=torch.int64)
        if bands is not None:
            boundary = band_overlap(*bands, num_classes, where=where)
        return cls(confusion(*chosen, num_classes).cpu(), boundary)

    def __add__(self, other: Counts) -> Counts:
        """Counts of both parts together.

        Raises:
            ValueError: the numbers of classes differ.
        """
        if len(self.matrix) != len(other.matrix):
            raise ValueError(f"counts of {len(self.matrix)} and of {len(other.matrix)} classes; expected equal numbers")
        return Counts(self.matrix + other.matrix, self.boundary + other.boundary)

    def dice(self) -> float:
        """Dice of class 1 of two classes, else the mean over the classes that occur."""
        return foreground(dice(self.matrix))

    def iou(self) -> float:
        """IoU of class 1 of two classes, else the mean over the classes that occur."""
        return foreground(iou(self.matrix))

    def boundary_iou(self) -> float:
        """Boundary IoU (Cheng et al. 2021) of class 1 of two classes, else the mean over the classes that occur."""
        return foreground(self.boundary[0].double() / self.boundary[1].double())

    def mean_iou(self) -> float:
        """Mean IoU over all classes that occur."""
        return float(iou(self.matrix).nanmean())

    def accuracy(self) -> float:
        """Share of the counted pixels that are right."""
        return accuracy(self.matrix)

    def class_iou(self) -> list[float]:
        """IoU of each class; NaN where a class neither occurs nor is predicted."""
        found: list[float] = iou(self.matrix).tolist()
        return found
