"""Whole images with their coarse logits, as validation reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from sparserefine.data.readers.dataset import Dataset
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.training.stored_logits import LiveSplit, StoredSplit
from sparserefine.training.stored_teacher import LiveTeacherSplit, StoredTeacherSplit


class WholeImage(NamedTuple):
    """One image.

    Attributes:
        name: the sample's name.
        image: ``[C, H, W]``, uint8, or floating point in 0..1.
        label: ``uint8 [H, W]``, 255 where ignored.
        logits: the base's outputs, ``float32 [K, h, w]``.
        teacher: the teacher's prediction; ``None``: no teacher.
        valid: ``bool [H, W]``, false where there is no data; ``None``: there is data everywhere.
    """

    name: str
    image: Tensor
    label: Tensor
    logits: Tensor
    teacher: SoftLabels | None = None
    valid: Tensor | None = None

    @property
    def valid_batch(self) -> Tensor | None:
        """``valid`` of a batch of this image, ``bool [1, H, W]``."""
        return None if self.valid is None else self.valid[None]


class WholeImages(TorchDataset[WholeImage]):
    """The images of a split with their coarse logits, and the teacher's predictions if there is a teacher."""

    def __init__(
        self,
        data: Dataset,
        logits: LiveSplit | StoredSplit,
        teacher: LiveTeacherSplit | StoredTeacherSplit | None = None,
    ) -> None:
        self.data, self.logits, self.teacher = data, logits, teacher

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> WholeImage:
        image, label, valid = self.data.example(index)
        size = (label.shape[0], label.shape[1])
        teacher = None if self.teacher is None else self.teacher(index, size)
        logits = self.logits(index, size).float()
        return WholeImage(self.data.samples[index].name, image, label, logits, teacher, valid)

    @staticmethod
    def collate(items: list[WholeImage]) -> WholeImage:
        """The only item of a batch of one."""
        return items[0]
