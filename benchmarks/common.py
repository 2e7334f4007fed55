"""What the benchmarks share: workers asked in turn, masks, the machine, tables.

Every engine runs in a process of its own, which stays alive while the others have their turns: its peak memory is its
own, its thread pool too, and a disturbance of the machine hits one round of every engine instead of all rounds of one.
Imported by the interpreter of spconv too, so nothing but the standard library, torch, numpy and Pillow is needed here.
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
    """What one worker times. The constructor loads inputs; memory that is in use after it does not count as peak."""

    def start(self) -> None:
        """What is done once for all rounds: packing of weights."""

    def round(self) -> dict[str, float]:
        """One timed round, in milliseconds."""

    def output(self) -> Any:
        """Tensors that the last round computed."""

    def details(self) -> dict[str, Any]:
        """What else is worth a field in the record; called once, after the rounds."""


@dataclass(frozen=True)
class Job:
    """One engine's task.

    Attributes:
        task: ``module:Class`` of a :class:`Task`.
        setup: what its constructor takes.
        python: the interpreter.
    """

    task: str
    setup: dict[str, Any]
    python: str = sys.executable


@dataclass(frozen=True)
class Measurement:
    """Rounds of one engine, its peak memory beyond its inputs [MB], its details and what it computed."""

    rounds: list[dict[str, float]]
    peak_mb: float
    details: dict[str, Any]
    output: Any

    def median(self, key: str) -> float:
        """Median over the rounds."""
        return median(one[key] for one in self.rounds)


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message says why, in one line."""


class Worker:
    """A process that holds one :class:`Task` and does what it is told by JSON lines; idle, it waits for the next."""

    def __init__(self, job: Job, threads: int) -> None:
        module, name = job.task.split(":")
        code = f"from benchmarks.common import serve; from {module} import {name}; serve({name})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
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
        """Sends one order and waits for its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"the worker ended with {code}: {lines[-1] if lines else 'it said nothing'}"

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()


def serve(make: Callable[..., Task]) -> None:
    """The worker's side: a task made by the first order, then one reply for each order."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not end up among the replies
    task: Task | None = None
    for line in sys.stdin:
        message = json.loads(line)
        order = message.pop("order")
        reply: dict[str, Any] = {}
        try:
            if task is None:
                task = make(**message)
                _forget_high_water()
                loaded = _high_water_mb()
            elif order == "start":
                task.start()
            elif order == "round":
                reply = task.round()
            elif order == "details":
                reply["peak_mb"] = _high_water_mb() - loaded
                reply["details"] = task.details()
            elif order == "save":
                torch.save(task.output(), message["path"])
        except Exception as error:
            words = " ".join(str(error).split())
            reply = {"error": words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"}
        print(json.dumps(reply), file=replies)


def measure(
    jobs: Mapping[str, Job], threads: int, rounds: int, left_out: dict[str, str], scratch: Path
) -> dict[str, Measurement]:
    """Rounds of several engines in turn, after one round of each that does not count.

    Args:
        jobs: for each engine its task.
        threads: of each worker.
        rounds: timed rounds.
        left_out: engines that do not work here and why; they are not tried again, and new ones are added and printed.
        scratch: folder for the outputs.
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
    """Multiplies 2048 x 2048 matrices: what this machine's arithmetic gives at best."""

    _SIZE = 2048

    def __init__(self) -> None:
        self._a, self._b = torch.randn(2, self._SIZE, self._SIZE).unbind()
        self._c = torch.empty_like(self._a)

    def start(self) -> None:
        """Nothing is to be packed."""

    def round(self) -> dict[str, float]:
        """One product [GFLOP/s]."""
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._c)
        return {"gflops": 2e-9 * self._SIZE**3 / (time.perf_counter() - start)}

    def output(self) -> Tensor:
        """The product."""
        return self._c

    def details(self) -> dict[str, Any]:
        """None."""
        return {}


def sgemm_gflops(threads: int) -> float:
    """Best of eight :class:`Sgemm` rounds."""
    worker = Worker(Job("benchmarks.common:Sgemm", {}), threads)
    try:
        return max(worker.ask("round")["gflops"] for _ in range(8))
    finally:
        worker.close()


def _environment(threads: int) -> dict[str, str]:
    """Threads from the start; all cores in use are bound, so that no two threads share one."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if threads == CORES:
        variables |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    return variables


def _forget_high_water() -> None:
    """Loading may have needed more than what it left; where that cannot be forgotten, small peaks read as 0."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _high_water_mb() -> float:
    """Most memory that this process ever had [MB = 1e6 bytes]. Not ``ru_maxrss``, which starts at the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024e-6 for line in lines if line.startswith("VmHWM"))


def read_mask(path: str) -> Tensor:
    """``bool [H, W]``, true where the picture is not black."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"))) > 0


def find_mask(name: str) -> Path:
    """A PNG file, or one of :data:`MASKS` by name."""
    path = Path(name) if name.endswith(".png") else MASKS / f"{name}.png"
    if path.is_file():
        return path.absolute()
    known = sorted(mask.stem for mask in MASKS.glob("*.png"))
    if not known:
        raise ValueError(f"mask {name!r} is not found; ../shared/masks is not there: pass --masks FILE.png[,FILE.png]")
    raise ValueError(f"mask {name!r} is not found; choose from {', '.join(known)}, or pass a PNG file")


def site_features(sites: int, channels: int) -> Tensor:
    """The same random ``[N, C]`` in every worker."""
    return torch.randn(sites, channels, generator=torch.Generator().manual_seed(1))


def machine() -> str:
    """Processor, the widest instructions torch uses on it, cores, torch's version."""
    name = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {CORES} cores, torch {torch.__version__}"


class Renamed(argparse.Action):
    """An option that has another name now, which is its ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Ends the program with a line that says so."""
        sys.exit(f"error: option {option_string} is called {self.const} now")


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """Parts of a comma-separated option, each one of ``known``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known; choose from {', '.join(known)}")
    if not names:
        raise ValueError(f"no {what} is chosen; choose from {', '.join(known)}")
    return names


def chosen_threads(text: str) -> list[int]:
    """Numbers of threads, none more than there are cores."""
    return [int(name) for name in chosen(text, [str(count) for count in range(1, CORES + 1)], "number of threads")]


def default_threads() -> str:
    """One and two threads, as far as there are cores."""
    return "1,2" if CORES > 1 else "1"


def check_run(rounds: int, report: Path | None) -> None:
    """Refuses before a long run what would fail after it."""
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}, expected at least 1")
    if report is not None and not report.absolute().parent.is_dir():
        raise ValueError(f"{report}: its folder does not exist; make it first")


def write_report(path: Path | None, records: Sequence[Any]) -> None:
    """Records (dataclasses) as a JSON list."""
    if path is not None:
        rows = [asdict(record) for record in records]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def number(value: float | None, form: str = ".0f", unit: str = "") -> str:
    """A table's cell; ``-`` where there is no value."""
    return "-" if value is None else f"{value:{form}}{unit}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, words left and numbers right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in (header, *rows):
        cells = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)
