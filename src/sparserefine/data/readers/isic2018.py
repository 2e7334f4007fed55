"""ISIC 2018, task 1: photographs of skin lesions with their outlines (Codella et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.data.readers.published import Published
from sparserefine.images.classes import Classes

ORIGIN = Published(
    "ISIC 2018 task 1", "https://challenge.isic-archive.com/data/#2018", "under the licence that each archive holds"
)
SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
CLASSES = Classes(("skin", "lesion"), ((0, 0, 0), (255, 255, 255)))


def isic2018(root: str | Path, split: str) -> Dataset:
    """Reads ``ISIC2018_Task1-2_<Split>_Input/`` with ``ISIC2018_Task1_<Split>_GroundTruth/``.

    Args:
        root: folder with these folders.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: a part is missing, or there is no such split.
    """
    root = Path(root)
    ORIGIN.check_split(split, SPLITS)
    images = ORIGIN.folder(root / f"ISIC2018_Task1-2_{SPLITS[split]}_Input")
    labels = ORIGIN.folder(root / f"ISIC2018_Task1_{SPLITS[split]}_GroundTruth")
    samples = pairs(images, labels, label_suffix="_segmentation")
    return checked(samples, CLASSES, root, split, LabelsConfig(black_white=True))
