"""The checkpoint that a run is resumed from: written whole, read with care."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line
from sparserefine.files.whole import written_whole

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""Names of the newest checkpoint of a run, and of the one before it."""
_TYPES = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "epoch": int,
    "global_step": int,
    "best_score": float,
    "pytorch-lightning_version": str,
}
"""What every checkpoint of a run holds."""


class CheckpointError(ValueError):
    """A file is no checkpoint of this run, or is damaged."""


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint whole; the one that was there is kept as ``PREVIOUS`` beside it.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    with written_whole(path, keep=path.with_name(PREVIOUS)) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides what happened, a full disk or Ctrl-C, behind an error of its own
            reason = error.__context__
            if isinstance(reason, KeyboardInterrupt):
                raise reason from None
            raise OSError(*reason.args if isinstance(reason, OSError) else (first_line(error),)) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint: tensors and plain values only, no code. Tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or something else than a checkpoint.
    """
    try:
        with zipfile.ZipFile(regular_file(path, "a checkpoint")) as archive:
            damaged = archive.testzip()  # torch does not compare checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it does not match its checksum")
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:  # its message recommends weights_only=False, which would run what it holds
        raise CheckpointError(f"{path}: damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # torch and zipfile raise almost anything on a damaged file
        raise CheckpointError(f"{path}: not a checkpoint, or damaged ({first_line(error)})") from error
    for key, kind in _TYPES.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise CheckpointError(f"{path}: not a checkpoint of `sparserefine train`: no {key} in it")
    return found


def check_weights(checkpoint: Mapping[str, Any], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises ``CheckpointError`` unless the checkpoint holds weights of exactly these names and shapes."""
    weights = checkpoint["state_dict"]
    for name in sorted({*weights, *expected}, key=str):
        sizes = [list(value.shape) if isinstance(value := of.get(name), Tensor) else None for of in (weights, expected)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(f"{path}: weight {name} is {sizes[0]}, expected {sizes[1]}: of another refiner")
