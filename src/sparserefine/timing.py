"""Milliseconds of stages and peak memory, on CPU and GPU, measured without slowing what is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class StageTimer:
    """Times the stages of a run; on a GPU by events that are read only when somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: dict[str, tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the body under ``name``."""
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(self._device)
            first.record(stream)
            yield
            last.record(stream)
            self._marks[name] = (first, last)
        else:
            start = time.perf_counter()
            yield
            self._marks[name] = (start, time.perf_counter())

    def milliseconds(self) -> dict[str, float]:
        """Duration of each stage [ms], in order; waits for a GPU to finish."""
        result = {}
        for name, (first, last) in self._marks.items():
            if isinstance(first, float):
                result[name] = 1e3 * (last - first)  # type: ignore[operator]
            else:
                last.synchronize()  # type: ignore[union-attr]
                result[name] = first.elapsed_time(last)  # type: ignore[arg-type]
        return result


class PeakMemory:
    """Most memory that the body of a ``with`` used beyond what was in use before [MB = 1e6 bytes].

    On a GPU torch's own high-water mark; otherwise the resident size of the process, sampled every 2 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.megabytes = 0.0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._process = psutil.Process()
            self._before = self._peak = self._process.memory_info().rss
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._thread.join()
            peak = max(self._peak, self._process.memory_info().rss)
        self.megabytes = (peak - self._before) / 1e6
