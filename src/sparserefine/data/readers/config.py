"""Which images: a dataset by its reader's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.hrf import hrf


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
        name: reader; ``hrf``, or ``folder`` for ``images/`` + ``labels/`` + ``classes.txt``.
        root: the dataset's folder.
        train: split to train on: for ``hrf`` subject numbers as ``06-13``, for ``folder`` a subfolder or list.
        val: split that checkpoints, thresholds and schedules are chosen on.
        test: split that is reported once.
        ignore: label values that are no class, besides 255 (``folder`` only).
        black_white: labels are masks of 0 and 255, where 255 is class 1 (``folder`` only).
    """

    name: Literal["hrf", "folder"]
    root: str
    train: str = "train"
    val: str = "val"
    test: str = "test"
    ignore: tuple[int, ...] = ()
    black_white: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty; name a split of {self.root}")

    def read(self, split: str) -> Dataset:
        """The dataset of a split string (not of its name ``train``, ``val`` or ``test``)."""
        if self.name == "hrf":
            return hrf(self.root, split)
        return folder(self.root, split, ignore=self.ignore, black_white=self.black_white)
