"""Any folder with ``images/``, a classes file, and ``labels/`` where there are labels."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sparserefine.data.readers.dataset import Dataset, checked, existing, pairs
from sparserefine.files.images import IMAGE_SUFFIXES
from sparserefine.files.lines import read_lines
from sparserefine.images.classes import read_classes

_MAX_BYTES = 100_000_000
"""Of a list of images: a million of them."""


def folder(root: str | Path, split: str = "", *, ignore: Sequence[int] = (), black_white: bool = False) -> Dataset:
    """A generic dataset: ``images/``, ``labels/`` and ``classes.txt`` with one class per line.

    A line is ``name`` or ``name R G B``. The label of an image has the same relative path and stem. Without the folder
    ``labels/``, or the subfolder of the split in it, the images are unlabelled.

    Args:
        root: the folder.
        split: a subfolder of ``images/`` and ``labels/``, or the stem of a text file in ``root`` (``train.txt``)
            that lists image names, with or without suffix; empty: all images.
        ignore: label values to ignore, besides 255.
        black_white: labels are masks of 0 and 255, where 255 means class 1.

    Raises:
        ValueError: the folder has not this form, or the split has no image; see also :func:`pairs`.
        OSError: a file cannot be read.
    """
    root = Path(root)
    if Path(split).is_absolute() or ".." in Path(split).parts:
        raise ValueError(f"split {split!r}: expected a folder in {root / 'images'} or the stem of a list in {root}")
    classes = read_classes(root / "classes.txt", ignore)
    images = existing(root, "images")
    below = split if (images / split).is_dir() else ""
    labels = root / "labels" if (root / "labels" / below).is_dir() else None
    if below:
        # Names start below images/, so train/1.png and val/1.png are different samples.
        samples = pairs(images, labels, split)
    elif split and (root / f"{split}.txt").exists():
        samples = pairs(images, labels)
        wanted = set(_listed(root / f"{split}.txt", {sample.name for sample in samples}, images))
        samples = [sample for sample in samples if sample.name in wanted]
    elif split:
        raise ValueError(f"split {split!r}: neither a folder {images / split} nor a list {root / split}.txt")
    else:
        samples = pairs(images, labels)
    return checked(samples, classes, root, split, black_white)


def _listed(path: Path, known: Container[str], images: Path) -> Iterator[str]:
    """The names in a list of images: one a line, or several without blanks in them."""
    for line in read_lines(path, "a list of images", max_bytes=_MAX_BYTES):
        whole, parts = _name(line, known), [_name(text, known) for text in line.split()]
        if whole in known:
            yield whole
        elif all(name in known for name in parts):
            yield from parts
        else:
            # A line of which nothing is known is one name with blanks.
            first = next(text for text, name in zip(line.split(), parts, strict=True) if name not in known)
            missing = first if any(name in known for name in parts) else line
            raise ValueError(f"{path} lists {missing!r}, which is not in {images}")


def _name(text: str, known: Container[str]) -> str:
    """The sample that a list means: its name, or the name of its image file."""
    path = PurePosixPath(text)
    return text if text in known or path.suffix.lower() not in IMAGE_SUFFIXES else path.with_suffix("").as_posix()
