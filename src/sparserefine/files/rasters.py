"""Reads rasters that Pillow does not: any bands and depth, through rasterio, which is loaded when it is needed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparserefine.files.claims import ClaimError

_opening = threading.Lock()
"""Warnings are filtered while a file is opened, and the filters are global."""

_ALONE = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
"""Options of GDAL: files beside the image count for nothing, such as a mask, whatever they are."""


def have_rasters() -> bool:
    """Whether rasterio is installed."""
    return find_spec("rasterio") is not None


def read_raster(
    path: Path, driver: Literal["GTiff", "PNG"], bands: Sequence[int] | None, described: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads bands as they are stored.

    Args:
        path: the file.
        driver: what it is.
        bands: counted from 1; ``None``: all.
        described: what the file holds, for the message if rasterio is missing.

    Returns:
        ``[C, H, W]`` in the file's dtype, and the mask that the file itself has; see :func:`read_mask`.

    Raises:
        ClaimError: rasterio is missing, or the file is damaged.
    """
    with _opened(path, driver, described) as dataset:
        return dataset.read(None if bands is None else list(bands)), _mask(dataset)


def read_mask(path: Path) -> np.ndarray | None:
    """The mask of a TIFF, ``bool [H, W]``, false where there is no data; ``None``: it has none.

    Raises:
        ClaimError: as for :func:`read_raster`.
    """
    with _opened(path, "GTiff", "a mask") as dataset:
        return _mask(dataset)


@contextmanager
def _opened(path: Path, driver: str, described: str) -> Iterator[Any]:
    try:
        import rasterio
    except ImportError as error:
        raise ClaimError(
            f"{described}, which Pillow does not read; rasterio does: pip install sparserefine[raster]"
        ) from error
    try:
        with rasterio.Env(**_ALONE):
            with _opening, warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                # Only what it is: some drivers of GDAL follow the names of files, and addresses, in what they read.
                dataset = rasterio.open(path.absolute(), driver=driver)
            with dataset:
                yield dataset
    except rasterio.errors.RasterioError as error:
        raise ClaimError(f"not a readable image, or cut short ({error}); check the file") from error


def _mask(dataset: Any) -> np.ndarray | None:
    flags = {flag.name for flag in dataset.mask_flag_enums[0]}
    return dataset.read_masks(1) > 0 if "per_dataset" in flags and "alpha" not in flags else None
