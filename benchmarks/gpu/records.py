"""What ``benchmarks.gpu`` records, and the file it keeps them in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparserefine.files.whole import written_whole

PARTS = ("checks", "ceilings", "unet", "uncertainty", "training", "models", "tilings")
"""In order: what is wrong is not timed, and ceilings make floors."""

KEYS = {
    "checks": ("name",),
    "ceilings": ("name",),
    "unet": ("engine", "preset", "mask", "batch", "dtype", "mode"),
    "uncertainty": ("engine", "case", "dtype", "mode"),
    "training": ("engine", "preset", "mask", "dtype"),
    "models": ("model", "coarse_size", "preset", "mask", "precision", "engine", "runtime"),
    "tilings": ("preset", "kind", "depth", "c_in", "c_out", "dtype"),
}
"""Fields that tell records of a part apart: a new one takes the place of the old one with the same values."""


@dataclass(frozen=True)
class Check:
    """One comparison with a reference.

    Attributes:
        name: what is compared.
        error: relative rms difference, or what the name says; ``None``: no number, as of NaN.
        bound: the largest error that passes.
        ok: it passes.
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
        rate: bytes read and written [GB/s]; operations [TFLOP/s].
        unit: of the rate.
        ms: median time.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: timed.
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
        mask: the file's name; ``all`` of ``dense``.
        size: of the image.
        batch: B.
        dtype: of features and weights; ``tf32``: float32 multiplied in TF32.
        mode: ``eager``, ``graph`` (one CUDA graph, its inputs copied in each time) or ``compiled`` (by torch.compile).
        sites: N of the whole batch.
        density: share of the pixels.
        ms: mask and features -> logits, plan included.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: timed.
        plan_ms: mask -> plan; eager only.
        forward_ms: features and plan -> logits; eager only.
        peak_mb: most memory beyond network and inputs [1e6 bytes].
        gmacs: 1e9 multiply-accumulates, as ``SparseUNet.macs`` counts them.
        operations_ms: floor of a forward by its operations, see ``benchmarks.gpu.layers``.
        bytes_ms: the same by its traffic.
        floor_ms: the larger one; the plan is not in it.
        difference: relative rms from the logits of ``triton``, eager, of the same dtype; ``None`` where there are none.
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
        engine: ``triton``; ``plain``: what one writes in torch, by way of all full-size logits.
        case: classes and sizes.
        dtype: of the coarse logits.
        mode: ``eager``, launch and allocation of the results included; ``graph``: many in one, so without.
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: timed.
        peak_mb: most memory beyond the coarse logits, results included [1e6 bytes].
        floor_ms: by its traffic: the coarse logits once, and 5 bytes a pixel.
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
    """Forward and backward in training mode, gradients cleared; plans are made before.

    Attributes:
        engine: ``triton`` or ``torch``.
        preset: name of the preset.
        mask: the file's name.
        dtype: ``bfloat16``: by autocast; else of everything.
        mode: ``eager``.
        sites: N.
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: timed.
        peak_mb: most memory beyond network, inputs and plans [1e6 bytes].
        floor_ms: three times that of the forward.
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
    """One convolution with the tiling of the fixed table, and with the best of some others.

    Attributes:
        preset: name of the preset.
        kind: see ``benchmarks.gpu.layers.Layer``.
        depth: likewise.
        rows: of the outputs.
        c_in: channels.
        c_out: channels.
        taps: of the weight.
        dtype: of features and weights.
        layers: of the network that are like this.
        own: tiling of the fixed table: rows x columns x depth, warps, blocks ahead.
        own_ms: with it.
        best: tiling of the least time.
        best_ms: with it.
        floor_ms: of this one convolution.
        others: all that were tried, and their times.
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
    """Records of one machine, in a file that is whole at any time.

    Args:
        path: of the file; ``None``: nothing is written.
        machine: what the records belong to.

    Raises:
        ValueError: the file is not one of these, or of another machine.
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
        """Records of a part."""
        found: list[dict[str, Any]] = self._content[part]
        return found

    def content(self) -> dict[str, Any]:
        """All, as it is in the file."""
        return self._content

    def add(self, part: str, records: Sequence[Any]) -> None:
        """Adds dataclasses of a part, in place of those with the same key, and writes the file."""
        new = [asdict(record) for record in records]
        replaced = {_key(part, record) for record in new}
        self._content[part] = [old for old in self.of(part) if _key(part, old) not in replaced] + new
        self._write()

    def leave_out(self, line: str) -> None:
        """What was not measured, and why."""
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
        ValueError: it is none.
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
    """A file's name from that of a GPU.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
