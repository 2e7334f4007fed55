"""Any folder with ``images/``, a classes file, and ``labels/`` where there are labels."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path, PurePosixPath

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import INDEX, LabelsConfig
from sparserefine.files.images import IMAGE_SUFFIXES
from sparserefine.files.lines import read_lines
from sparserefine.images.classes import read_classes

_MAX_BYTES = 100_000_000
"""Of a list of images: a million of them."""


def folder(
    root: str | Path,
    split: str = "",
    *,
    ignore: Sequence[int] = (),
    black_white: bool = False,
    labels: LabelsConfig = INDEX,
    image_suffix: str = "",
    label_suffix: str = "",
) -> Dataset:
    """A generic dataset: ``images/``, ``labels/`` and ``classes.txt`` with one class per line.

    A line is ``name`` or ``name R G B``. The label of an image has the same relative path and stem, suffixes apart.
    Without the folder ``labels/``, or the subfolder of the split in it, the images are unlabelled; but with
    ``label_suffix``, labels may lie beside the images.

    Args:
        root: the folder.
        split: a subfolder of ``images/`` and ``labels/``, or the stem of a text file in ``root`` (``train.txt``)
            that lists image names, with or without suffix; empty: all images.
        ignore: label values to ignore, besides 255.
        black_white: labels are masks of 0 and 255, where 255 means class 1.
        labels: what the pixels of label files mean.
        image_suffix: what the stem of an image has, and that of its label has not: ``_leftImg8bit``.
        label_suffix: the same for labels: ``_gtFine_labelIds``.

    Raises:
        ValueError: the folder has not this form, or the split has no image; see also :func:`pairs`.
        OSError: a file cannot be read.
    """
    root = Path(root)
    if Path(split).is_absolute() or ".." in Path(split).parts:
        raise ValueError(f"split {split!r}: expected a folder in {root / 'images'} or the stem of a list in {root}")
    labels = labels.also(tuple(ignore), black_white)
    classes = read_classes(root / "classes.txt", labels.ignore)
    images = root / "images"
    if not images.is_dir():
        raise ValueError(f"{root}: no folder images in it")
    below = split if (images / split).is_dir() else ""
    there: Path | None = root / "labels" if label_suffix == "" or (root / "labels").is_dir() else images
    there = there if there and (there / below).is_dir() else None
    # Names start below images/, so train/1.png and val/1.png are different samples.
    samples = pairs(images, there, below, image_suffix=image_suffix, label_suffix=label_suffix)
    if split and not below:
        listed = root / f"{split}.txt"
        if not listed.exists():
            raise ValueError(f"split {split!r}: neither a folder {images / split} nor a list {listed}")
        wanted = set(_listed(listed, {sample.name for sample in samples}, images, image_suffix))
        samples = [sample for sample in samples if sample.name in wanted]
    return checked(samples, classes, root, split, labels)


def _listed(path: Path, known: Container[str], images: Path, suffix: str) -> Iterator[str]:
    """The names in a list of images: one a line, or several without blanks in them."""
    for line in read_lines(path, "a list of images", max_bytes=_MAX_BYTES):
        whole, parts = _name(line, known, suffix), [_name(text, known, suffix) for text in line.split()]
        if whole in known:
            yield whole
        elif all(name in known for name in parts):
            yield from parts
        else:
            # A line of which nothing is known is one name with blanks.
            first = next(text for text, name in zip(line.split(), parts, strict=True) if name not in known)
            missing = first if any(name in known for name in parts) else line
            raise ValueError(f"{path} lists {missing!r}, which is not in {images}")


def _name(text: str, known: Container[str], suffix: str) -> str:
    """The sample that a list means: its name, or the name of its image file."""
    path = PurePosixPath(text)
    if text not in known and path.suffix.lower() in IMAGE_SUFFIXES:
        text = path.with_suffix("").as_posix()
    return text if text in known else text.removesuffix(suffix)
