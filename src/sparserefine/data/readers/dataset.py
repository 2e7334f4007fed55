"""Datasets as readers return them: lists of image and label files; functions that find these files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.files.digest import sha256_of
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.images import IMAGE_SUFFIXES, read_label, read_pixels
from sparserefine.files.regular import regular_file
from sparserefine.images.classes import IGNORE, Classes


@dataclass(frozen=True)
class Sample:
    """An image file and its label file, if it has one. ``name`` identifies them in messages and in stored logits."""

    name: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A list of samples that share their classes.

    Attributes:
        samples: image and label files.
        classes: at most 255 classes, because label 255 marks ignored pixels.
        black_white: labels are masks of 0 and 255, as image editors write them. 255 means class 1; no pixel is ignored.
        images: how image files are read.
    """

    samples: tuple[Sample, ...]
    classes: Classes
    black_white: bool = False
    images: ImageConfig = ImageConfig()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labelled(self) -> bool:
        """Whether all samples have a label file."""
        return all(sample.label is not None for sample in self.samples)

    def check_labelled(self, purpose: str) -> None:
        """Raises ``ValueError`` unless all samples have labels, which ``purpose`` needs."""
        for sample in self.samples:
            if sample.label is None:
                raise ValueError(
                    f"{sample.image}: has no label, and {purpose} needs labels; put a label image of the same relative "
                    "path into the folder labels/ beside images/"
                )

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Reads an image and its label.

        The image is as :func:`sparserefine.read_image` gives it, the label ``uint8 [H, W]`` with 255 at ignored pixels.
        Pixels without data are ignored; without a label file, all are.

        Raises:
            ImageError: a file cannot be read.
            ValueError: image and label differ in size, or a label value is no class of this dataset.
        """
        sample = self.samples[index]
        pixels = read_pixels(sample.image, self.images)
        image = pixels.image
        if sample.label is None:
            return image, torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)
        label = read_label(sample.label)
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
                f"0..{len(self.classes) - 1} or {IGNORE} (ignored); add values to ignore to data.ignore"
            )
        if pixels.valid is not None:
            label[~pixels.valid] = IGNORE
        return image, label.to(torch.uint8)

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """SHA-256 of each image file, as it was when this was first asked, and of how it is read.

        Errors as in :meth:`digest`.
        """
        shown = tqdm(self.samples, desc="digest of the images", unit="image", delay=2)
        return tuple(self.images.digest(sha256_of(sample.image, "an image")) for sample in shown)

    def digest(self) -> str:
        """Fingerprint of all that training reads: names, contents of the files, and what their label values mean.

        It is the same for a copy of the dataset in another place. All files are read for it.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is no regular file.
        """
        digest = hashlib.sha256()
        for part in self._parts_of_digest():
            digest.update(json.dumps(part).encode() + b"\n")
        return digest.hexdigest()

    def _parts_of_digest(self) -> Iterator[list[object]]:
        yield [self.classes.names, self.classes.ignore, self.black_white]
        shown = tqdm(self.samples, desc="digest of the labels", unit="image", delay=2)
        for sample, image in zip(shown, self.image_digests, strict=True):
            yield [sample.name, image, *([] if sample.label is None else [sha256_of(sample.label, "a label image")])]


def existing(root: Path, *names: str) -> Path:
    """The first folder in ``root``, of those in ``names``, that exists."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"{root}: no folder {' or '.join(names)} in it")


def pairs(images: Path, labels: Path | None, below: str = "") -> list[Sample]:
    """All images in ``images / below``, each with the label of the same relative path and stem.

    Without a folder of labels, no image has one. Hidden files and folders are left out, such as the ``._1.png`` that
    macOS puts beside ``1.png``.

    Raises:
        ValueError: an image has no label; two images or two labels have one name; or one is no regular file.
        OSError: a file cannot be read.
    """
    label_files: dict[str, list[Path]] = {}
    if labels is not None:
        for file in _image_files(labels, labels):
            label_files.setdefault(_stem(file, labels), []).append(file)
    samples: dict[str, Sample] = {}
    for file in _image_files(images / below, images):
        name = _stem(file, images)
        if name in samples:
            raise ValueError(f"{samples[name].image} and {file}: two images of one name; rename or remove one")
        if labels is None:
            samples[name] = Sample(name, regular_file(file, "an image"))
            continue
        found = label_files.get(name, [])
        if not found:
            raise ValueError(f"{file}: no label {labels / name}.png")
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]}: two labels of one image; remove one")
        samples[name] = Sample(name, regular_file(file, "an image"), regular_file(found[0], "a label image"))
    return list(samples.values())


def _image_files(folder: Path, root: Path) -> list[Path]:
    """What has the name of an image in ``folder``, a folder below ``root``."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and not file.is_dir()
    ]


def _stem(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def checked(samples: list[Sample], classes: Classes, root: Path, split: str, black_white: bool) -> Dataset:
    """A dataset of these samples.

    Raises:
        ValueError: no sample, more than 255 classes, or black and white masks without exactly two classes.
    """
    if not samples:
        raise ValueError(f"{root}: no image in split {split!r}")
    if len(classes) > IGNORE:
        raise ValueError(f"{root}: {len(classes)} classes, expected at most {IGNORE}: {IGNORE} marks ignored pixels")
    if black_white and len(classes) != 2:
        raise ValueError(f"{root}: black and white masks of {len(classes)} classes, expected 2")
    return Dataset(tuple(samples), classes, black_white)
