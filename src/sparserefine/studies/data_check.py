"""``sparserefine data check``: looks at every file of the splits before an hour is lost to one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.data.readers.check import check_labels
from sparserefine.data.readers.config import ROLES, DataConfig
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.files.digest import sha256_of
from sparserefine.files.images import IMAGE_SUFFIXES, orientation_of
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE

_MOST_SHOWN = 8
"""Findings of one kind in the table; all are in the JSON file."""


@dataclass(frozen=True)
class Finding:
    """Something about the data that its owner should know.

    Attributes:
        kind: what it is: findings of one kind stand together.
        split: its split.
        file: the file, or the name of the image; empty: the split as a whole.
        message: what was seen, and the cure.
        wrong: whether it is certainly a mistake, and not only a surprise.
    """

    kind: str
    split: str
    file: str
    message: str
    wrong: bool


@dataclass
class SplitFacts:
    """What was counted in one split.

    Attributes:
        split: its name in the configuration.
        images: number of images.
        labelled: number of images with a label.
        sizes: number of images of each ``HxW`` [px].
        kinds: number of images of each kind of pixels, such as ``3 x uint8``.
        pixels: number of pixels of each class.
        ignored: number of pixels of labels that are ignored, those without data among them.
        images_with: number of images in which each class occurs.
        seen: number of pixels of all images.
        without_data: number of them that have no data.
    """

    split: str
    images: int = 0
    labelled: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    pixels: list[int] = field(default_factory=list)
    ignored: int = 0
    images_with: list[int] = field(default_factory=list)
    seen: int = 0
    without_data: int = 0

    def count(self, image: Tensor, label: Tensor | None, valid: Tensor | None) -> None:
        """Adds an image ``[C, H, W]``, its label ``[H, W]``, and where it has data, ``bool [H, W]``."""
        size = "x".join(map(str, image.shape[1:]))
        kind = f"{image.shape[0]} x {str(image.dtype).removeprefix('torch.')}"
        for counts, seen in ((self.sizes, size), (self.kinds, kind)):
            counts[seen] = counts.get(seen, 0) + 1
        self.seen += image[0].numel()
        self.without_data += 0 if valid is None else int((~valid).sum())
        if label is None:
            return
        self.labelled += 1
        pixels = torch.bincount(label.flatten(), minlength=IGNORE + 1).tolist()
        self.ignored += pixels[IGNORE]
        for k in range(len(self.pixels)):
            self.pixels[k] += pixels[k]
            self.images_with[k] += pixels[k] > 0


@dataclass(frozen=True)
class DataReport:
    """The result of :func:`check_data`.

    Attributes:
        classes: names of the classes; empty: no split could be read.
        splits: what was counted, by role: ``train``, ``val``, ``test``.
        findings: what was noticed, mistakes first.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, SplitFacts]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> int:
        """Number of findings that are certainly mistakes."""
        return sum(finding.wrong for finding in self.findings)

    def table(self) -> str:
        """The counts, and the findings below them."""
        facts = list(self.splits.values())
        rows: list[list[str]] = [["", *self.splits]]
        rows.append(["split", *(printable(f.split) for f in facts)])
        rows.append(["images", *(str(f.images) for f in facts)])
        rows.append(["labels read", *(str(f.labelled) for f in facts)])
        rows.append(["size", *(_most(f.sizes) for f in facts)])
        rows.append(["pixels", *(_most(f.kinds) for f in facts)])
        if any(f.without_data for f in facts):
            rows.append(["without data", *(f"{100 * f.without_data / max(1, f.seen):.2f} %" for f in facts)])
        if any(f.labelled for f in facts):
            rows.append(["share of the pixels", *("" for _ in facts)])
            for k, name in enumerate(self.classes):
                rows.append([f"  {printable(name)}", *(_share(f, f.pixels[k]) if f.pixels else "-" for f in facts)])
            rows.append(["  ignored", *(_share(f, f.ignored) for f in facts)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), "", *self._told()])

    def _told(self) -> Iterator[str]:
        kinds = dict.fromkeys((f.kind, f.split, f.wrong) for f in self.findings)
        for kind, split, wrong in kinds:
            same = [f for f in self.findings if (f.kind, f.split, f.wrong) == (kind, split, wrong)]
            yield f"{'WRONG' if wrong else 'note'}: {split}: {kind}{f', {len(same)} times' if len(same) > 1 else ''}"
            for finding in same[:_MOST_SHOWN]:
                yield f"  {printable(finding.message)}"
            if len(same) > _MOST_SHOWN:
                yield f"  and {len(same) - _MOST_SHOWN} more"
        yield f"{self.wrong} mistakes" if self.wrong != 1 else "1 mistake"


def check_data(config: DataConfig, read: Callable[[str], Dataset], roles: Sequence[str]) -> DataReport:
    """Reads all images and labels of the splits, and tells what cannot be meant or would surprise.

    Args:
        config: the configured dataset.
        read: reads one split: ``config.read``, or a function that also knows how images are to be read.
        roles: which splits: ``train``, ``val``, ``test``. Only with all three can a file of a folder be in none.
    """
    facts: dict[str, SplitFacts] = {}
    findings: list[Finding] = []
    data: dict[str, Dataset] = {}
    for role in roles:
        split = getattr(config, role)
        same = next((other for other, fact in facts.items() if fact.split == split), None)
        if same is not None:
            findings.append(
                Finding("two splits are one by the configuration", role, "", f"{role} is {same}", wrong=False)
            )
            continue
        facts[role] = SplitFacts(split)
        try:
            data[role] = read(split)
        except (OSError, ValueError) as error:
            # Training needs no test split, and the name may only be the default.
            wrong = role != "test" or config.test != "test" or len(roles) == 1
            findings.append(Finding("the split cannot be read", role, "", str(error), wrong=wrong))
    for role, part in data.items():
        findings += _of_split(role, part, facts[role])
    findings += _of_all(data, facts)
    if config.name == "folder" and len(roles) == len(ROLES) and len(data) == len(facts):
        findings += _left_over(Path(config.root), data)
    findings.sort(key=lambda finding: not finding.wrong)
    classes = next((part.classes.names for part in data.values()), ())
    return DataReport(tuple(classes), facts, tuple(findings))


def _of_split(role: str, data: Dataset, facts: SplitFacts) -> Iterator[Finding]:
    """Counts, and what is noticed in single files."""
    k = len(data.classes)
    facts.images, facts.pixels, facts.images_with = len(data), [0] * k, [0] * k
    without = [sample for sample in data.samples if sample.label is None]
    if without and len(without) < len(data):
        for sample in without:
            yield Finding("an image has no label, others have", role, sample.name, f"{sample.image}", wrong=True)
    for index, sample in enumerate(tqdm(data.samples, desc=f"{role}: images", unit="image", delay=2)):
        try:
            image, label, valid = data.example(index)
            orientation = orientation_of(sample.image)
        except (OSError, ValueError, MemoryError) as error:
            yield Finding("a file cannot be read as it is meant", role, sample.name, str(error), wrong=True)
            continue
        facts.count(image, None if sample.label is None else label, valid)
        if orientation != 1:
            shown = "as it is stored" if data.images.exif == "ignore" else "turned"
            yield Finding(
                "EXIF says that an image is to be turned",
                role,
                sample.name,
                f"{sample.image}: orientation {orientation}; it is read {shown} (images.exif)",
                wrong=False,
            )
        if valid is not None and not bool(valid.any()):
            yield Finding("no pixel of an image has data", role, sample.name, f"{sample.image}", wrong=False)
        elif sample.label is not None and bool((label == IGNORE).all()):
            yield Finding("every pixel of a label is ignored", role, sample.name, f"{sample.label}", wrong=False)
    if len(facts.kinds) > 1:
        yield Finding("images differ in their pixels", role, "", _all(facts.kinds), wrong=False)
    if facts.labelled and facts.ignored and not any(facts.pixels[1:]):
        try:
            check_labels(data, f"{role} split")
        except ValueError as error:
            yield Finding("labels that can only be a mistake", role, "", str(error), wrong=True)


def _of_all(data: Mapping[str, Dataset], facts: Mapping[str, SplitFacts]) -> Iterator[Finding]:
    """What is noticed between splits: images in two of them, classes that are only in one."""
    seen: dict[str, tuple[str, Sample]] = {}
    for role, part in data.items():
        for sample in tqdm(part.samples, desc=f"{role}: digests", unit="image", delay=2):
            try:
                digest = sha256_of(sample.image, "an image")
            except (OSError, ValueError):
                continue  # told already
            if digest not in seen:
                seen[digest] = role, sample
                continue
            before, other = seen[digest]
            what = f"{sample.image} is the same as {other.image}" + (f" of {before}" if before != role else "")
            if before != role:
                yield Finding("an image is in two splits", role, sample.name, what, wrong=True)
            elif sample.image != other.image:
                yield Finding("an image is there twice", role, sample.name, what, wrong=False)
    counted = {role: fact for role, fact in facts.items() if fact.labelled}
    for role, fact in counted.items():
        never = [name for name, pixels in zip(data[role].classes.names, fact.pixels, strict=True) if not pixels]
        if never:
            yield Finding("classes of which there is no pixel", role, "", ", ".join(never), wrong=False)


def _left_over(root: Path, data: Mapping[str, Dataset]) -> Iterator[Finding]:
    """Images and labels of a folder that are in none of the splits."""
    used = {path for part in data.values() for sample in part.samples for path in (sample.image, sample.label)}
    for name in ("images", "labels"):
        files = (
            file
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file not in used
        )
        for file in files:
            yield Finding(f"a file of {name}/ belongs to no split", "all", file.name, f"{file}", wrong=False)


def _most(counts: Mapping[str, int]) -> str:
    if not counts:
        return "-"
    first, *rest = sorted(counts, key=lambda what: -counts[what])
    return f"{first} and {len(rest)} more" if rest else first


def _all(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} of {what}" for what, number in sorted(counts.items(), key=lambda item: -item[1])[:20])


def _share(facts: SplitFacts, pixels: int) -> str:
    total = facts.ignored + sum(facts.pixels)
    return f"{100 * pixels / total:.2f} %" if total else "-"
