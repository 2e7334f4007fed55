"""``sparserefine train``: trains a refiner as a configuration describes it."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparserefine.data.crops import CropDataset
from sparserefine.data.focus import Focus
from sparserefine.data.readers.check import check_labels
from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.lock import locked
from sparserefine.files.whole import sweep
from sparserefine.images.upsampling import Upsampling
from sparserefine.loading import load_base
from sparserefine.machine.device import device_named
from sparserefine.refiner import SparseRefiner
from sparserefine.training import slurm
from sparserefine.training.checks import warn_if_vain
from sparserefine.training.config import Config, check_batch_fits, check_class_weights
from sparserefine.training.items import WholeImages
from sparserefine.training.logits import Bases, CoarseLogits, check_outputs
from sparserefine.training.mixing import Mixed, repeated
from sparserefine.training.provenance import provenance
from sparserefine.training.record import RunRecord
from sparserefine.training.run import (
    Origin,
    Start,
    check_config,
    check_fresh,
    check_origin,
    holds_run,
    set_aside_broken,
    start_of,
    write_start,
)
from sparserefine.training.stored_logits import LiveSplit, StoredSplit
from sparserefine.training.stored_teacher import LiveTeacherSplit, StoredTeacherSplit
from sparserefine.training.teacher import Teacher
from sparserefine.training.teacher_predictions import TeacherPredictions

if TYPE_CHECKING:
    from sparserefine.training.module import RefinerModule

_log = logging.getLogger(__name__)


def build_refiner(config: Config, data: Dataset) -> SparseRefiner:
    """An untrained refiner as ``config`` describes it, for the classes of ``data``."""
    return SparseRefiner(load_base(config.base, data.classes), config.refiner, classes=data.classes)


def train(config: Config, *, resume: bool = False) -> Path:
    """Trains a refiner, and returns the folder of the best one, ``<out>/best``.

    Writes into ``<out>``: ``best/`` (highest refined score on the validation split), ``last/``, ``last.ckpt`` (to
    resume from) and ``previous.ckpt`` (the one before), ``config.json`` and ``run.json`` (all that is needed to redo
    the run), and what :class:`RunRecord` writes at each validation. A killed run leaves whole files and can be resumed;
    it then ends with the same weights as a run that was not killed.

    Args:
        config: the whole configuration.
        resume: go on with the run in ``<out>``: at its last checkpoint, or at step 0 if it wrote none yet.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is false; there is no run to resume, or one with another
            configuration, base or data; ``steps`` is not a multiple of ``val_every``; or nothing could be learnt or
            scored, so there is no best refiner.
        DivergedError: a loss, gradient or weight became NaN or infinite. A ``ValueError``.
        LockedError: another run writes into ``out``. A ``ValueError``.
        ImportError: Lightning is not installed.
        KeyboardInterrupt: the run was interrupted, or terminated (``Terminated``, a subclass).
    """
    try:
        import lightning  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise ImportError(f"training needs Lightning: pip install 'sparserefine[train]' ({error})") from error
    if config.training.epochs is not None:
        images = len(config.data.read(config.data.train))
        config = replace(config, training=config.training.in_steps(images))
    c, out = config.training, Path(config.out)
    if c.steps % min(c.val_every, c.steps):
        raise ValueError(f"training.steps = {c.steps}, expected a multiple of training.val_every = {c.val_every}")
    with slurm.requeued_when_stopped() if c.slurm_requeue else nullcontext():
        if c.slurm_requeue:
            slurm.unlock_former_start(out)
            resume = resume or (slurm.restarted() and holds_run(out))
        with locked(out, slurm.holder(c.slurm_requeue)):
            return _train(config, out, resume)


def _train(config: Config, out: Path, resume: bool) -> Path:
    from sparserefine.training.module import RefinerModule
    from sparserefine.training.trainer import fit, seed_everything

    if resume:
        check_config(config, out)
    else:
        check_fresh(out)
    for folder in (out, out / "best", out / "last"):
        sweep(folder)
    c = config.training
    seed_everything(c.seed, verbose=False)
    data = [config.data.read(split) for split in (config.data.train, config.data.val)]
    if c.targets != "teacher":
        data[0].check_labelled(f"training.targets = {c.targets!r}")
    if c.targets == "labels":
        data[1].check_labelled("validation with training.targets = 'labels'")
    for part, name in zip(data, ("training", "validation"), strict=True):
        if c.targets != "teacher" or part is data[1]:
            check_labels(part, f"{name} split")
    check_class_weights(c, len(data[0].classes))
    check_batch_fits(config, len(data[0].classes))
    refiner, device = build_refiner(config, data[0]), device_named(c.device)
    start = start_of(out, refiner) if resume else Start()
    init = refiner.start_from(c.init) if c.init and start.checkpoint is None else None  # a checkpoint has all weights
    if init is not None:
        _log.warning("%s", init)
    bases = Bases(config.base, device, refiner.base)
    teacher = None if c.targets == "labels" else Teacher(config.teacher, config.base, data[0].classes, device)
    origin = Origin.of(config, data, bases, refiner if start.checkpoint is None else None, teacher)
    if start.resumed:
        check_origin(out, origin, start)
    train, val = (WholeImages(part, _logits(config, part, device, bases), _taught(teacher, part)) for part in data)
    logits = [train.logits]
    for name in config.bases:
        check_outputs(bases, name, data[0].classes)
        logits.append(_logits(config, data[0], device, bases, name))
    del bases, teacher  # frees the other bases and the teacher, which training does not need
    if start.checkpoint is None:
        warn_if_vain(refiner, train, val, device)
    set_aside_broken(out, start)
    now = provenance(device, c.precision, refiner.engine.on(device).name)
    write_start(out, config, origin, start, now if init is None else {**now, "init": str(init)})
    images = len(data[0])
    crops = CropDataset(
        repeated(data[0], len(logits)),
        Mixed(logits, images),
        config.augment,
        c.seed,
        c.cache_gb,
        teacher=None if train.teacher is None else Mixed([train.teacher] * len(logits), images),
        focus=Focus(config.selector.threshold, Upsampling(outputs=refiner.base.outputs)),
        whole_logits=config.upsampling == "nearest",  # which needs the grid of the base's whole input
        pin=device.type == "cuda",
    )
    with RunRecord(out, resumed_at=None if start.checkpoint is None else start.step) as record:
        module = RefinerModule(refiner, config, record, data[1].labelled)
        fit(module, crops, val, device, start.checkpoint)
    _check_result(module, out)
    refiner.save_pretrained(out / "last")
    return out / "best"


def _logits(
    config: Config, data: Dataset, device: torch.device, bases: Bases, of: str | None = None
) -> LiveSplit | StoredSplit:
    """The coarse logits of one split by the base called ``of``; default: by ``config.base``."""
    source = CoarseLogits(config, data, device, bases, of)
    return source.stored() if config.logits.source == "stored" else source.live()


def _taught(teacher: Teacher | None, data: Dataset) -> LiveTeacherSplit | StoredTeacherSplit | None:
    """The teacher's predictions for one split."""
    if teacher is None:
        return None
    source = TeacherPredictions(teacher, data)
    return source.stored() if teacher.config.source == "stored" else source.live()


def _check_result(module: RefinerModule, out: Path) -> None:
    """Raises ``ValueError`` if there is no best refiner."""
    c = module.config
    taught = c.training.targets != "labels"
    if not module.learnt:
        raise ValueError(
            f"nothing was learnt, so there is no best refiner: in {c.training.steps} steps no pixel was "
            f"{'selected' if taught else 'both selected and labelled'}; lower selector.threshold = "
            f"{c.selector.threshold:g} (entropy in nats), or check "
            f"{'the images' if taught else 'the labels'} of data.train = {c.data.train!r}"
        )
    if module.best_score == -math.inf:
        why = "is labelled, or for two classes, none as class 1; check its labels"
        if not module.labelled:
            why = f"is of class 1 by the teacher; check {c.teacher.name or c.base.name} and the images"
        raise ValueError(
            f"no validation had a score, so there is no best refiner: in data.val = {c.data.val!r} no pixel {why}"
        )
    if not (out / "best").is_dir():
        raise ValueError(f"{out / 'best'}: vanished during the run; train again, and keep other programs out of {out}")
