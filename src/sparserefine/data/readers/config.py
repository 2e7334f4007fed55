"""DataConfig: which dataset to read, and its splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.hrf import hrf
from sparserefine.data.readers.labels import INDEX, LabelsConfig


@dataclass(frozen=True)
class DataConfig:
    """Which dataset to read, and its splits.

    Attributes:
        name: the reader: ``hrf``, or ``folder`` for a folder with ``images/``, ``classes.txt``, and ``labels/`` unless
            the images have none.
        root: the dataset's folder.
        train: split to train on. For ``hrf``: subject numbers such as ``06-13``; for ``folder``: a subfolder or the
            stem of a list file.
        val: split for choosing checkpoints, thresholds and schedules.
        test: split for the final scores.
        ignore: label values to ignore, besides 255 (``folder`` only).
        black_white: labels are masks of 0 and 255, where 255 means class 1 (``folder`` only).
        labels: what the pixels of label files mean (``folder`` only: other readers know it).
        image_suffix: end of the stems of images, which those of labels have not, such as ``_leftImg8bit`` (``folder``
            only).
        label_suffix: the same for labels, such as ``_gtFine_labelIds`` (``folder`` only).
    """

    name: Literal["hrf", "folder"]
    root: str
    train: str = "train"
    val: str = "val"
    test: str = "test"
    ignore: tuple[int, ...] = ()
    black_white: bool = False
    labels: LabelsConfig = INDEX
    image_suffix: str = ""
    label_suffix: str = ""

    def __post_init__(self) -> None:
        if self.name not in ("hrf", "folder"):
            raise ValueError(f"data.name = {self.name!r}, expected 'hrf' or 'folder'")
        if not self.root.strip():
            raise ValueError("data.root is empty, expected the dataset's folder")
        for name in ("train", "val", "test"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty, expected a split of {self.root}")
        self.labels.also(self.ignore, self.black_white)
        for name in ("image_suffix", "label_suffix"):
            if "/" in getattr(self, name):
                raise ValueError(f"data.{name} = {getattr(self, name)!r}, expected the end of a name, without folders")

    def read(self, split: str) -> Dataset:
        """Reads one split. ``split`` is a value such as ``self.train``, not the field name ``"train"``."""
        if self.name == "hrf":
            return hrf(self.root, split)
        return folder(
            self.root,
            split,
            ignore=self.ignore,
            black_white=self.black_white,
            labels=self.labels,
            image_suffix=self.image_suffix,
            label_suffix=self.label_suffix,
        )
