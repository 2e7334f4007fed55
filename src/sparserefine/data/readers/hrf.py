"""HRF: 45 fundus photographs with vessel masks."""

from __future__ import annotations

import re
from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.data.readers.published import Published
from sparserefine.images.classes import Classes

ORIGIN = Published("HRF", "https://www5.cs.fau.de/research/data/fundus-images", "CC BY 4.0")
HRF_CLASSES = Classes(("background", "vessel"), ((0, 0, 0), (0, 230, 110)))


def hrf(root: str | Path, split: str) -> Dataset:
    """The High-Resolution Fundus database (Budai et al. 2013): 15 subjects in each of the groups dr, g and h.

    Args:
        root: folder with ``images/`` and ``labels/`` (or ``manual1/``, as published).
        split: subject numbers, such as ``"06-13"``, ``"14"`` or ``"06-09,14"``.

    Raises:
        ValueError: a part is missing, or the split has not this form or no image.
    """
    root = Path(root)
    subjects: set[str] = set()
    for part in split.split(","):
        match = re.fullmatch(r"(\d\d)(?:-(\d\d))?", part.strip())
        if not match:
            raise ValueError(f"HRF split {split!r}: expected subject numbers such as '06-13' or '06-09,14'")
        first, last = int(match[1]), int(match[2] or match[1])
        subjects |= {f"{subject:02d}" for subject in range(first, last + 1)}
    images = ORIGIN.folder(root / "images")
    labels = root / "labels" if (root / "labels").is_dir() else ORIGIN.folder(root / "manual1")
    samples = [s for s in pairs(images, labels) if s.name[:2] in subjects]
    return checked(samples, HRF_CLASSES, root, split, LabelsConfig(black_white=labels.name == "manual1"))
