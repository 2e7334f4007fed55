"""Image/label pairs on disk: HRF, and any folder with ``images/``, ``labels/`` and a classes file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.classes import IGNORE, Classes, read_classes
from sparserefine.data.images import IMAGE_SUFFIXES, read_image, read_label


@dataclass(frozen=True)
class Sample:
    """One image with its label map on disk; ``name`` identifies it in messages and stored logits."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A list of samples that share their classes.

    Attributes:
        samples: images and labels.
        classes: at most 255, since 255 marks ignored pixels.
        black_white: labels are masks of 0 and 255, as image editors write them: 255 is class 1, and nothing is ignored.
    """

    samples: tuple[Sample, ...]
    classes: Classes
    black_white: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``uint8 [3, H, W]`` and label ``uint8 [H, W]``, ignored pixels 255.

        Raises:
            ImageError: a file cannot be read.
            ValueError: sizes differ, or a label is no class of this dataset.
        """
        sample = self.samples[index]
        image, label = read_image(sample.image), read_label(sample.label)
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"{sample.label}: label is {tuple(label.shape)} pixels, image {sample.image.name} "
                f"{tuple(image.shape[1:])}; they must be equal"
            )
        if self.black_white:
            label = torch.where(label == 255, 1, label)
        for value in self.classes.ignore:
            label[label == value] = IGNORE
        unknown = label[(label != IGNORE) & (label >= len(self.classes))]
        if unknown.numel():
            raise ValueError(
                f"{sample.label}: {unknown.numel()} pixels have label {int(unknown[0])}, expected "
                f"0..{len(self.classes) - 1} or {IGNORE} (ignored); list further values under data.ignore"
            )
        return image, label.to(torch.uint8)


HRF_CLASSES = Classes(("background", "vessel"), ((0, 0, 0), (0, 230, 110)))


def hrf(root: str | Path, split: str) -> Dataset:
    """The High-Resolution Fundus database (Budai et al. 2013): 15 subjects of each of dr, g and h.

    Args:
        root: folder with ``images/`` and ``labels/`` (or ``manual1/``, as published).
        split: subject numbers, as ``"06-13"``, ``"14"`` or ``"06-09,14"``.
    """
    root = Path(root)
    subjects: set[str] = set()
    for part in split.split(","):
        match = re.fullmatch(r"(\d\d)(?:-(\d\d))?", part.strip())
        if not match:
            raise ValueError(f"HRF split {split!r}: expected subject numbers such as '06-13' or '06-09,14'")
        first, last = int(match[1]), int(match[2] or match[1])
        subjects |= {f"{subject:02d}" for subject in range(first, last + 1)}
    labels = _existing(root, "labels", "manual1")
    samples = [s for s in _pairs(_existing(root, "images"), labels) if s.name[:2] in subjects]
    return _checked(samples, HRF_CLASSES, root, split, labels.name == "manual1")


def folder(root: str | Path, split: str = "", *, ignore: Sequence[int] = (), black_white: bool = False) -> Dataset:
    """A generic dataset: ``images/``, ``labels/`` (same stems) and ``classes.txt``, a class a line.

    A line is ``name`` or ``name R G B``. A file pairs with the label of the same path and stem.

    Args:
        root: the folder.
        split: a subfolder of both ``images/`` and ``labels/``, or the stem of a text file in ``root`` that lists stems
            (``train.txt``); empty: everything.
        ignore: label values that are no class, besides 255.
        black_white: masks of 0 and 255 instead of class indices.
    """
    root = Path(root)
    classes = read_classes(root / "classes.txt", ignore)
    images, labels = _existing(root, "images"), _existing(root, "labels")
    if split and (images / split).is_dir():
        # Named from images/ on: train/1.png and val/1.png are different samples.
        samples = _pairs(images, labels, split)
    elif split and (root / f"{split}.txt").is_file():
        wanted = set((root / f"{split}.txt").read_text().split())
        samples = [s for s in _pairs(images, labels) if s.name in wanted]
        missing = wanted - {s.name for s in samples}
        if missing:
            raise ValueError(f"{root / split}.txt lists {sorted(missing)[0]!r}, which is not in {images}")
    elif split:
        raise ValueError(f"split {split!r}: neither a folder {images / split} nor a list {root / split}.txt")
    else:
        samples = _pairs(images, labels)
    return _checked(samples, classes, root, split, black_white)


def _existing(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"{root}: no folder {' or '.join(names)} in it")


def _pairs(images: Path, labels: Path, below: str = "") -> list[Sample]:
    by_stem: dict[str, Path] = {}
    for file in sorted(labels.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            by_stem[_stem(file, labels)] = file
    samples = []
    for file in sorted((images / below).rglob("*")):
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        name = _stem(file, images)
        if name not in by_stem:
            raise ValueError(f"{file}: no label {labels / name}.png")
        samples.append(Sample(name, file, by_stem[name]))
    return samples


def _stem(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def _checked(samples: list[Sample], classes: Classes, root: Path, split: str, black_white: bool) -> Dataset:
    if not samples:
        raise ValueError(f"{root}: no image in split {split!r}")
    if len(classes) > IGNORE:
        raise ValueError(f"{root}: {len(classes)} classes, expected at most {IGNORE}: {IGNORE} marks ignored pixels")
    if black_white and len(classes) != 2:
        raise ValueError(f"{root}: black and white masks of {len(classes)} classes, expected 2")
    return Dataset(tuple(samples), classes, black_white)
