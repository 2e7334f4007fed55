"""Configuration of ``logits``, ``train`` and ``evaluate``: one YAML file, one tree of frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from sparserefine.bases.base import BaseConfig
from sparserefine.data.crops import AugmentConfig
from sparserefine.data.readers.config import DataConfig
from sparserefine.machine.bounds import check_number, check_positive, check_whole
from sparserefine.machine.device import device_named
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import PRESETS
from sparserefine.training.teacher_config import TeacherConfig

_MAX_BATCH = 65_536
"""Most crops per optimiser step, accumulated ones included."""
_STEPS = 10_000
_MAX_STEPS = 1_000_000_000
_MAX_WORKERS = 1024
_MAX_PICTURES = 1000
_MAX_EMA = 0.999_999
_MAX_SEED = 2**32 - 1
"""Of the random number generators of NumPy."""
_MAX_BOUNDARY_PX = 10_000
_BYTES_PER_PIXEL = 11
"""Of a crop on the device: image 3, label 1, valid 1, entropy 4, coarse label 1, selected 1."""
_STRIDE = 32
"""Of the coarsest logits of usual bases [px of the base's input]."""
_HOST_BYTES_PER_PIXEL = 4
"""Of a crop that waits for the device, not yet resized: image 3, label 1. On average it has as many pixels then."""


@dataclass(frozen=True)
class CrossFit:
    """Images of ``split`` get their coarse logits from ``base``, a base that was not trained on them.

    Attributes:
        split: which images.
        base: name of the base that was not trained on them.
        instead_of: name of the base that it stands in for, one of ``bases``; empty: ``base.name``.
    """

    split: str
    base: str
    instead_of: str = ""

    def __post_init__(self) -> None:
        for name in ("split", "base"):
            if not getattr(self, name).strip():
                raise ValueError(f"logits.crossfit: {name} is empty, expected the {name} of each of its entries")


@dataclass(frozen=True)
class LogitsConfig:
    """Where coarse logits come from in training.

    Attributes:
        source: ``stored``: read the files that ``sparserefine logits`` wrote; ``live``: computed when training starts,
            and kept in memory.
        folder: folder of the stored logits.
        crossfit: other bases for images that the base itself was trained on, because it is over-confident there.
    """

    source: Literal["stored", "live"] = "live"
    folder: str = ""
    crossfit: tuple[CrossFit, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in ("stored", "live"):
            raise ValueError(f"logits.source = {self.source!r}, expected 'stored' or 'live'")
        if self.source == "stored" and not self.folder.strip():
            raise ValueError(
                "logits.source = 'stored' needs logits.folder, the folder that `sparserefine logits` wrote"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: AdamW with a cosine schedule (paper, section 4.1).

    Attributes:
        init: refiner to start from, a folder or ``demo``, the one in this package; it needs the same extractor, but may
            have other classes: what depends on them begins anew. Empty: start from random weights.
        steps: optimiser steps.
        epochs: passes over the training images, in place of ``steps``; the steps that it takes are rounded up to a
            multiple of ``val_every``.
        batch: crops that are computed at once.
        accumulate: an optimiser step follows after so many batches: ``batch * accumulate`` crops a step, in the memory
            of ``batch``.
        lr: peak learning rate.
        clip: maximum norm of the gradient; a longer gradient is scaled down to it.
        weight_decay: decay of weights; biases and normalisation layers have none.
        warmup: share of the steps in which the learning rate rises linearly.
        dice: weight of a Dice loss on sparse and refined logits, for labels and teacher; 0: cross entropy only, as in
            the paper.
        class_weights: weight of each class in the cross entropies, one number for each class; for a teacher, the mean
            by its probabilities; ``null``: 1 each.
        boundary_weight: how much more a site at a boundary of the label counts in the cross entropy to labels: 1 +
            this.
        deep_supervision: weight of cross entropies at the coarser levels of the extractor, by heads that are not
            stored.
        ema: validate and store an exponential mean of the weights, of which this share stays at each step, such as
            0.999; 0: the weights themselves.
        targets: what the refiner learns: ``labels``; ``teacher``: the predictions of ``teacher``, so that images need
            no labels; ``both``: the sum of both losses.
        teacher_weight: weight of the teacher's loss with ``both``.
        temperature: divides the teacher's and the refiner's logits in the teacher's cross entropy; above 1, the
            teacher's less probable classes count more.
        val_every: steps between validations; each validation also writes checkpoints.
        seed: seed of initialisation and crops.
        workers: number of threads that prepare crops; 0: they are cut out when they are needed, which is enough where
            ``cache_gb`` holds all images.
        precision: one of Lightning's names ``32-true``, ``bf16-mixed``, ``16-mixed``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        cache_gb: maximum size of the cache of decoded images, which all workers share [GB].
        slurm_requeue: in a SLURM job that is about to end (SIGUSR1 or SIGTERM), put it into the queue again; there it
            goes on from the last checkpoint in ``out``, so ``val_every`` should be well within a job's time.
        pictures: number of validation images of which each validation stores a picture in ``out/pictures``.
    """

    init: str = ""
    steps: int = _STEPS
    epochs: float | None = None
    batch: int = 8
    accumulate: int = 1
    lr: float = 3e-4
    clip: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.02
    dice: float = 0.0
    class_weights: tuple[float, ...] | None = None
    boundary_weight: float = 0.0
    deep_supervision: float = 0.0
    ema: float = 0.0
    targets: Literal["labels", "teacher", "both"] = "labels"
    teacher_weight: float = 1.0
    temperature: float = 1.0
    val_every: int = 500
    seed: int = 0
    workers: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    cache_gb: float = 4.0
    slurm_requeue: bool = False
    pictures: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, _MAX_STEPS),
            ("batch", 1, _MAX_BATCH),
            ("accumulate", 1, _MAX_BATCH),
            ("val_every", 1, _MAX_STEPS),
            ("seed", 0, _MAX_SEED),
            ("workers", 0, _MAX_WORKERS),
            ("pictures", 0, _MAX_PICTURES),
        ):
            check_whole(f"training.{name}", getattr(self, name), low, high)
        if self.batch * self.accumulate > _MAX_BATCH:
            raise ValueError(
                f"training.batch = {self.batch}, training.accumulate = {self.accumulate}: "
                f"{self.batch * self.accumulate} crops a step, expected at most {_MAX_BATCH}"
            )
        if self.epochs is not None:
            check_positive("training.epochs", self.epochs)
            if self.steps != _STEPS:
                raise ValueError(
                    f"training.steps = {self.steps} and training.epochs = {self.epochs:g}: give only one; "
                    "training.epochs: null takes back what a recipe says"
                )
        if self.targets not in ("labels", "teacher", "both"):
            raise ValueError(f"training.targets = {self.targets!r}, expected 'labels', 'teacher' or 'both'")
        check_number("training.temperature", self.temperature, 0.01, 100)
        for name in ("lr", "clip"):
            check_positive(f"training.{name}", getattr(self, name))
        for name in ("weight_decay", "dice", "teacher_weight", "boundary_weight", "deep_supervision", "cache_gb"):
            check_number(f"training.{name}", getattr(self, name), 0)
        if self.boundary_weight and self.targets == "teacher":
            raise ValueError(
                f"training.boundary_weight = {self.boundary_weight} with training.targets = 'teacher': boundaries are "
                "those of labels; leave it out, or set training.targets: both"
            )
        check_number("training.warmup", self.warmup, 0, 1)
        check_number("training.ema", self.ema, 0, _MAX_EMA)
        for weight in self.class_weights or ():
            check_number("training.class_weights", weight, 0)
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError(f"training.class_weights = {self.class_weights}, expected one above 0 at least")

    def in_steps(self, images: int) -> TrainingConfig:
        """The same with ``steps`` for ``epochs``, if these are given, of so many training images."""
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * images / (self.batch * self.accumulate))
        if steps > self.val_every:
            steps = math.ceil(steps / self.val_every) * self.val_every
        return replace(self, steps=steps, epochs=None)


@dataclass(frozen=True)
class Config(RefinerConfig):
    """Configuration of the commands ``logits``, ``train`` and ``evaluate``: the refiner's settings and the following.

    Attributes:
        data: images and splits.
        base: the frozen model.
        bases: names of more frozen models, for one refiner that suits all of them: in training, crops come in equal
            numbers from the logits of each and of ``base``. Their input size is that of ``base``; normalisation and
            class map too, if they are of the same kind. Validation and the stored refiner use ``base``.
        out: folder of the trained refiner: ``best/``, ``last/``, ``last.ckpt``, and the records of the run.
        preset: named extractor shape, used instead of ``extractor``: ``paper``, ``slim`` or ``slim16``.
        logits: where coarse logits come from in training.
        teacher: the model whose predictions are learnt, if ``training.targets`` says so.
        augment: random crops and augmentation.
        training: optimisation.
        boundary_px: width of the boundary IoU band [px]; ``null``: 2 % of the image's diagonal, as published.
    """

    data: DataConfig
    base: BaseConfig
    out: str
    preset: Literal["paper", "slim", "slim16"] | None = None
    logits: LogitsConfig = LogitsConfig()
    teacher: TeacherConfig = TeacherConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    boundary_px: int | None = None
    bases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [self.base.name, *self.bases]
        double = next((name for name in self.bases if not name.strip() or names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"bases: {double!r}, expected names of bases, each once, and not base.name itself")
        for fold in self.logits.crossfit:
            if fold.instead_of not in ("", *names):
                raise ValueError(
                    f"logits.crossfit: instead_of = {fold.instead_of!r}, expected base.name or one of bases: {names}"
                )
        if not self.out.strip():
            raise ValueError("out is empty, expected a folder for the trained refiner")
        if self.preset is not None and self.extractor not in (PRESETS["slim"], PRESETS[self.preset]):
            raise ValueError(f"preset = {self.preset!r} and extractor = {self.extractor}: give only one")
        if self.teacher.folder.strip() and Path(self.teacher.folder) == Path(self.logits.folder):
            raise ValueError(f"teacher.folder = logits.folder = {self.teacher.folder!r}, expected a folder for each")
        if self.boundary_px is not None:
            check_whole("boundary_px", self.boundary_px, 1, _MAX_BOUNDARY_PX)

    @property
    def refiner(self) -> RefinerConfig:
        """The refiner's settings, with the extractor of ``preset`` if one is named."""
        own = RefinerConfig(**{field.name: getattr(self, field.name) for field in fields(RefinerConfig)})
        return own if self.preset is None else replace(own, extractor=PRESETS[self.preset])


def check_class_weights(config: TrainingConfig, classes: int) -> None:
    """Raises ``ValueError`` unless there is a weight for each class, or none is given."""
    if config.class_weights is not None and len(config.class_weights) != classes:
        raise ValueError(
            f"training.class_weights = {config.class_weights}: {len(config.class_weights)} weights for {classes} "
            "classes, expected one for each"
        )


def check_batch_fits(config: Config, classes: int) -> None:
    """Refuses a batch that no memory holds, before anything is allocated.

    Only the inputs are counted: the crops, and coarse logits at 1/32 of the base's input size each way, the coarsest
    that models usually have. Many have finer ones, and the network needs many times more, so a batch that passes may
    still be too large; one that is refused certainly is.

    Args:
        config: the whole configuration.
        classes: K of the data.

    Raises:
        ValueError: the inputs of one batch exceed the memory of the device, or those that wait for it the machine's.
    """
    c, (height, width) = config.training, config.augment.crop
    if config.base.size is not None:
        seen = float(config.base.size[0] * config.base.size[1])
    else:
        seen = height * width * (config.base.ratio or 0) ** 2
    logits = 4 * classes * seen / _STRIDE**2
    device = device_named(c.device)
    machine = psutil.virtual_memory().total
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else machine
    ahead = 1 + 2 * c.workers  # the loader keeps two batches per worker ready
    for where, needed, there in (
        (f"memory of {device}", c.batch * (_BYTES_PER_PIXEL * height * width + logits), memory),
        ("machine's memory", c.batch * (_HOST_BYTES_PER_PIXEL * height * width + logits) * ahead, machine),
    ):
        if needed > there:
            raise ValueError(
                f"training.batch = {c.batch} crops of {height} x {width} pixels with {c.workers} workers: their inputs "
                f"alone take {needed / 1e9:.1f} GB, the {where} is {there / 1e9:.1f} GB; "
                "take a smaller batch (and training.accumulate), augment.crop or training.workers"
            )
