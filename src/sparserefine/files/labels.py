"""Reads label files: exactly the numbers that they hold, and the colours that a viewer shows for them."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from sparserefine.files.images import FORMATS, ImageError, opened
from sparserefine.files.samples import bits_of
from sparserefine.files.text import printable
from sparserefine.files.tiff import read_tiff

_LOSSLESS = "write it again from its source in a format without loss: PNG"
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
"""Compressions of TIFF that change values. WebP has a form without loss; which one it is, the header does not say."""
_SEVERAL_CHANNELS = ("RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB")
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
_HEAD = 1 << 16
"""Bytes of a file in which its headers are looked for."""


@dataclass(frozen=True, eq=False)
class LabelPixels:
    """What a label file holds, before it is known what that means.

    Attributes:
        values: integers ``[H, W]`` of a file of one channel, or of three equal ones; ``None``: the channels differ.
        shown: ``uint8 [n, 3]``: the colours that a viewer shows for the values 0..n-1; empty for 16 bits and more.
        palette: whether these colours are a palette of the file's own.
        colours: ``uint8 [H, W, 3]``, where there are no values.
    """

    values: np.ndarray | None
    shown: np.ndarray
    palette: bool
    colours: np.ndarray | None


def read_label(path: str | Path) -> Tensor:
    """Reads an index image, whose pixel values are class numbers: one channel, or three equal ones.

    Values are exact, also negative ones and those of 16 and 32 bits. Rotation by the file's own EXIF tag is applied.

    Args:
        path: a label file; PNG by convention.

    Returns:
        ``int64 [H, W]``.

    Raises:
        ImageError: as for :func:`sparserefine.files.images.read_image`; or the file is compressed with loss, or does
            not hold its values exactly; or it is a colour image, whose classes are unknown.
    """
    values = read_label_pixels(path).values
    if values is None:
        raise ImageError(
            f"{printable(path)}: a colour image, expected class numbers (1 channel, or 3 equal ones); in a data set, "
            "data.labels.name: colour decodes it by the colours of the classes"
        )
    return torch.from_numpy(values.astype(np.int64))


def read_label_pixels(path: str | Path, turn: int | None = None) -> LabelPixels:
    """What a label file holds.

    Args:
        path: the file.
        turn: the EXIF orientation, 1 to 8, by which it is rotated; ``None``: its own.

    Raises:
        ImageError: as for :func:`read_label`, colour images excepted.
    """
    path = Path(path)
    with opened(path, "a label image", turn=turn) as image:
        # What is rotated is another image, without these.
        with Image.open(path, formats=FORMATS) as header:
            _check_exact(header, path)
            _check_alone(header, path)
            tags = getattr(header, "tag_v2", {})
            signed, bits = tags.get(339, (1,))[0] == 2, tags.get(258, (8,))[0]
        if image.mode in ("RGBA", "LA") and image.getextrema()[-1] == (255, 255):
            image = image.convert(image.mode[:-1])
        array = np.array(image)
        if image.mode == "RGB":
            first = array[..., 0]
            if not (np.array_equal(first, array[..., 1]) and np.array_equal(first, array[..., 2])):
                return LabelPixels(None, _GREY[:0], False, array)
            return LabelPixels(np.ascontiguousarray(first), _GREY, False, None)
        if image.mode not in _ONE_CHANNEL:
            raise ImageError(
                f"{printable(path)}: labels must be an index image (1 channel) or a colour image without transparency, "
                f"this one has mode {image.mode!r}; convert it"
            )
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return LabelPixels(array, palette, True, None)
        if image.mode == "1":
            return LabelPixels(array.astype(np.uint8), _GREY[[0, 255]], False, None)
        if image.mode == "L":  # Pillow has no type for 8 bits with a sign
            return LabelPixels(array.view(np.int8) if signed else array, _GREY[: 128 if signed else 256], False, None)
        if array.dtype == np.int32 and bits == 32 and tags and not signed:
            array = array.view(np.uint32)
        return LabelPixels(array, _GREY[:0], False, None)


_GREY = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def _check_exact(image: Image.Image, path: Path) -> None:
    """Raises ``ImageError`` if decoding the file does not give the values that were written into it.

    Args:
        image: opened, not loaded.
        path: its file.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    kind, problem = image.format, ""
    if kind in ("JPEG", "MPO"):
        problem = "JPEG"
    elif kind == "WEBP" and _lossy_webp(path):
        problem = "lossy WebP"
    elif kind == "JPEG2000":  # without loss, or cut off at some size: its headers do not tell
        problem = "JPEG 2000"
    elif kind == "TIFF" and image.info.get("compression") in _LOSSY_TIFF:
        problem = f"TIFF with {image.info['compression']} compression"
    if problem:
        raise ImageError(
            f"{printable(path)}: {problem}, which changes values, and a changed value is another class; {_LOSSLESS}"
        )
    bits = max(image.tag_v2.get(258, (8,))) if isinstance(image, TiffImageFile) else bits_of(path)
    if bits > 8 and image.mode in _SEVERAL_CHANNELS:
        raise ImageError(
            f"{printable(path)}: {bits} bits in each of several channels, expected 8; save one channel only"
        )
    if 1 < bits < 8 and image.mode == "L":
        between = np.flatnonzero(image.histogram()[1:255]) + 1
        if between.size:
            value, most = between[0], 2**bits - 1
            raise ImageError(
                f"{printable(path)}: greys of {bits} bits, in which a viewer shows number {value * most // 255} as "
                f"{value}, so it is not clear which one is meant; expected 8 bits: save it with them"
            )
    match = re.match(rb"P[2356](?:\s+(?:#[^\n]*\n\s*)*(\d+)){3}", head)
    if match and int(match[1]) not in (255, 65535):
        raise ImageError(
            f"{printable(path)}: the values are fractions of {int(match[1])}, expected 255 or 65535; save it as PNG"
        )


def _check_alone(image: Image.Image, path: Path) -> None:
    """Raises ``ImageError`` if the file holds more than one image, or bands that are not read."""
    tiff = read_tiff(path)
    pages = getattr(image, "n_frames", 1) if tiff is None else tiff.pages
    if pages > 1:
        raise ImageError(f"{printable(path)}: holds {pages} images, expected one; save them in a file each")
    if tiff is not None and tiff.bands > len(image.getbands()):
        raise ImageError(f"{printable(path)}: holds {tiff.bands} bands, expected 1 or 3 (colours); save the right ones")


def _lossy_webp(path: Path) -> bool:
    """Whether a WebP file has pixels in its lossy form."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            if head[:4] in (b"VP8 ", b"ANMF"):  # frames of an animation hide theirs
                return True
            length = struct.unpack("<I", head[4:])[0]
            file.seek(length + length % 2, 1)
    return False
