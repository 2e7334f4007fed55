"""What times on a GPU: events, graphs, precisions. A rehearsal does the same steps on the CPU."""

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
"""What is computed in, by name; ``tf32`` and ``float32`` are the two ways to multiply float32."""
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

_WARM_UP = 3  # runs before a recording: kernels are compiled, and libraries take the memory that they keep


@dataclass(frozen=True)
class Spread:
    """Times of one thing.

    Attributes:
        ms: median.
        low_ms: 10th percentile.
        high_ms: 90th percentile.
        repetitions: how many.
    """

    ms: float
    low_ms: float
    high_ms: float
    repetitions: int

    @classmethod
    def of(cls, laps: list[float]) -> Spread:
        """Of these times [ms]."""
        tenths = quantiles(laps, n=10, method="inclusive") if len(laps) > 1 else laps
        return cls(median(laps), tenths[0], tenths[-1], len(laps))


class Device(Protocol):
    """Where everything runs, and how it is timed there."""

    device: torch.device
    rehearsal: bool
    cache_bytes: int

    def laps(self, run: Callable[[int], object], count: int) -> list[float]:
        """Milliseconds of ``run(0)``, ``run(1)``, ..., one after the other."""

    def repetitions(self, ms: float) -> int:
        """How often something that takes so long is timed."""

    def wait(self) -> None:
        """Until all that was asked for is done."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """A replay of ``step``, which only launches and allocates; what it assigns stays in place."""

    def machine(self) -> dict[str, str]:
        """What a result belongs to."""


class Gpu:
    """The current CUDA device.

    Raises:
        ValueError: there is none, or kernels would not run on it.
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
        """By events; the host does not wait in between, but where ``run`` does."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]  # type: ignore[no-untyped-call]
        self.wait()
        for i, (start, end) in enumerate(events):
            start.record()
            run(i)
            end.record()
        self.wait()
        return [start.elapsed_time(end) for start, end in events]

    def repetitions(self, ms: float) -> int:
        """30 to 100; fewer of what takes more than 100 ms."""
        return min(100, max(30, int(300 / max(ms, 1e-3)))) if ms <= 100 else max(5, int(3000 / ms))

    def wait(self) -> None:
        """For all streams."""
        torch.cuda.synchronize(self.device)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph."""
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
    """The CPU, with kernels interpreted: every step once, and times that mean nothing.

    Raises:
        ValueError: kernels would not be interpreted.
    """

    rehearsal = True
    cache_bytes = 0

    def __init__(self) -> None:
        from sparserefine.engines.triton.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError("a rehearsal needs TRITON_INTERPRET=1 in the environment, so that kernels run on the CPU")
        self.device = torch.device("cpu")

    def laps(self, run: Callable[[int], object], count: int) -> list[float]:
        """By the clock."""
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
        """Nothing is under way."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself."""
        step()
        return step

    def machine(self) -> dict[str, str]:
        """None."""
        return {"gpu": "rehearsal", "torch": str(torch.__version__)}


def timed(device: Device, run: Callable[[int], object], sets: int) -> Spread:
    """Times ``run(i % sets)`` after a run with each of the sets of inputs and some more."""

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
    """As :func:`timed`, for what is so short that launching it takes longer: many in one graph, and their average."""
    count = 1 if device.rehearsal else sets * -(-12 // sets)

    def step() -> None:
        for i in range(count):
            run(i % sets)

    replay = device.record(step)
    whole = timed(device, lambda i: replay(), 1)
    return Spread(whole.ms / count, whole.low_ms / count, whole.high_ms / count, whole.repetitions)


def peak_mb(device: Device, run: Callable[[], object]) -> float:
    """Most memory beyond what was in use before [1e6 bytes]."""
    device.wait()
    with PeakMemory(device.device) as memory:
        run()
        device.wait()
    return memory.megabytes


@contextmanager
def precision(dtype: str) -> Iterator[torch.dtype]:
    """Products of float32 as ``dtype`` has them, one of :data:`DTYPES`, for engines and for torch's own."""
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
