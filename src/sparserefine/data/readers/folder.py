"""Any folder with ``images/``, ``labels/`` and a classes file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, existing, pairs
from sparserefine.images.classes import read_classes


def folder(root: str | Path, split: str = "", *, ignore: Sequence[int] = (), black_white: bool = False) -> Dataset:
    """A generic dataset: ``images/``, ``labels/`` and ``classes.txt`` with one class per line.

    A line is ``name`` or ``name R G B``. The label of an image has the same relative path and stem.

    Args:
        root: the folder.
        split: a subfolder of both ``images/`` and ``labels/``, or the stem of a text file in ``root`` (``train.txt``)
            that lists image names without suffix; empty: all images.
        ignore: label values to ignore, besides 255.
        black_white: labels are masks of 0 and 255, where 255 means class 1.
    """
    root = Path(root)
    classes = read_classes(root / "classes.txt", ignore)
    images, labels = existing(root, "images"), existing(root, "labels")
    if split and (images / split).is_dir():
        # Names start below images/, so train/1.png and val/1.png are different samples.
        samples = pairs(images, labels, split)
    elif split and (root / f"{split}.txt").is_file():
        wanted = set((root / f"{split}.txt").read_text().split())
        samples = [s for s in pairs(images, labels) if s.name in wanted]
        missing = wanted - {s.name for s in samples}
        if missing:
            raise ValueError(f"{root / split}.txt lists {sorted(missing)[0]!r}, which is not in {images}")
    elif split:
        raise ValueError(f"split {split!r}: neither a folder {images / split} nor a list {root / split}.txt")
    else:
        samples = pairs(images, labels)
    return checked(samples, classes, root, split, black_white)
