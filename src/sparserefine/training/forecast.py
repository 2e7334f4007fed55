"""Forecast: what a long computation over images will take, told after the first image."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import psutil
from tqdm import tqdm

from sparserefine.files.text import printable


class Forecast:
    """Tells bytes and minutes for all images, as if they were like the first one.

    Args:
        what: what is computed.
        images: number of images to compute.
        folder: where results are stored; default: they stay in memory.
    """

    def __init__(self, what: str, images: int, folder: Path | None = None) -> None:
        self._what, self._images, self._folder, self._told = what, images, folder, False

    def after(self, nbytes: int, seconds: float) -> None:
        """After each image: the size of its result and the time it took. Only the first is told."""
        if self._told:
            return
        self._told = True
        needed, minutes = nbytes * self._images, seconds * self._images / 60
        where = "memory" if self._folder is None else str(self._folder)
        of = psutil.virtual_memory().available if self._folder is None else shutil.disk_usage(self._folder).free
        count = f"{self._images} image{'s' if self._images > 1 else ''}"
        line = f"{self._what}, {count}: {_size(needed)} in {where}, about {minutes:.1f} minutes"
        if needed > of + nbytes:
            line += f"; WARNING: only {_size(of)} are free there"
        tqdm.write(printable(line), file=sys.stderr)


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
