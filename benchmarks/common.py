"""Shared parts of the benchmarks: worker processes, masks, the machine's description, tables.

Each engine runs in its own process, with its own peak memory and thread pool. All processes stay alive and run in turn,
round by round, so that a disturbance of the machine affects one round of every engine, not all rounds of one.

The interpreter that has spconv imports this file too. So it uses only the standard library, torch, numpy and Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MASKS = ROOT.parent / "shared" / "masks"
CORES = len(os.sched_getaffinity(0))


class Task(Protocol):
    """The code that one worker times. The constructor loads the inputs; memory in use after it does not count."""

    def start(self) -> None:
        """Runs once before all rounds, for example to pack weights."""

    def round(self) -> dict[str, float]:
        """Runs one round and returns its times [ms] by name."""

    def output(self) -> Any:
        """The tensors that the last round computed."""

    def details(self) -> dict[str, Any]:
        """Further fields of the record; called once, after the rounds."""


@dataclass(frozen=True)
class Job:
    """One engine's task.

    Attributes:
        task: ``module:Class`` of a :class:`Task`.
        setup: arguments of its constructor.
        python: the interpreter to run it with.
    """

    task: str
    setup: dict[str, Any]
    python: str = sys.executable


@dataclass(frozen=True)
class Measurement:
    """Results of one engine: times of its rounds, peak memory beyond its inputs [MB], details, output tensors."""

    rounds: list[dict[str, float]]
    peak_mb: float
    details: dict[str, Any]
    output: Any

    def median(self, key: str) -> float:
        """Median over the rounds."""
        return median(one[key] for one in self.rounds)


class WorkerError(RuntimeError):
    """A worker failed; the message says why, in one line."""


class Worker:
    """A process that holds one :class:`Task` and executes orders, sent to it as lines of JSON."""

    def __init__(self, job: Job, threads: int) -> None:
        module, name = job.task.split(":")
        code = f"from benchmarks.common import serve; from {module} import {name}; serve({name})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process runs)
        try:
            self._process = subprocess.Popen(
                [job.python, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=ROOT,
                env=_environment(threads),
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{job.python} does not start: {error.strerror}") from error
        try:
            self.ask("load", **job.setup)
        except WorkerError:
            self.close()
            raise

    def ask(self, order: str, **arguments: Any) -> dict[str, Any]:
        """Sends one order with its arguments and waits for the reply.

        Raises:
            WorkerError: the order failed or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._exit_message())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _exit_message(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"the worker ended with {code}: {lines[-1] if lines else 'it printed no error'}"

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()


def serve(make: Callable[..., Task]) -> None:
    """The worker's main loop: the first order makes the task; each order gets one reply."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries' output must not mix with the replies
    task: Task | None = None
    for line in sys.stdin:
        message = json.loads(line)
        order = message.pop("order")
        reply: dict[str, Any] = {}
        try:
            if task is None:
                task = make(**message)
                _reset_peak()
                loaded = _peak_mb()
            elif order == "start":
                task.start()
            elif order == "round":
                reply = task.round()
            elif order == "details":
                reply["peak_mb"] = _peak_mb() - loaded
                reply["details"] = task.details()
            elif order == "save":
                torch.save(task.output(), message["path"])
        except Exception as error:
            message_line = " ".join(str(error).split())
            named = message_line if isinstance(error, ValueError) else f"{type(error).__name__}: {message_line}"
            reply = {"error": named}
        print(json.dumps(reply), file=replies)


def measure(
    jobs: Mapping[str, Job], threads: int, rounds: int, left_out: dict[str, str], scratch: Path
) -> dict[str, Measurement]:
    """Runs several engines in turn, after one untimed round of each.

    An engine that fails before the timed rounds is left out, with a printed line that says why.

    Args:
        jobs: the task of each engine.
        threads: threads of each worker.
        rounds: number of timed rounds.
        left_out: engines that do not work here, and why. They are skipped; newly found ones are added.
        scratch: folder for temporary files.
    """
    results: dict[str, Measurement] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, job in jobs.items():
            if name in left_out:
                continue
            try:
                worker = Worker(job, threads)
                stack.callback(worker.close)
                worker.ask("start")
                worker.ask("round")
            except WorkerError as error:
                left_out[name] = str(error)
                print(f"engine {name} is left out: {error}", flush=True)
            else:
                workers[name] = worker
        timed: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                timed[name].append(worker.ask("round"))
        for name, worker in workers.items():
            more, path = worker.ask("details"), scratch / "output.pt"
            worker.ask("save", path=str(path))
            output = torch.load(path, weights_only=True)
            results[name] = Measurement(timed[name], more["peak_mb"], more["details"], output)
    return results


class Sgemm:
    """Multiplies 2048 x 2048 matrices, to measure the machine's peak rate of arithmetic."""

    _SIZE = 2048

    def __init__(self) -> None:
        self._a, self._b = torch.randn(2, self._SIZE, self._SIZE).unbind()
        self._c = torch.empty_like(self._a)

    def start(self) -> None:
        """Nothing to prepare."""

    def round(self) -> dict[str, float]:
        """One product [GFLOP/s]."""
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._c)
        return {"gflops": 2e-9 * self._SIZE**3 / (time.perf_counter() - start)}

    def output(self) -> Tensor:
        """The product."""
        return self._c

    def details(self) -> dict[str, Any]:
        """There are none."""
        return {}


def sgemm_gflops(threads: int) -> float:
    """Rate of the fastest of eight :class:`Sgemm` rounds [GFLOP/s]."""
    worker = Worker(Job("benchmarks.common:Sgemm", {}), threads)
    try:
        return max(worker.ask("round")["gflops"] for _ in range(8))
    finally:
        worker.close()


def _environment(threads: int) -> dict[str, str]:
    """Environment of a worker: number of threads; with one thread per core, each is bound to its core."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads == CORES:
        variables |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    return variables


def _reset_peak() -> None:
    """Resets the peak memory, which loading may have raised. Where that is not possible, small peaks read as 0."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_mb() -> float:
    """Peak memory of this process [MB = 1e6 bytes]. Not ``ru_maxrss``, which starts at the parent's value."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024e-6 for line in lines if line.startswith("VmHWM"))


def read_mask(path: str) -> Tensor:
    """Reads a mask image: ``bool [H, W]``, true where it is not black."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"))) > 0


def find_mask(name: str) -> Path:
    """Path of a mask, given as a PNG file or as a name in :data:`MASKS`.

    Raises:
        ValueError: there is no such file or name.
    """
    path = Path(name) if name.endswith(".png") else MASKS / f"{name}.png"
    if path.is_file():
        return path.absolute()
    known = sorted(mask.stem for mask in MASKS.glob("*.png"))
    if not known:
        raise ValueError(f"mask {name!r} is not found; ../shared/masks is not there: pass --masks FILE.png[,FILE.png]")
    raise ValueError(f"mask {name!r} is not found; choose from {', '.join(known)}, or pass a PNG file")


def site_features(sites: int, channels: int) -> Tensor:
    """Random features ``[N, C]``, the same in every worker."""
    return torch.randn(sites, channels, generator=torch.Generator().manual_seed(1))


def machine() -> str:
    """Processor, instruction set used by torch, cores, torch's version."""
    name = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {CORES} cores, torch {torch.__version__}"


class Renamed(argparse.Action):
    """An option that was renamed; ``const`` is its new name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Exits with a line that states the new name."""
        sys.exit(f"error: option {option_string} is called {self.const} now")


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """Parts of a comma-separated option.

    Args:
        text: the option's value.
        known: the valid parts.
        what: what a part is called in error messages.

    Raises:
        ValueError: a part is not one of ``known``, or there are none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known; choose from {', '.join(known)}")
    if not names:
        raise ValueError(f"no {what} is chosen; choose from {', '.join(known)}")
    return names


def chosen_threads(text: str) -> list[int]:
    """Numbers of threads from a comma-separated option, each at most the number of cores."""
    return [int(name) for name in chosen(text, [str(count) for count in range(1, CORES + 1)], "number of threads")]


def default_threads() -> str:
    """One and two threads, or one if there is only one core."""
    return "1,2" if CORES > 1 else "1"


def check_run(rounds: int, report: Path | None) -> None:
    """Checks before a long run what would otherwise fail at its end.

    Raises:
        ValueError: fewer than one round, or the report's folder does not exist.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}, expected at least 1")
    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"{report}: its folder does not exist; make it first")


def write_report(path: Path | None, records: Sequence[Any]) -> None:
    """Writes records (dataclasses) as a JSON list; no ``path``: does nothing."""
    if path is not None:
        rows = [asdict(record) for record in records]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def number(value: float | None, form: str = ".0f", unit: str = "") -> str:
    """A cell of a table; ``-`` if there is no value."""
    return "-" if value is None else f"{value:{form}}{unit}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints aligned columns: the first two left-aligned, the others, numbers, right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)
