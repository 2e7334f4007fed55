"""Cityscapes: 5,000 street scenes of 2048 x 1024 pixels with fine labels (Cordts et al. 2016)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import INDEX, LabelsConfig
from sparserefine.data.readers.published import Published
from sparserefine.images.classes import CITYSCAPES

ORIGIN = Published("Cityscapes", "https://www.cityscapes-dataset.com", "free for non-commercial use, with an account")
SPLITS = ("train", "val", "test")
_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of each class that is scored. The others of 0 to 33 are ignored."""
LABEL_IDS = LabelsConfig(map={value: _IDS.index(value) if value in _IDS else None for value in range(34)})


def cityscapes(root: str | Path, split: str) -> Dataset:
    """Reads ``leftImg8bit/<split>/<city>/`` with ``gtFine/<split>/<city>/``.

    Label ids are read as the 19 classes that are scored; where there are only files of train ids, which the dataset's
    own scripts make, these. The labels of ``test`` are not published.

    Args:
        root: folder with ``leftImg8bit/`` and ``gtFine/``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: a part is missing, or there is no such split.
    """
    root = Path(root)
    ORIGIN.check_split(split, SPLITS)
    images = ORIGIN.folder(root / "leftImg8bit" / split).parent
    if split == "test":
        return checked(pairs(images, None, split, image_suffix="_leftImg8bit"), CITYSCAPES, root, split)
    labels = ORIGIN.folder(root / "gtFine" / split).parent
    ids = any((labels / split).rglob("*_gtFine_labelIds.png"))
    suffix, meaning = ("_gtFine_labelIds", LABEL_IDS) if ids else ("_gtFine_labelTrainIds", INDEX)
    samples = pairs(images, labels, split, image_suffix="_leftImg8bit", label_suffix=suffix)
    return checked(samples, CITYSCAPES, root, split, meaning)
