"""Peak memory, on CPU and GPU; memory that is free but kept."""

from __future__ import annotations

import ctypes
import sys
import threading

import psutil
import torch


class PeakMemory:
    """Context manager that measures the peak memory of its body, beyond what was in use before.

    Read ``megabytes`` [1e6 bytes] after the body. On a GPU it is torch's own peak; elsewhere it is the resident size of
    the process, sampled every 2 ms.
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


def give_back_free_memory() -> bool:
    """Gives memory that is free, but that the C library keeps, back to the system; ``False`` if it cannot (not glibc).

    Tensors of ever new sizes, as there are with every new set of sites, leave gaps that no later one fits: within an
    hour, training took three times the memory in use. It takes about 0.1 s for a gigabyte.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # another C library
        return False
    trim(0)
    return True
