"""Whole images with their coarse logits, as validation reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from sparserefine.data.readers.dataset import Dataset
from sparserefine.training.stored_logits import LiveSplit, StoredSplit


class WholeImage(NamedTuple):
    """One image.

    Attributes:
        name: the sample's name.
        image: ``uint8 [3, H, W]``.
        label: ``uint8 [H, W]``, 255 where ignored.
        logits: the base's outputs, ``float32 [K, h, w]``.
    """

    name: str
    image: Tensor
    label: Tensor
    logits: Tensor


class WholeImages(TorchDataset[WholeImage]):
    """The images of a split with their coarse logits."""

    def __init__(self, data: Dataset, logits: LiveSplit | StoredSplit) -> None:
        self.data, self.logits = data, logits

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> WholeImage:
        image, label = self.data.read(index)
        logits = self.logits(index, (label.shape[0], label.shape[1])).float()
        return WholeImage(self.data.samples[index].name, image, label, logits)

    @staticmethod
    def collate(items: list[WholeImage]) -> WholeImage:
        """The only item of a batch of one."""
        return items[0]
