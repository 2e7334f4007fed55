"""BDD100K, semantic segmentation: 10,000 street scenes of 1280 x 720 pixels (Yu et al. 2020)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.published import Published
from sparserefine.images.classes import CITYSCAPES

ORIGIN = Published("BDD100K", "http://bdd-data.berkeley.edu", "for research and education, with an account")
SPLITS = ("train", "val", "test")


def bdd100k(root: str | Path, split: str) -> Dataset:
    """Reads ``images/10k/<split>/`` with ``labels/sem_seg/masks/<split>/``, whose values are Cityscapes' train ids.

    The labels of ``test`` are not published.

    Args:
        root: folder with ``images/`` and ``labels/``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: a part is missing, or there is no such split.
    """
    root = Path(root)
    ORIGIN.check_split(split, SPLITS)
    images = ORIGIN.folder(root / "images" / "10k" / split).parent
    labels = None if split == "test" else ORIGIN.folder(root / "labels" / "sem_seg" / "masks" / split).parent
    return checked(pairs(images, labels, split), CITYSCAPES, root, split)
