"""What image files store, as arrays of bands, and where they have no data."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from sparserefine.files.image_config import ImageConfig
from sparserefine.files.ranges import RangeError
from sparserefine.files.rasters import have_rasters, read_mask, read_raster
from sparserefine.files.text import printable
from sparserefine.files.tiff import BandsError, Tiff, check_transparency

_log = logging.getLogger(__name__)
_DARK = 2**14
"""A 16-bit image of lower values only has a range of its own, of 12 bits or so: it would be read nearly black."""
_RASTERIO = "rasterio does: pip install sparserefine[raster]"
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class Samples:
    """What a file stores.

    Attributes:
        values: ``[C, H, W]``, or ``[1, H, W]`` of a grey picture.
        valid: ``bool [H, W]``, false where there is no data; ``None``: nowhere.
        halved: whether the values are the higher 8 of 16 bits.
    """

    values: np.ndarray
    valid: np.ndarray | None
    halved: bool = False


def from_raster(
    path: Path,
    driver: Literal["GTiff", "PNG"],
    described: str,
    nodata: float | None,
    orientation: int,
    config: ImageConfig,
) -> Samples:
    """The bands that are asked for, all bits of them; see :func:`read_raster`.

    Args:
        path: the file.
        driver: what it is.
        described: what it holds, for messages.
        nodata: the file's own value of pixels without data.
        orientation: how the file is to be turned, as EXIF counts it.
        config: bands, nodata, EXIF.
    """
    values, valid = read_raster(path, driver, config.bands, described)
    valid = _with_data(values, valid, nodata if config.nodata is None else config.nodata)
    if config.exif != "ignore":
        values, valid = _turned(values, orientation), None if valid is None else _turned(valid, orientation)
    return Samples(values, valid)


def from_picture(image: Image.Image, path: Path, tiff: Tiff | None, config: ImageConfig) -> Samples | None:
    """The bands that are asked for, or what a viewer shows: grey, or red, green and blue.

    Args:
        image: the image, decoded and turned.
        path: its file.
        tiff: its header, if it is a TIFF.
        config: bands, range, nodata.

    Returns:
        ``None``: a PNG of which more bits count than Pillow reads.

    Raises:
        BandsError: it has not the bands that are asked for, or its fourth one is no transparency.
        RangeError: more of its bits count than are read.
    """
    # Of colours, Pillow reads 8 bits.
    bits = 8 if image.mode.startswith("I") or image.mode == "F" else bits_of(path) if tiff is None else tiff.bits
    if bits > 8 and (config.range is not None or config.bands is not None):
        if config.bands is None and image.mode in _WITH_ALPHA:
            raise BandsError(f"{image.mode} of {bits} bits; say which bands to read, such as images.bands: [1, 2, 3]")
        if tiff is not None or not _is_png(path):
            raise RangeError(f"colours of {bits} bits, of which 8 are read; convert it to a TIFF of bands")
        return None
    alpha = image.getchannel("A") if config.bands is None and image.mode in ("LA", "PA", "RGBA") else None
    if alpha is not None and tiff is not None:
        check_transparency(np.asarray(alpha), tiff)
    nodata = config.nodata if config.nodata is not None or tiff is None else tiff.nodata
    valid = None if tiff is None or not tiff.masked else _own_mask(path, tiff, config)
    if nodata is not None and bits > 8:  # the value cannot be told by its higher 8 bits
        tell_once("nodata", f"{printable(path)}: nodata {nodata:g} is not looked for; {_RASTERIO}")
    elif nodata is not None:
        valid = _with_data(_planes(image, None if image.mode in ("P", "PA") else config.bands), valid, nodata)
    if config.bands is not None:
        return Samples(_planes(image, config.bands), valid)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)[None]
        if tiff is not None and tiff.depth == "uint32":  # Pillow has no such type
            values = values.view(np.uint32)
        valid = _with_data(values, valid, None)
        if tiff is not None and tiff.white_is_zero and tiff.depth == "uint16":  # Pillow inverts 8 bits only
            values = 65535 - values
        return Samples(values, valid)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode in ("1", "L"):
        return Samples(np.asarray(image.convert("L"))[None], valid)
    return Samples(np.array(image.convert("RGB")).transpose(2, 0, 1), valid, bits > 8)


def _own_mask(path: Path, tiff: Tiff, config: ImageConfig) -> np.ndarray | None:
    """The mask in a file, which Pillow does not read, turned as the picture is."""
    if not have_rasters():
        tell_once(
            "mask",
            f"{printable(path)}: has a mask of the pixels with data, which is not read; {_RASTERIO}",
        )
        return None
    mask = read_mask(path)
    if mask is None or mask.all():
        return None
    return mask if config.exif == "ignore" else _turned(mask, tiff.orientation)


def _planes(image: Image.Image, bands: Sequence[int] | None) -> np.ndarray:
    """Bands as they are stored, ``[C, H, W]``; ``None``: all that are not transparency, and numbers of colours."""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA") and bands is not None:
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if bands is None:
        return values[:-1] if image.mode in _WITH_ALPHA else values
    if max(bands) > len(values):
        raise BandsError(f"images.bands asks for band {max(bands)}, the file has {len(values)} ({image.mode})")
    return values[[band - 1 for band in bands]]


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x89PNG"


def bits_of(path: Path) -> int:
    """Bits of a sample in a file whose colours may have more than 8: PNG, JPEG 2000 and PPM say so in their headers."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head[1:4] == b"PNG":
        return head[24]
    siz = head.find(b"\xff\x4f\xff\x51")  # of JPEG 2000: start of the data, and sizes behind it
    if head[:4] in (b"\0\0\0\x0c", b"\xff\x4f\xff\x51") and siz >= 0:
        return (head[siz + 42] & 0x7F) + 1
    if head[:2] in (b"P3", b"P6"):
        return int(re.sub(rb"#[^\n]*", b"", head).split(maxsplit=4)[3]).bit_length()
    return 8


def _with_data(values: np.ndarray, valid: np.ndarray | None, nodata: float | None) -> np.ndarray | None:
    """``bool [H, W]``, false where all bands are ``nodata`` or one is NaN or infinite; ``None``: nowhere."""
    parts = [] if valid is None else [valid]
    if nodata is not None:
        with np.errstate(over="ignore"):  # the largest float64 marks no float32
            mark = values.dtype.type(nodata) if values.dtype.kind == "f" else nodata
        parts.append((values != (int(mark) if float(mark).is_integer() else mark)).any(0))
    if values.dtype.kind == "f":
        parts.append(np.isfinite(values).all(0))
    whole = np.logical_and.reduce(parts) if parts else None
    return None if whole is None or whole.all() else whole


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turned and mirrored as EXIF says, on the last two axes."""
    if orientation >= 5:
        values = values.swapaxes(-1, -2)
    if orientation in (2, 3, 6, 7):
        values = values[..., ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[..., ::-1, :]
    return np.ascontiguousarray(values)


def warn_if_dark(samples: Samples, path: Path) -> None:
    """Warns of values of 16 bits that use a small part of them."""
    wide = samples.values.dtype.kind in "ui" and samples.values.dtype != np.uint8
    if not (wide or samples.halved):
        return
    known = samples.values if samples.valid is None else samples.values[:, samples.valid]
    largest, seen = int(known.max(initial=0)), ""
    if samples.halved:
        largest, seen = 256 * largest + 255, "at most "
    if 0 < largest < _DARK:
        tell_once(
            "dark",
            f"{printable(path)}: the largest of its 16-bit values is {seen}{largest} of {2**16 - 1}, so it is read "
            "nearly black; if that is not meant, say which values become 0 and 1, such as "
            f"images.range: [0, {largest}]{', 12bit' if largest < 2**12 else ''} or {{percentile: [2, 98]}}",
        )


_told: set[str] = set()


def tell_once(what: str, message: str) -> None:
    """Warns once in a process: a data set may have thousands of files of a kind."""
    if what not in _told:
        _told.add(what)
        _log.warning("%s (told once)", message)
