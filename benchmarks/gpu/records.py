"""The records of ``benchmarks.gpu``, and the file that holds them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparserefine.files.whole import written_whole

PARTS = ("checks", "ceilings", "unet", "uncertainty", "training", "models", "tilings")
"""In this order: checks come before timing, and ceilings before the lower bounds (floors) made from them."""

KEYS = {
    "checks": ("name",),
    "ceilings": ("name",),
    "unet": ("engine", "preset", "mask", "batch", "dtype", "mode"),
    "uncertainty": ("engine", "case", "dtype", "mode"),
    "training": ("engine", "preset", "mask", "dtype"),
    "models": ("model", "coarse_size", "preset", "mask", "precision", "engine", "runtime"),
    "tilings": ("preset", "kind", "depth", "c_in", "c_out", "dtype"),
}
"""Key fields of each part's records: a new record replaces the old one with the same values."""


@dataclass(frozen=True)
class Check:
    """One comparison with a reference.

    Attributes:
        name: what is compared.
        error: relative rms difference, or what the name says; ``None`` if it is not finite.
        bound: the largest error that passes.
        ok: whether the check passes.
    """

    name: str
    error: float | None
    bound: float
    ok: bool


@dataclass(frozen=True)
class Ceiling:
    """One measured rate.

    Attributes:
        name: ``copy``, or the dtype of a matrix product.
        rate: bytes read and written [GB/s], or operations [TFLOP/s].
        unit: unit of the rate.
        ms: median time.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: number of timed runs.
    """

    name: str
    rate: float
    unit: str
    ms: float
    low_ms: float
    high_ms: float
    repetitions: int


@dataclass(frozen=True)
class UNetRecord:
    """One network on one mask; times are medians.

    Attributes:
        engine: ``triton``, ``torch``, ``spconv``, ``spconv-triton``, or ``dense``: ordinary convolutions on all pixels.
        preset: name of the preset.
        mask: stem of the mask's file; ``all`` for ``dense``.
        size: size of the image.
        batch: B.
        dtype: type of features and weights; ``tf32``: float32 multiplied in TF32.
        mode: ``eager``, ``graph`` (one CUDA graph, inputs copied into it for each run) or ``compiled`` (torch.compile).
        sites: N of the whole batch.
        density: share of the pixels that are sites.
        ms: time of mask and features -> logits, plan included.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: number of timed runs.
        plan_ms: time of mask -> plan; eager only.
        forward_ms: time of features and plan -> logits; eager only.
        peak_mb: peak memory beyond network and inputs [1e6 bytes].
        gmacs: 1e9 multiply-accumulates, as ``SparseUNet.macs`` counts them.
        operations_ms: lower bound of a forward from its operations, see ``benchmarks.gpu.layers``.
        bytes_ms: lower bound of a forward from its traffic.
        floor_ms: the larger of both; the plan is not included.
        difference: relative rms difference from the logits of eager ``triton`` of the same dtype; ``None`` for itself
            and for ``dense``.
    """

    engine: str
    preset: str
    mask: str
    size: str
    batch: int
    dtype: str
    mode: str
    sites: int
    density: float
    ms: float
    low_ms: float
    high_ms: float
    repetitions: int
    plan_ms: float | None
    forward_ms: float | None
    peak_mb: float
    gmacs: float
    operations_ms: float
    bytes_ms: float
    floor_ms: float
    difference: float | None


@dataclass(frozen=True)
class UncertaintyRecord:
    """Labels and entropy at full size.

    Attributes:
        engine: ``triton``, or ``plain``: ordinary torch code with full-size logits.
        case: classes and sizes.
        dtype: type of the coarse logits.
        mode: ``eager``: launches and allocations included; ``graph``: many runs in one graph, so neither is included.
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: number of timed runs.
        peak_mb: peak memory beyond the coarse logits, results included [1e6 bytes].
        floor_ms: lower bound from its traffic: the coarse logits once, and 5 bytes a pixel.
    """

    engine: str
    case: str
    dtype: str
    mode: str
    ms: float
    low_ms: float
    high_ms: float
    repetitions: int
    peak_mb: float
    floor_ms: float


@dataclass(frozen=True)
class TrainingRecord:
    """Forward, backward and clearing of gradients in training mode; plans are made before.

    Attributes:
        engine: ``triton`` or ``torch``.
        preset: name of the preset.
        mask: stem of the mask's file.
        dtype: ``bfloat16`` (by autocast), ``tf32`` or ``float32``.
        mode: ``eager``.
        sites: N.
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: number of timed runs.
        peak_mb: peak memory beyond network, inputs and plans [1e6 bytes].
        floor_ms: three times the forward's lower bound.
    """

    engine: str
    preset: str
    mask: str
    dtype: str
    mode: str
    sites: int
    ms: float
    low_ms: float
    high_ms: float
    repetitions: int
    peak_mb: float
    floor_ms: float


@dataclass(frozen=True)
class TilingRecord:
    """One convolution with the engine's tiling, and with the best of some others.

    Attributes:
        preset: name of the preset.
        kind: see ``benchmarks.gpu.layers.Layer``.
        depth: likewise.
        rows: output rows.
        c_in: input channels.
        c_out: output channels.
        taps: taps of the weight.
        dtype: type of features and weights.
        layers: number of the network's layers with this shape.
        own: tiling from the engine's fixed table: rows x columns x depth, warps, blocks loaded ahead.
        own_ms: time with it.
        best: the fastest tiling.
        best_ms: time with it.
        floor_ms: lower bound of this convolution.
        others: times of all tilings that were tried [ms].
    """

    preset: str
    kind: str
    depth: int
    rows: int
    c_in: int
    c_out: int
    taps: int
    dtype: str
    layers: int
    own: str
    own_ms: float
    best: str
    best_ms: float
    floor_ms: float
    others: dict[str, float]


class Results:
    """Records of one machine, in a file that is always replaced as a whole.

    Args:
        path: the file; ``None``: nothing is written.
        machine: description of the machine.

    Raises:
        ValueError: the file is not a results file, or is of another machine.
    """

    def __init__(self, path: Path | None, machine: dict[str, str]) -> None:
        self._path = path
        self._content: dict[str, Any] = {"machine": machine, **{part: [] for part in PARTS}, "left_out": []}
        if path is None or not path.exists():
            return
        stored = read_results(path)
        if stored["machine"] != machine:
            raise ValueError(f"{path} is of another machine or version: {stored['machine']}; pass another --json FILE")
        self._content |= {part: stored.get(part, []) for part in PARTS}

    def of(self, part: str) -> list[dict[str, Any]]:
        """The records of one part."""
        found: list[dict[str, Any]] = self._content[part]
        return found

    def content(self) -> dict[str, Any]:
        """Everything that the file holds."""
        return self._content

    def add(self, part: str, records: Sequence[Any]) -> None:
        """Adds records (dataclasses) to a part, replacing those with the same key, and writes the file."""
        new = [asdict(record) for record in records]
        replaced = {_key(part, record) for record in new}
        self._content[part] = [old for old in self.of(part) if _key(part, old) not in replaced] + new
        self._write()

    def leave_out(self, line: str) -> None:
        """Records what was not measured, and why."""
        self._content["left_out"].append(line)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            with written_whole(self._path) as temporary:
                temporary.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def _key(part: str, record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[field] for field in KEYS[part])


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises:
        ValueError: it is not a results file.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        parts = [content[part] for part in PARTS]
        whole = isinstance(content["machine"], dict) and all(isinstance(records, list) for records in parts)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a file of results; expected what `python -m benchmarks.gpu` writes")
    return content


def slug(name: str) -> str:
    """A file name made from a GPU's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
