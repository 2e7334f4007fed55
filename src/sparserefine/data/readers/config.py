"""DataConfig: which dataset to read, and its splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.data.readers.ade20k import ade20k
from sparserefine.data.readers.bdd100k import bdd100k
from sparserefine.data.readers.camvid import camvid
from sparserefine.data.readers.cityscapes import cityscapes
from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.deepglobe import deepglobe
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.hrf import hrf
from sparserefine.data.readers.isic2018 import isic2018
from sparserefine.data.readers.labels import INDEX, LabelsConfig
from sparserefine.data.readers.pairs import pairs_csv
from sparserefine.data.readers.voc2012 import voc2012

PUBLISHED = {
    "ade20k": ade20k,
    "bdd100k": bdd100k,
    "camvid": camvid,
    "cityscapes": cityscapes,
    "deepglobe": deepglobe,
    "hrf": hrf,
    "isic2018": isic2018,
    "voc2012": voc2012,
}
"""Readers of published datasets, which know their labels."""
ROLES = ("train", "val", "test")
"""Fields of :class:`DataConfig` that name a split."""


@dataclass(frozen=True)
class DataConfig:
    """Which dataset to read, and its splits.

    Attributes:
        name: the reader: of a published dataset (``ade20k``, ``bdd100k``, ``camvid``, ``cityscapes``, ``deepglobe``,
            ``hrf``, ``isic2018``, ``voc2012``); ``folder`` for a folder with ``images/``, ``classes.txt``, and
            ``labels/`` unless the images have none; or ``pairs`` for a table of image, label and split.
        root: the dataset's folder; for ``pairs`` the table, or a folder with ``pairs.csv``.
        train: split to train on. For ``hrf``: subject numbers such as ``06-13``; for ``folder``: a subfolder or the
            stem of a list file; for ``pairs``: a value of its column.
        val: split for choosing checkpoints, thresholds and schedules.
        test: split for the final scores.
        ignore: label values to ignore, besides 255 (``folder`` and ``pairs`` only).
        black_white: labels are masks of 0 and 255, where 255 means class 1 (``folder`` and ``pairs`` only).
        labels: what the pixels of label files mean (``folder`` and ``pairs`` only: other readers know it).
        image_suffix: end of the stems of images, which those of labels have not, such as ``_leftImg8bit`` (``folder``
            only).
        label_suffix: the same for labels, such as ``_gtFine_labelIds`` (``folder`` only).
    """

    name: Literal[
        "ade20k",
        "bdd100k",
        "camvid",
        "cityscapes",
        "deepglobe",
        "folder",
        "hrf",
        "isic2018",
        "pairs",
        "voc2012",
    ]
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
        known = sorted([*PUBLISHED, "folder", "pairs"])
        if self.name not in known:
            raise ValueError(f"data.name = {self.name!r}, expected one of {', '.join(known)}")
        if not self.root.strip():
            raise ValueError("data.root is empty, expected the dataset's folder")
        for name in ROLES:
            if not getattr(self, name):
                raise ValueError(f"data.{name} is empty, expected a split of {self.root}")
        labels = self.labels.also(self.ignore, self.black_white)
        if self.name in PUBLISHED and labels != INDEX:
            raise ValueError(
                "data.labels, data.ignore and data.black_white are for the readers folder and pairs; "
                f"{self.name} knows what its labels mean, leave them out"
            )
        for name in ("image_suffix", "label_suffix"):
            suffix = getattr(self, name)
            if suffix and self.name != "folder":
                raise ValueError(f"data.{name} is for the reader folder, and data.name is {self.name!r}; leave it out")
            if "/" in suffix:
                raise ValueError(f"data.{name} = {suffix!r}, expected the end of a name, without folders")

    def read(self, split: str) -> Dataset:
        """Reads one split. ``split`` is a value such as ``self.train``, not the field name ``"train"``."""
        if self.name in PUBLISHED:
            return PUBLISHED[self.name](self.root, split)
        if self.name == "pairs":
            return pairs_csv(self.root, split, self.labels.also(self.ignore, self.black_white))
        return folder(
            self.root,
            split,
            ignore=self.ignore,
            black_white=self.black_white,
            labels=self.labels,
            image_suffix=self.image_suffix,
            label_suffix=self.label_suffix,
        )
