"""``sparserefine logits``: stores the base's coarse logits, so that training need not run the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.digest import sha256_of
from sparserefine.files.lock import locked
from sparserefine.files.text import printable
from sparserefine.files.whole import sweep
from sparserefine.images.classes import Classes
from sparserefine.loading import load_base
from sparserefine.training.config import Config
from sparserefine.training.stored_logits import LiveSplit, StoredLogits, StoredSplit, quantised


@dataclass(frozen=True)
class LogitsReport:
    """Result of :func:`store_logits`: number of images computed now, and number already stored before."""

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
            self._bases[name] = load_base(self._config.of(name), classes).to(self._device)
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
        self._crossfit_base = {
            sample.name: fold.base
            for fold in config.logits.crossfit
            if self._name == (fold.instead_of or config.base.name)
            for sample in config.data.read(fold.split).samples
        }

    @property
    def folder(self) -> Path:
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

    def stored(self) -> StoredSplit:
        """The logits of all images, to be read from ``logits.folder``.

        Raises:
            ValueError: some are missing, or were made by another base or of another image.
            OSError: an image cannot be read.
        """
        bases = tuple(self.identity(sample.name) for sample in self.data.samples)
        split = StoredSplit(self.folder, self.data, bases)
        split.check()
        return split

    def live(self) -> LiveSplit:
        """The logits of all images, computed now and kept in memory."""
        indices = tqdm(range(len(self.data)), desc="coarse logits", unit="image", delay=2)
        return LiveSplit([quantised(self.compute(index)[0]) for index in indices])


def store_logits(config: Config, *, device: torch.device, overwrite: bool = False) -> LogitsReport:
    """Stores the coarse logits of the training and validation splits. Skips images whose logits are stored already.

    Those of ``config.bases``, which only training needs, are stored for the training split, in folders of their own.

    Args:
        config: the whole configuration.
        device: where the bases run.
        overwrite: replace files that do not fit: of another base or image, of an older version, damaged, foreign.

    Raises:
        ValueError: ``logits.folder`` is empty or another run writes there, or it holds a file that does not fit and
            ``overwrite`` is false.
        OSError: an image cannot be read, or a file cannot be written.
    """
    if not config.logits.folder.strip():
        raise ValueError("logits.folder is empty, expected the folder to store coarse logits in")
    splits = {split: config.data.read(split) for split in (config.data.train, config.data.val)}
    bases = Bases(config.base, device)
    sources = [(split, CoarseLogits(config, data, device, bases)) for split, data in splits.items()]
    for name in config.bases:
        data = splits[config.data.train]
        check_outputs(bases, name, data.classes)
        sources.append((config.data.train, CoarseLogits(config, data, device, bases, name)))
    with locked(Path(config.logits.folder), "logits"):
        for folder in {
            StoredLogits(source.folder).path(sample.name).parent
            for _, source in sources
            for sample in source.data.samples
        }:
            sweep(folder)
        parts = [_store(split, source, StoredLogits(source.folder), overwrite) for split, source in sources]
    return LogitsReport(sum(part.computed for part in parts), sum(part.present for part in parts))


def _store(split: str, source: CoarseLogits, store: StoredLogits, overwrite: bool) -> LogitsReport:
    """Stores the logits of one split."""
    computed = present = 0
    for index, sample in enumerate(tqdm(source.data.samples, desc=f"logits of {printable(split)}", unit="image")):
        base, digest = source.identity(sample.name), sha256_of(sample.image, "an image")
        if store.path(sample.name).exists():
            try:
                store.read(sample.name, base=base, digest=digest)
                present += 1
                continue
            except ValueError:
                if not overwrite:
                    raise
        logits, size = source.compute(index)
        store.write(sample.name, logits, base=base, image_size=size, digest=digest)
        computed += 1
    return LogitsReport(computed, present)
