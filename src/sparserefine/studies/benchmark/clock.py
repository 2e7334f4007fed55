"""Rounds and peak memory of something that is run again and again."""

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
    """Something that is run again and again, and what is known of it."""

    def __init__(self, run: Callable[[], dict[str, float]]) -> None:
        self._run = run
        self.rounds: list[dict[str, float]] = []
        self.peak_mb = 0.0

    def watch_memory(
        self, device: torch.device, *, keeps: bool = False, clear: Callable[[], None] | None = None
    ) -> None:
        """One run that does not count, and one for the memory.

        Args:
            device: where it runs.
            keeps: what the first run leaves behind counts.
            clear: frees what the first run left behind, so that the second one needs it anew.
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
        """One that counts."""
        self.rounds.append(self._run())

    def median(self, key: str = "ms") -> float:
        """Median over the rounds [ms]."""
        return median(one[key] for one in self.rounds)


def trim() -> None:
    """Garbage, and free memory that the C library keeps for later, would hide what the next run needs."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # not the GNU C library
        ctypes.CDLL(None).malloctrim(0)
