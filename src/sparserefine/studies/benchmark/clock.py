"""Times and peak memory of a function over repeated runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from statistics import median

import psutil
import torch

from sparserefine.machine.memory import PeakMemory


class Clock:
    """Repeats one measurement and keeps its times and its peak memory.

    Args:
        run: runs once and returns its times [ms] by name.
    """

    def __init__(self, run: Callable[[], dict[str, float]]) -> None:
        self._run = run
        self.rounds: list[dict[str, float]] = []
        self.peak_mb = 0.0

    def watch_memory(
        self, device: torch.device, *, keeps: bool = False, clear: Callable[[], None] | None = None
    ) -> None:
        """Runs twice, untimed: once to warm up, once to measure the peak memory.

        Args:
            device: where ``run`` runs.
            keeps: whether memory that the first run leaves allocated counts too (CPU only).
            clear: frees what the first run left allocated, so that the second run allocates it again.
        """
        trim()
        process = psutil.Process()
        before = process.memory_info().rss
        self._run()
        if clear:
            clear()
        trim()
        kept = max(0, process.memory_info().rss - before) / 1e6 if keeps and device.type == "cpu" else 0.0
        with PeakMemory(device) as memory:
            self._run()
        self.peak_mb = memory.megabytes + kept

    def round(self) -> None:
        """Runs once and keeps the times."""
        self.rounds.append(self._run())

    def median(self, key: str = "ms") -> float:
        """Median over the rounds [ms]."""
        return median(one[key] for one in self.rounds)


def trim() -> None:
    """Frees garbage and the C library's spare memory, which the next run would reuse without growing the process."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
