"""Milliseconds of stages, on CPU and GPU, measured without slowing what is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Times the stages of a run; on a GPU by events that are read only when somebody asks.

    Args:
        device: where the stages run; ``None``: no clock is read, as in a CUDA graph, which knows none.
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
