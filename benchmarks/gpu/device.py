"""Timing on a GPU: events, graphs, precisions. A rehearsal runs the same steps on the CPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

from sparserefine.machine.memory import PeakMemory

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
"""Number types by name; ``tf32`` and ``float32`` are two ways to multiply float32 numbers."""
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

_WARM_UP = 3  # runs before a recording: kernels get compiled and libraries allocate their workspaces


@dataclass(frozen=True)
class Spread:
    """Times of one measurement.

    Attributes:
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: number of timed runs.
    """

    ms: float
    low_ms: float
    high_ms: float
    repetitions: int

    @classmethod
    def of(cls, laps: list[float]) -> Spread:
        """Summarises times [ms]."""
        tenths = quantiles(laps, n=10, method="inclusive") if len(laps) > 1 else laps
        return cls(median(laps), tenths[0], tenths[-1], len(laps))


class Device(Protocol):
    """Where everything runs, and how it is timed.

    Attributes:
        device: the torch device.
        rehearsal: whether times mean nothing.
        cache_bytes: size of the L2 cache [bytes].
    """

    device: torch.device
    rehearsal: bool
    cache_bytes: int

    def laps(self, run: Callable[[int], object], count: int) -> list[float]:
        """Times [ms] of ``run(0)``, ..., ``run(count - 1)``, one after the other."""

    def repetitions(self, ms: float) -> int:
        """How often to time something that takes ``ms``."""

    def wait(self) -> None:
        """Waits until all queued work is done."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Records ``step``, which must not wait for the device; returns its replay, which reuses its memory."""

    def machine(self) -> dict[str, str]:
        """Description of the machine that results belong to."""


class Gpu:
    """The current CUDA device.

    Raises:
        ValueError: there is none, or TRITON_INTERPRET is set.
    """

    rehearsal = False

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA GPU here; `--rehearse` runs the same steps on the CPU, without figures")
        from sparserefine.engines.triton.launch import INTERPRETED

        if INTERPRETED:
            raise ValueError("TRITON_INTERPRET=1 is set, so kernels would run on the CPU; unset it")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = int(getattr(self._properties, "L2_cache_size", 64 << 20))

    def laps(self, run: Callable[[int], object], count: int) -> list[float]:
        """Times with events; the host waits only where ``run`` itself does."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]  # type: ignore[no-untyped-call]
        self.wait()
        for i, (start, end) in enumerate(events):
            start.record()
            run(i)
            end.record()
        self.wait()
        return [start.elapsed_time(end) for start, end in events]

    def repetitions(self, ms: float) -> int:
        """30 to 100; fewer if one run takes more than 100 ms."""
        return min(100, max(30, int(300 / max(ms, 1e-3)))) if ms <= 100 else max(5, int(3000 / ms))

    def wait(self) -> None:
        """Waits for all streams."""
        torch.cuda.synchronize(self.device)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Captures ``step`` as a CUDA graph."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return graph.replay

    def machine(self) -> dict[str, str]:
        """GPU, driver and libraries."""
        import triton

        properties = self._properties
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 1e9:.0f} GB",
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "torch": str(torch.__version__),
            "triton": str(triton.__version__),
        }


class Rehearsal:
    """The CPU, with interpreted kernels: every step runs once, and times mean nothing.

    Raises:
        ValueError: TRITON_INTERPRET is not set.
    """

    rehearsal = True
    cache_bytes = 0

    def __init__(self) -> None:
        from sparserefine.engines.triton.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError("a rehearsal needs TRITON_INTERPRET=1 in the environment, so that kernels run on the CPU")
        self.device = torch.device("cpu")

    def laps(self, run: Callable[[int], object], count: int) -> list[float]:
        """Times with the host's clock."""
        found = []
        for i in range(count):
            start = time.perf_counter()
            run(i)
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def repetitions(self, ms: float) -> int:
        """One."""
        return 1

    def wait(self) -> None:
        """Does nothing: the CPU queues no work."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Runs ``step`` once; its replay is ``step`` itself."""
        step()
        return step

    def machine(self) -> dict[str, str]:
        """Marks results as a rehearsal's."""
        return {"gpu": "rehearsal", "torch": str(torch.__version__)}


def timed(device: Device, run: Callable[[int], object], sets: int) -> Spread:
    """Times ``run(i % sets)`` for i = 0, 1, ..., after warm-up runs with every set of inputs."""

    def rotated(i: int) -> object:
        return run(i % sets)

    if device.rehearsal:
        return Spread.of(device.laps(rotated, 1))
    for i in range(sets):
        run(i)
    (once,) = device.laps(rotated, 1)
    count = device.repetitions(once)
    device.laps(rotated, min(count, max(_WARM_UP, int(100 / max(once, 1e-3)))))
    return Spread.of(device.laps(rotated, count))


def timed_in_graph(device: Device, run: Callable[[int], object], sets: int) -> Spread:
    """Like :func:`timed`, for work shorter than its launch: the average of many runs in one graph."""
    count = 1 if device.rehearsal else sets * -(-12 // sets)

    def step() -> None:
        for i in range(count):
            run(i % sets)

    replay = device.record(step)
    whole = timed(device, lambda i: replay(), 1)
    return Spread(whole.ms / count, whole.low_ms / count, whole.high_ms / count, whole.repetitions)


def peak_mb(device: Device, run: Callable[[], object]) -> float:
    """Peak memory of ``run``, beyond what was in use before [1e6 bytes]."""
    device.wait()
    with PeakMemory(device.device) as memory:
        run()
        device.wait()
    return memory.megabytes


@contextmanager
def precision(dtype: str) -> Iterator[torch.dtype]:
    """Context in which float32 products use TF32 only if ``dtype`` is ``tf32``; yields the torch dtype."""
    fast = dtype == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        yield DTYPES[dtype]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        if lines:
            return lines[0]
    return "unknown"
