"""The folder of a training run: is there a run, is it this one, and where does it go on?

``config.json`` is the configuration; ``run.json`` says what the run was made from (digests of bases, data and initial
weights) and when, where and with what versions it was started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.json import read_json
from sparserefine.files.whole import written_whole
from sparserefine.refiner import SparseRefiner
from sparserefine.training.checkpoint import LAST, PREVIOUS, CheckpointError, check_weights, read_checkpoint
from sparserefine.training.config import Config
from sparserefine.training.logits import Bases
from sparserefine.training.teacher import Teacher

CONFIG, RUN, BROKEN = "config.json", "run.json", "broken.ckpt"
_FORMAT_VERSION = 1
_MAY_DIFFER = (
    "out",
    *("base.runtime", "images.max_megapixels"),
    *(f"training.{name}" for name in ("workers", "device", "cache_gb", "slurm_requeue", "pictures")),
)
"""Fields of the configuration that do not change the result."""
_MAY_MOVE = (
    *("data.root", "base.name", "base.class_map", "bases", "logits.folder", "training.init"),
    *("logits.crossfit.base", "logits.crossfit.instead_of"),
    *("teacher.name", "teacher.class_map", "teacher.folder"),
)
"""Fields that say where something is. ``run.json`` has its digest, which tells whether it is the same elsewhere."""
_ANEW = "start a new run in another --out"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        step: optimiser steps that are done.
        checkpoint: the file to restore; ``None`` at step 0.
        resumed: whether the run was started before.
    """

    step: int = 0
    checkpoint: Path | None = None
    resumed: bool = False


@dataclass(frozen=True)
class Origin:
    """What a run is made from. Results are the same only if this is.

    Attributes:
        bases: identity of each model by its role: ``base``, ``bases:<number>`` for those of ``bases``,
            ``fold:<split>`` for those of ``logits.crossfit``, with ``:<number>`` if it stands in for one of ``bases``,
            and ``teacher`` if there is one.
        data: digest of the images and labels of each split, ``train`` and ``val``.
        weights: digest of the weights at step 0; ``None`` if it is not known.
    """

    bases: Mapping[str, str]
    data: Mapping[str, str]
    weights: str | None

    @classmethod
    def of(
        cls,
        config: Config,
        data: Sequence[Dataset],
        bases: Bases,
        refiner: SparseRefiner | None,
        teacher: Teacher | None = None,
    ) -> Origin:
        """The origin of a run.

        Args:
            config: of the run.
            data: training and validation data.
            bases: its bases.
            refiner: the refiner, not yet trained; ``None`` where its first weights are not known.
            teacher: its teacher; default: none.
        """
        names = {"base": config.base.name} | {f"bases:{n}": name for n, name in enumerate(config.bases)}
        for fold in config.logits.crossfit:
            of = f":{config.bases.index(fold.instead_of)}" if fold.instead_of in config.bases else ""
            names[f"fold:{fold.split}{of}"] = fold.base
        return cls(
            {role: bases.identity(name, data[0].classes) for role, name in names.items()}
            | ({} if teacher is None else {"teacher": teacher.identity}),
            {split: part.digest() for split, part in zip(("train", "val"), data, strict=True)},
            None if refiner is None else _digest(refiner.trained_state()),
        )


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def holds_run(out: Path) -> bool:
    """Whether a run was started in the folder, so that it can be resumed."""
    return (out / CONFIG).is_file()


def check_fresh(out: Path) -> None:
    """Raises ``ValueError`` if a new run would write over results of an earlier one."""
    held = [name for name in (LAST, PREVIOUS, "best", "last") if (out / name).exists()]
    if held:
        resume = "pass --resume to go on with it, " if holds_run(out) else ""
        raise ValueError(f"{out}: holds a run ({', '.join(held)}); {resume}choose another --out, or delete it")


def check_config(config: Config, out: Path) -> None:
    """Raises ``ValueError`` if the folder holds no run, or one with another configuration."""
    path = out / CONFIG
    if not holds_run(out):
        raise ValueError(f"{path}: missing, so {out} holds no run to resume; start without --resume")
    try:
        stored = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; put a copy of it back, or {_ANEW}") from error
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    stored = json.loads(json.dumps(_with_defaults(stored, config), default=dataclasses.asdict))
    left_out = _MAY_DIFFER + (_MAY_MOVE if (out / RUN).is_file() else ())
    for values in (stored, now):
        for name in left_out:
            _leave_out(values, name.split("."))
    for key in sorted({*stored, *now}):
        if stored.get(key) != now.get(key):
            raise ValueError(
                f"{path}: the run was made with {_difference(key, stored.get(key), now.get(key))}; resume with the "
                f"same value, or {_ANEW}"
            )


def _leave_out(values: Any, names: Sequence[str]) -> None:
    """Removes ``a.b`` from a tree of values; of a list, from each entry. The tree may be of any shape."""
    if isinstance(values, list):
        for entry in values:
            _leave_out(entry, names)
    elif isinstance(values, dict) and len(names) > 1:
        _leave_out(values.get(names[0]), names[1:])
    elif isinstance(values, dict):
        value = values.pop(names[0], None)
        code = [name for name in (value if isinstance(value, list) else [value]) if str(name).startswith("python:")]
        if code:  # which does not move
            values[names[0]] = code if isinstance(value, list) else value


def _with_defaults(stored: Any, like: object) -> Any:
    """Stored values; a field that was not there when they were stored had its default value."""
    if isinstance(stored, list) and isinstance(like, tuple) and like:
        return [_with_defaults(value, like[0]) for value in stored]
    if not dataclasses.is_dataclass(like) or not isinstance(stored, dict):
        return stored
    missing = {
        field.name: field.default
        for field in dataclasses.fields(like)
        if field.name not in stored and field.default is not dataclasses.MISSING
    }
    return missing | {name: _with_defaults(value, getattr(like, name, None)) for name, value in stored.items()}


def _difference(key: str, stored: Any, now: Any) -> str:
    """``training.lr = 0.1, this configuration has 0.2``."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for name in sorted({*stored, *now}):
            if stored.get(name) != now.get(name):
                return _difference(f"{key}.{name}", stored.get(name), now.get(name))
    return f"{key} = {stored}, this configuration has {now}"


def start_of(out: Path, refiner: SparseRefiner) -> Start:
    """Where the run in the folder goes on: at its last readable checkpoint, or at step 0 if it wrote none yet.

    Args:
        out: the run's folder.
        refiner: a refiner of the same shape.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    weights = {f"refiner.{name}": tensor for name, tensor in refiner.trained_state().items()}
    broken: list[CheckpointError] = []
    for path in (out / LAST, out / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
            check_weights(checkpoint, weights, path)
        except CheckpointError as error:
            broken.append(error)
            continue
        if path.name == PREVIOUS:
            why = str(broken[0]) if broken else f"{out / LAST}: missing"
            _log.warning("%s; going on from the checkpoint before it, %s", why, path)
        return Start(checkpoint["global_step"], path, resumed=True)
    if broken:
        raise CheckpointError(f"{'; '.join(map(str, broken))}. Put a copy of it back, or {_ANEW}")
    _log.warning("%s: no checkpoint was written yet; starting at step 0", out)
    return Start(resumed=True)


def set_aside_broken(out: Path, start: Start) -> None:
    """Renames a broken last checkpoint, so that the next one does not push it over the good one before it."""
    if start.checkpoint == out / PREVIOUS and (out / LAST).exists():
        (out / LAST).replace(out / BROKEN)


def check_origin(out: Path, now: Origin, start: Start) -> None:
    """Raises ``ValueError`` if the run in the folder was made from other bases, data or initial weights."""
    path = out / RUN
    if not path.is_file():
        _log.warning("%s: missing, so base and data are not compared with those the run was made from", path)
        return
    origin, _ = _read(path)
    for role in sorted({*origin.bases, *now.bases}):
        before, after = (one.bases.get(role) for one in (origin, now))
        if before != after:
            kind, _, which = role.partition(":")
            known = {"base": "base", "teacher": "the teacher", "bases": f"bases[{which}]"}.get(
                kind, f"the base of logits.crossfit for {which}"
            )
            raise ValueError(
                f"{path}: {known} had identity {before} when the run was started, it has {after} now; put the former "
                f"weights back, or {_ANEW}"
            )
    for split, digest in now.data.items():
        if origin.data.get(split, digest) != digest:
            raise ValueError(
                f"{path}: images, labels or classes of data.{split} have changed since the run was started; put the "
                f"former files back, or {_ANEW}"
            )
    if start.checkpoint is None and origin.weights not in (None, now.weights):
        raise ValueError(
            f"{path}: the run was started from other weights; put the former training.init back, use the former "
            f"version of torch, or {_ANEW}"
        )


def write_start(out: Path, config: Config, origin: Origin, start: Start, now: Mapping[str, Any]) -> None:
    """Writes ``run.json`` with this start of the run, ``now``, added to earlier ones, and then ``config.json``."""
    path, starts = out / RUN, list[dict[str, Any]]()
    if start.resumed and path.is_file():
        origin, starts = _read(path)
        _warn_of_other_machine(starts[-1] if starts else {}, now)
    values = {
        "format_version": _FORMAT_VERSION,
        "origin": dataclasses.asdict(origin),
        "seed": config.training.seed,
        "starts": [*starts, {"step": start.step, **now}],
    }
    for file, content in ((path, values), (out / CONFIG, dataclasses.asdict(config))):
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> tuple[Origin, list[dict[str, Any]]]:
    """Origin and starts of the run."""
    try:
        values = read_json(path)
        origin, starts = Origin(**values["origin"]), values["starts"]
        if not all(isinstance(of, dict) for of in (origin.bases, origin.data, *starts)):
            raise TypeError("wrong type of a value")
    except (KeyError, TypeError, ValueError) as error:
        known = error if isinstance(error, ValueError) else f"{path}: not as `sparserefine train` wrote it ({error!r})"
        raise ValueError(
            f"{known}; put a copy of it back, delete it to resume without comparing base and data, or {_ANEW}"
        ) from error
    return origin, list(starts)


def _warn_of_other_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [key for key in ("device", "engine", "threads", "versions") if before.get(key) != now[key]]
    if differing:
        _log.warning(
            "the run goes on with other %s than before, see %s: its last digits will differ from those of an "
            "uninterrupted run",
            " and ".join(differing),
            RUN,
        )
