"""Times stages on CPU and GPU without slowing them down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def now_ms(device: torch.device) -> float:
    """The clock [ms], read once ``device`` has finished all work queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return 1e3 * time.perf_counter()


class StageTimer:
    """Times the stages of a run. On a GPU it records events and waits for them only in :meth:`milliseconds`.

    Args:
        device: where the stages run; ``None``: no timing, as when a CUDA graph is captured.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device, self._cuda = device, device is not None and device.type == "cuda"
        self._marks: dict[str, tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the body under ``name``."""
        if self._device is None:
            yield
        elif self._cuda:
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
