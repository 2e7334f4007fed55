"""Image/label pairs on disk: what every reader returns, and finding the label of each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.files.images import IMAGE_SUFFIXES, read_image, read_label
from sparserefine.images.classes import IGNORE, Classes


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


def existing(root: Path, *names: str) -> Path:
    """The first of these folders in ``root`` that is there."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"{root}: no folder {' or '.join(names)} in it")


def pairs(images: Path, labels: Path, below: str = "") -> list[Sample]:
    """The images in a folder (``images / below``), each with the label of the same path and stem."""
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


def checked(samples: list[Sample], classes: Classes, root: Path, split: str, black_white: bool) -> Dataset:
    """A dataset of these samples; refused if there are none, or if the classes do not fit labels of 8 bits."""
    if not samples:
        raise ValueError(f"{root}: no image in split {split!r}")
    if len(classes) > IGNORE:
        raise ValueError(f"{root}: {len(classes)} classes, expected at most {IGNORE}: {IGNORE} marks ignored pixels")
    if black_white and len(classes) != 2:
        raise ValueError(f"{root}: black and white masks of {len(classes)} classes, expected 2")
    return Dataset(tuple(samples), classes, black_white)
