"""``sparserefine logits``: stores coarse logits and the teacher's predictions, so that training runs neither model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.other import other_config
from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.digest import sha256_of
from sparserefine.files.lock import locked
from sparserefine.files.text import printable
from sparserefine.files.whole import sweep
from sparserefine.images.classes import Classes
from sparserefine.loading import load_base
from sparserefine.training.config import Config
from sparserefine.training.forecast import Forecast
from sparserefine.training.stored_logits import LiveSplit, StoredLogits, StoredSplit, quantised
from sparserefine.training.teacher import Teacher
from sparserefine.training.teacher_predictions import TeacherPredictions


@dataclass(frozen=True)
class LogitsReport:
    """Result of :func:`store_logits`: for one folder, numbers of images computed now and already stored before."""

    folder: str
    computed: int
    present: int


class Bases:
    """The bases that a configuration names. Each is loaded and identified once, when it is first needed.

    Args:
        config: input size of all bases, and the other settings of those of the same kind.
        device: the device they run on.
        loaded: a base that is loaded already, under the name ``config.name``.
    """

    def __init__(self, config: BaseConfig, device: torch.device, loaded: FrozenBase | None = None) -> None:
        self._config, self._device = config, device
        self._bases = {} if loaded is None else {config.name: loaded.to(device)}
        self._identities: dict[str, str] = {}

    def base(self, name: str, classes: Classes) -> FrozenBase:
        """The base called ``name``, for data with these classes."""
        if name not in self._bases:
            config = other_config(self._config, name, ratio=self._config.ratio, size=self._config.size)
            self._bases[name] = load_base(config, classes).to(self._device)
        return self._bases[name]

    def first(self, classes: Classes) -> FrozenBase:
        """The base of the configuration."""
        return self.base(self._config.name, classes)

    def identity(self, name: str, classes: Classes) -> str:
        """Identity of :meth:`base`."""
        if name not in self._identities:
            self._identities[name] = self.base(name, classes).identity
        return self._identities[name]


def check_outputs(bases: Bases, name: str, classes: Classes) -> None:
    """Raises ``ValueError`` unless the base of that name returns what ``config.base`` does: logits, or scores."""
    first, other = bases.first(classes), bases.base(name, classes)
    if other.outputs != first.outputs:
        raise ValueError(
            f"bases: {other.label} returns {other.outputs}, {first.label} returns {first.outputs}; a refiner reads one "
            "of both, so name bases that return the same"
        )


class CoarseLogits:
    """Coarse logits of the images of one split by one base; ``logits.crossfit`` names others that stand in for it.

    Args:
        config: names the bases.
        data: the split. A cross-fit base is used for the images that its own split shares with this one.
        device: the device the bases run on.
        bases: the loaded bases, which several splits can share.
        of: name of the base, one of ``config.bases``; default: ``config.base``.
    """

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, bases: Bases, of: str | None = None
    ) -> None:
        self.config, self.data, self.device, self._bases = config, data, device, bases
        self._name = of or config.base.name
        self.files = StoredLogits(self._folder())
        self._crossfit_base = {
            sample.name: fold.base
            for fold in config.logits.crossfit
            if self._name == (fold.instead_of or config.base.name)
            for sample in config.read(fold.split).samples
        }

    def _folder(self) -> Path:
        """Folder of the stored logits: ``logits.folder``, and in it one for each of ``config.bases``."""
        folder = Path(self.config.logits.folder)
        if self._name == self.config.base.name:
            return folder
        return folder / f"base-{self._bases.identity(self._name, self.data.classes).rpartition(':')[2]}"

    def _base_name(self, name: str) -> str:
        """Name of the base for the sample called ``name``."""
        return self._crossfit_base.get(name, self._name)

    def base(self, name: str) -> FrozenBase:
        """The base for the sample called ``name``."""
        return self._bases.base(self._base_name(name), self.data.classes)

    def identity(self, name: str) -> str:
        """Identity of :meth:`base`."""
        return self._bases.identity(self._base_name(name), self.data.classes)

    def compute(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Coarse logits ``[K, h, w]`` of image ``index``, and H and W of the image."""
        image, _ = self.data.read(index)
        logits = self.base(self.data.samples[index].name)(image[None].to(self.device))
        return logits[0].cpu(), (image.shape[1], image.shape[2])

    def check(self, name: str, digest: str) -> None:
        """Raises ``ValueError`` unless the right logits of that sample are stored."""
        self.files.read(name, base=self.identity(name), digest=digest)

    def store(self, index: int, digest: str) -> int:
        """Computes and stores the logits of an image with that SHA-256; returns their bytes."""
        (logits, size), name = self.compute(index), self.data.samples[index].name
        self.files.write(name, logits, base=self.identity(name), image_size=size, digest=digest)
        return quantised(logits).nbytes

    def stored(self) -> StoredSplit:
        """The logits of all images, to be read from ``logits.folder``.

        Raises:
            ValueError: some are missing, or were made by another base or of another image.
            OSError: an image cannot be read.
        """
        bases = tuple(self.identity(sample.name) for sample in self.data.samples)
        split = StoredSplit(self.files.folder, self.data, bases)
        split.check()
        return split

    def live(self) -> LiveSplit:
        """The logits of all images, computed now and kept in memory."""
        indices = tqdm(range(len(self.data)), desc="coarse logits", unit="image", delay=2)
        return LiveSplit([quantised(self.compute(index)[0]) for index in indices])


def store_logits(config: Config, *, device: torch.device, overwrite: bool = False) -> list[LogitsReport]:
    """Stores predictions for the training and validation splits. Skips images whose predictions are stored already.

    These are the coarse logits, and the teacher's predictions if ``training.targets`` needs them and ``teacher.folder``
    says where.

    Those of ``config.bases``, which only training needs, are stored for the training split, in folders of their own.

    Args:
        config: the whole configuration.
        device: where the models run.
        overwrite: replace files that do not fit: of another model or image, of an older version, damaged, foreign.

    Raises:
        ValueError: no folder is given or another run writes there, or it holds a file that does not fit and
            ``overwrite`` is false.
        OSError: an image cannot be read, or a file cannot be written.
        MemoryError: the teacher does not fit into memory.
    """
    wants_teacher = config.training.targets != "labels" and bool(config.teacher.folder.strip())
    if not config.logits.folder.strip() and not wants_teacher:
        raise ValueError("logits.folder is empty, expected the folder to store coarse logits in")
    splits = [config.read(split) for split in dict.fromkeys((config.data.train, config.data.val))]
    reports = []
    if config.logits.folder.strip():
        bases = Bases(config.base, device)
        logits = [CoarseLogits(config, data, device, bases) for data in splits]
        reports.append(_store("coarse logits", logits, overwrite))
        for name in config.bases:
            check_outputs(bases, name, splits[0].classes)
            logits = [CoarseLogits(config, splits[0], device, bases, name)]
            reports.append(_store(f"coarse logits of {printable(name)}", logits, overwrite))
        del bases, logits  # they may fill the memory that the teacher needs
    if wants_teacher:
        teacher = Teacher(config.teacher, config.base, splits[0].classes, device)
        predictions = [TeacherPredictions(teacher, data) for data in splits]
        reports.append(_store("the teacher's predictions", predictions, overwrite))
    return reports


def _store(what: str, sources: Sequence[CoarseLogits] | Sequence[TeacherPredictions], overwrite: bool) -> LogitsReport:
    """Stores the predictions of all splits in one folder."""
    files = sources[0].files
    with locked(files.folder, "logits"):
        for folder in {files.path(sample.name).parent for source in sources for sample in source.data.samples}:
            sweep(folder)
        missing, present = [], 0
        for source in sources:
            for index, sample in enumerate(tqdm(source.data.samples, desc="what is there", unit="image", delay=2)):
                digest = sha256_of(sample.image, "an image")
                if files.path(sample.name).exists():
                    try:
                        source.check(sample.name, digest)
                        present += 1
                        continue
                    except ValueError:
                        if not overwrite:
                            raise
                missing.append((source, index, digest))
        forecast = Forecast(what, len(missing), files.folder)
        for source, index, digest in tqdm(missing, desc=what, unit="image"):
            began = time.perf_counter()
            forecast.after(source.store(index, digest), time.perf_counter() - began)
    return LogitsReport(str(files.folder), len(missing), present)
