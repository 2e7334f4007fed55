"""Times labels and entropy at full size: plain torch against the engines. See benchmarks/README.md.

python -m benchmarks.uncertainty --json runs/uncertainty.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    Job,
    Measurement,
    WorkerError,
    check_run,
    chosen,
    chosen_threads,
    default_threads,
    machine,
    measure,
    number,
    print_table,
    write_report,
)
from sparserefine.engines.choose import get_engine
from sparserefine.images.coarse import Coarse

ENGINES = ("plain", "torch", "cpu")


@dataclass(frozen=True)
class Case:
    """K, height and width of the coarse logits, full height and width [px]."""

    classes: int
    coarse: tuple[int, int]
    full: tuple[int, int]


CASES = {
    "street": Case(19, (256, 512), (1024, 2048)),
    "eye": Case(2, (584, 876), (2336, 3504)),
    "tiny": Case(5, (16, 24), (64, 96)),
}
"""``tiny`` is for tests of the benchmark."""


@dataclass(frozen=True)
class Record:
    """One row of the table.

    Attributes:
        engine: name of the engine; ``plain`` is ordinary torch code without this package.
        case: name of the :class:`Case`.
        threads: threads of the worker.
        ms: median over the rounds.
        ratio: how many times faster than ``plain``; ``None`` if that was not run.
        peak_mb: peak memory beyond the coarse logits [MB], results included.
        labels_agree: share of pixels with the same label as ``plain``.
        entropy_difference: largest absolute difference from the entropy of ``plain`` [nats].
        machine: processor and torch's version.
    """

    engine: str
    case: str
    threads: int
    ms: float
    ratio: float | None
    peak_mb: float
    labels_agree: float | None
    entropy_difference: float | None
    machine: str


class UncertaintyTask:
    """Times one engine on random smooth logits."""

    def __init__(self, engine: str, case: str) -> None:
        self._compute = _function(engine)
        self._size = CASES[case].full
        self._logits = _smooth_logits(CASES[case])

    def start(self) -> None:
        """Nothing to prepare."""

    def round(self) -> dict[str, float]:
        """Computes labels and entropy once."""
        self._result: tuple[Tensor, Tensor] | None = None
        with torch.inference_mode():
            start = time.perf_counter()
            self._result = self._compute(self._logits, self._size)
            return {"ms": 1e3 * (time.perf_counter() - start)}

    def output(self) -> tuple[Tensor, Tensor] | None:
        """Labels and entropy of the last round."""
        return self._result

    def details(self) -> dict[str, Any]:
        """There are none."""
        return {}


def plain(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Labels and entropy ``[B, H, W]`` in ordinary torch code, through full-size logits ``[B, K, H, W]``."""
    upsampled = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    entropy = torch.special.entr(upsampled.softmax(1)).sum(1)
    return upsampled.argmax(1), entropy


def _function(engine: str) -> Callable[[Tensor, tuple[int, int]], tuple[Tensor, Tensor]]:
    if engine == "plain":
        return plain
    chosen_engine = get_engine(engine)
    return lambda logits, size: chosen_engine.uncertainty(Coarse(logits, size))


def _smooth_logits(case: Case) -> Tensor:
    """Logits ``[1, K, h, w]`` with blobs of about 8 coarse pixels; most pixels are certain."""
    height, width = case.coarse
    noise = torch.randn(1, case.classes, height // 8, width // 8, generator=torch.Generator().manual_seed(2))
    return F.interpolate(4 * noise, case.coarse, mode="bicubic")


def _case_records(case: str, options: Options, left_out: dict[str, str], scratch: Path) -> list[Record]:
    records = []
    for threads in options.threads:
        jobs = {
            name: Job("benchmarks.uncertainty:UncertaintyTask", {"engine": name, "case": case})
            for name in options.engines
        }
        found = measure(jobs, threads, options.rounds, left_out, scratch)
        peer = found.get("plain")
        records += [_record(engine, case, threads, measured, peer) for engine, measured in found.items()]
    if not records:
        raise WorkerError("no engine works here; the lines above say why")
    return records


def _record(engine: str, case: str, threads: int, measured: Measurement, peer: Measurement | None) -> Record:
    ratio = agree = difference = None
    ms = measured.median("ms")
    if peer is not None:
        ratio = peer.median("ms") / ms
        labels, entropy = measured.output
        peer_labels, peer_entropy = peer.output
        agree = float((labels == peer_labels).float().mean(dtype=torch.float64))
        difference = float((entropy - peer_entropy).abs().max())
    return Record(engine, case, threads, ms, ratio, measured.peak_mb, agree, difference, machine())


def _print_records(case: str, records: Sequence[Record]) -> None:
    rows = [
        (
            r.engine,
            str(r.threads),
            number(r.ms, ".1f"),
            number(r.ratio, ".2f", "x"),
            number(r.peak_mb),
            number(r.labels_agree and 100 * r.labels_agree, ".4f", " %"),
            number(r.entropy_difference, ".1e"),
        )
        for r in records
    ]
    (h, w), (height, width) = CASES[case].coarse, CASES[case].full
    header = ("engine", "threads", "ms", "vs plain", "peak MB", "same labels", "entropy difference, nats")
    print_table(f"{case}: {CASES[case].classes} classes, {h}x{w} -> {height}x{width}", header, rows)


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    cases: list[str]
    threads: list[int]
    engines: list[str]
    rounds: int
    report: Path | None


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uncertainty", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the records to this JSON file")
    parser.add_argument(
        "--cases", default="street,eye", help=f"comma-separated, of {', '.join(CASES)}; default: %(default)s"
    )
    parser.add_argument(
        "--threads", default=default_threads(), help="numbers of threads, comma-separated; default: %(default)s"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each engine; default: %(default)s")
    given = parser.parse_args(arguments)
    check_run(given.rounds, given.json)
    return Options(
        chosen(given.cases, tuple(CASES), "case"),
        chosen_threads(given.threads),
        chosen(given.engines, ENGINES, "engine"),
        given.rounds,
        given.json,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = _options(arguments)
        print(machine())
        records: list[Record] = []
        left_out: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for case in options.cases:
                new = _case_records(case, options, left_out, Path(scratch))
                _print_records(case, new)
                records += new
                write_report(options.report, records)
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
