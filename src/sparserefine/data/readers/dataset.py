"""Datasets as readers return them: lists of image and label files; functions that find these files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.data.readers.labels import INDEX, LabelCode, LabelsConfig
from sparserefine.files.digest import sha256_of
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.images import IMAGE_SUFFIXES, orientation_of, read_pixels, stored_size
from sparserefine.files.regular import regular_file
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE, Classes


@dataclass(frozen=True)
class Sample:
    """An image file and its label file, if it has one. ``name`` identifies them in messages and in stored logits."""

    name: str
    image: Path
    label: Path | None = None


_MOST_NAMED = 20
"""Images without a label, in a message."""


class Example(NamedTuple):
    """An image as it is trained on or scored.

    Attributes:
        image: as :func:`sparserefine.read_image` gives it, ``[C, H, W]``.
        label: ``uint8 [H, W]``, 255 where ignored: also where there is no data, and everywhere without a label file.
        valid: ``bool [H, W]``, false where there is no data, so that nothing is refined, learnt or scored there;
            ``None``: there is data everywhere.
    """

    image: Tensor
    label: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class Dataset:
    """A list of samples that share their classes.

    Attributes:
        samples: image and label files.
        classes: at most 255 classes, because label 255 marks ignored pixels.
        labels: what the pixels of label files mean.
        images: how image files become pixels.
    """

    samples: tuple[Sample, ...]
    classes: Classes
    labels: LabelsConfig = INDEX
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
        """Reads an image and its label, as in :meth:`example`."""
        return self.example(index)[:2]

    def example(self, index: int) -> Example:
        """Reads an image, its label, and where it has data.

        Raises:
            ImageError: a file cannot be read.
            ValueError: image and label differ in size or in how they are turned, or a label value is no class of this
                dataset.
        """
        sample = self.samples[index]
        pixels = read_pixels(sample.image, self.images)
        image, valid = pixels.image, pixels.valid
        if sample.label is None:
            return Example(image, torch.full(image.shape[1:], IGNORE, dtype=torch.uint8), valid)
        label = self.read_label(index)
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"{sample.label}: label is {tuple(label.shape)} pixels, image {sample.image.name} "
                f"{tuple(image.shape[1:])}; they must be equal"
            )
        if valid is not None:
            label[~valid] = IGNORE
        return Example(image, label, valid)

    def read_label(self, index: int) -> Tensor:
        """Reads a label alone, as in :meth:`read`; the sample has one."""
        sample = self.samples[index]
        assert sample.label is not None
        return self._code.read(sample.label, turn_of_label(sample.image, sample.label, self.images.exif))

    @cached_property
    def _code(self) -> LabelCode:
        return LabelCode.of(self.labels, self.classes)

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
        yield [self.classes.names, self.classes.ignore, self.labels.black_white]
        if replace(self.labels, black_white=False, ignore=()) != INDEX:
            yield [self.labels.name, sorted(self._code.meaning.items()), self.labels.tolerance]
        shown = tqdm(self.samples, desc="digest of the labels", unit="image", delay=2)
        for sample, image in zip(shown, self.image_digests, strict=True):
            yield [sample.name, image, *([] if sample.label is None else [sha256_of(sample.label, "a label image")])]


def turn_of_label(image: Path, label: Path, exif: Literal["apply", "ignore"] | None = None) -> int:
    """The EXIF orientation by which a label is to be turned, so that its pixels are those of its image.

    If the image has an orientation that its label has not, nothing tells whether the label was drawn on the picture as
    it is stored or as it is shown. Only where the turned picture has other sides, sizes can prove the latter.

    Args:
        image: the image.
        label: its label.
        exif: how images are read: turned by their tag, or not; ``None``: turned, but nobody chose that.

    Raises:
        ValueError: the orientations differ, and nobody chose.
    """
    if exif == "ignore":
        return 1
    of_image, of_label = orientation_of(image), orientation_of(label)
    if of_image == of_label:
        return of_label
    shown, there = _shown(stored_size(image), of_image), stored_size(label)
    if _shown(there, of_label) == shown != _shown(there, of_image):
        return of_label
    if exif == "apply":
        return of_image
    raise ValueError(
        f"{image}: EXIF says orientation {of_image}, and that of its label {label} is {of_label}, so one of them is "
        "shown turned and the other is not; set images.exif: apply to turn both as the image's EXIF says, or "
        "images.exif: ignore to turn neither; if the label was drawn on the turned picture, store the image turned, "
        "without EXIF"
    )


def _shown(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width of what is stored with ``size``, turned."""
    return size if orientation < 5 else size[::-1]


def pairs(
    images: Path, labels: Path | None, below: str = "", *, image_suffix: str = "", label_suffix: str = ""
) -> list[Sample]:
    """All images in ``images / below``, each with the label of the same relative path and stem.

    Without a folder of labels, no image has one. Hidden files and folders are left out, such as the ``._1.png`` that
    macOS puts beside ``1.png``.

    Args:
        images: folder of the images.
        labels: folder of the labels; it may be the same, if suffixes tell them apart.
        below: a folder in ``images``.
        image_suffix: end of the stems of images, which the stems of labels have not: ``_leftImg8bit``. Files without
            it are no images.
        label_suffix: the same for labels: ``_gtFine_labelIds``.

    Raises:
        ValueError: an image has no label; two images or two labels have one name; or one is no regular file.
        OSError: a file cannot be read.
    """
    label_files: dict[str, list[Path]] = {}
    if labels is not None:
        for file, name in _image_files(labels / below, labels, label_suffix):
            label_files.setdefault(name, []).append(file)
    samples: dict[str, Sample] = {}
    for file, name in _image_files(images / below, images, image_suffix):
        if labels == images and not image_suffix and file.stem.endswith(label_suffix):
            continue
        if name in samples:
            raise ValueError(f"{samples[name].image} and {file}: two images of one name; rename or remove one")
        if labels is None:
            samples[name] = Sample(name, regular_file(file, "an image"))
            continue
        found = label_files.get(name, [])
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]}: two labels of one image; remove one")
        label = regular_file(found[0], "a label image") if found else None
        samples[name] = Sample(name, regular_file(file, "an image"), label)
    without = [sample for sample in samples.values() if sample.label is None]
    if labels is not None and without:
        raise ValueError(f"{without[0].image}: no label {labels / without[0].name}{label_suffix}.png{_others(without)}")
    return list(samples.values())


def _others(samples: Sequence[Sample]) -> str:
    """The names of all but the first, as the end of a message."""
    names = [sample.name for sample in samples[1:]]
    if not names:
        return ""
    shown = ", ".join(map(printable, names[:_MOST_NAMED])) + (", ..." if len(names) > _MOST_NAMED else "")
    return f", and none for {len(names)} more: {shown}"


def _image_files(folder: Path, root: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """What has the name of an image in ``folder``, a folder below ``root``: the file, and its path without suffixes."""
    for file in sorted(folder.rglob("*")):
        if (
            file.suffix.lower() in IMAGE_SUFFIXES
            and file.stem.endswith(suffix)
            and not any(part.startswith(".") for part in file.relative_to(root).parts)
            and not file.is_dir()
        ):
            yield file, file.relative_to(root).with_suffix("").as_posix().removesuffix(suffix)


def checked(samples: list[Sample], classes: Classes, root: Path, split: str, labels: LabelsConfig = INDEX) -> Dataset:
    """A dataset of these samples.

    Raises:
        ValueError: no sample, more than 255 classes, or settings of the labels that do not fit the classes.
    """
    if not samples:
        raise ValueError(f"{root}: no image in split {split!r}")
    if len(classes) > IGNORE:
        raise ValueError(f"{root}: {len(classes)} classes, expected at most {IGNORE}: {IGNORE} marks ignored pixels")
    try:
        LabelCode.of(labels, classes)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from error
    return Dataset(tuple(samples), classes, labels)
