"""Reads images as a viewer shows them, and writes PNG files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from sparserefine.files.claims import (
    REWRITE,
    ClaimError,
    check_jpeg,
    check_jpeg_2000,
    check_png,
    check_size,
    check_tiff,
)
from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line, printable
from sparserefine.files.whole import written_whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats of :data:`IMAGE_SUFFIXES`. No other decoder of Pillow's sees a file, whatever its name:
some run programs (EPS: Ghostscript), and few of them are tested as much."""
MAX_PIXELS = 2**31
"""Largest width x height that is read. A file of a few megabytes may decompress to that many pixels, at 4 bytes each in
memory; lower this number where images come from strangers."""
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that is not a readable image, or an image whose pixels have no defined meaning here."""


class _PillowSettings:
    """Pillow's settings while images are read: its size limit is off, and what a file lacks is an error.

    The settings are global. A program may have others for its own use of Pillow (``LOAD_TRUNCATED_IMAGES`` is popular),
    and several threads may read: the first one changes the settings, the last one restores them.
    """

    def __init__(self) -> None:
        self._lock, self._readers = threading.Lock(), 0
        self._before: tuple[int | None, bool] = (None, False)

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_OURS = _PillowSettings()


@contextmanager
def opened(path: Path, what: str, *, turn: int | None = None) -> Iterator[Image.Image]:
    """Opens and decodes ``what``; any failure raises an :class:`ImageError` with the path.

    Args:
        path: the file.
        what: what it should be, for messages.
        turn: the EXIF orientation, 1 to 8, by which it is rotated; ``None``: that of its own tag.
    """
    try:
        regular_file(path, what)
    except (OSError, ValueError) as error:
        raise ImageError(str(error)) from error
    shown, start = printable(path), b""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        with _OURS, Image.open(path, formats=FORMATS) as image:
            check_size(image, path, MAX_PIXELS)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                check_tiff(image, path)
            elif image.format == "JPEG2000":
                check_jpeg_2000(path)
            image.load()
            if image.format == "PNG":
                check_png(image, path)
            elif image.format in ("JPEG", "MPO"):
                check_jpeg(image, path)
            yield _turned(image, _orientation(image) if turn is None else turn)
    except ImageError:
        raise
    except ClaimError as error:
        raise ImageError(f"{shown}: {error}") from error
    except MemoryError as error:
        raise ImageError(f"{shown}: there is not enough memory to read it; cut it into parts") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{shown}: not a readable image; expected {', '.join(FORMATS)}, whatever its name{_advice(start)}"
        ) from error
    except Exception as error:  # damaged files raise almost anything in Pillow
        reason = printable(first_line(error))
        raise ImageError(
            f"{shown}: not a readable image, or cut short ({reason}); check the file{_advice(start)}"
        ) from error


def _advice(start: bytes) -> str:
    """What else may be wrong with a file of these first bytes."""
    kinds = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return f"; the file may be of a kind that Pillow cannot read: {REWRITE}" if start in kinds else ""


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF tag, 1 to 8."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block may raise anything; without one, a picture is shown as it is stored
        return 1
    return found if found in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image, rotated as its orientation says."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


@dataclass(frozen=True)
class Stored:
    """How an image file stores its pixels: the orientation in its EXIF tag, 1 to 8, and height and width [px]."""

    orientation: int
    size: tuple[int, int]

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width of the image as a viewer shows it, turned by the tag."""
        return self.size if self.orientation < 5 else self.size[::-1]


def stored_as(path: str | Path) -> Stored | None:
    """Reads the header of an image file; ``None``: it has none that can be read, which reading the image will tell."""
    try:
        with _OURS, Image.open(path, formats=FORMATS) as image:
            # For the tag behind the pixels of a PNG, Pillow decodes them. It need not where there is none.
            turned = image.format != "PNG" or "exif" in image.info or _png_has_text(Path(path))
            return Stored(_orientation(image) if turned else 1, (image.height, image.width))
    except Exception:
        return None


def _png_has_text(path: Path) -> bool:
    """Whether a PNG has chunks in which an orientation can stand."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def read_image(path: str | Path) -> Tensor:
    """Reads an image file as RGB, the way an image viewer shows it.

    Rotation by the EXIF tag is applied, palettes are resolved, grey becomes three equal channels, transparent pixels
    are blended with white, and 16-bit grey is scaled to 8 bits (not clipped).

    Args:
        path: an image file of the formats of :data:`IMAGE_SUFFIXES`; its content decides, not its name.

    Returns:
        ``uint8 [3, H, W]``.

    Raises:
        ImageError: the file is missing, no regular file, truncated, not an image, has more than :data:`MAX_PIXELS`
            pixels, floating-point pixels, or integer pixels outside 0..65535.
    """
    path = Path(path)
    with opened(path, "an image") as image:
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
            wide = np.asarray(image).astype(np.int64)
            if wide.min() < 0 or wide.max() > 65535:
                raise ImageError(
                    f"{printable(path)}: integer pixels {wide.min()}..{wide.max()}, expected 0..65535; "
                    "convert them to 16 bits"
                )
            return _three_channels(((wide * 255 + 32767) // 65535).astype(np.uint8))
        if image.mode == "F":
            raise ImageError(
                f"{printable(path)}: floating-point pixels have no defined range; convert the image to 8 or 16 bits"
            )
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        elif image.mode in ("1", "L"):
            return _three_channels(np.asarray(image.convert("L")))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _three_channels(grey: np.ndarray) -> Tensor:
    """``uint8 [H, W]`` -> ``uint8 [3, H, W]``, with no other copy: it may be large."""
    return torch.from_numpy(grey.copy() if not grey.flags.writeable else grey)[None].repeat(3, 1, 1)


def write_png(path: str | Path, pixels: Tensor, palette: list[tuple[int, int, int]] | None = None) -> None:
    """Writes a PNG file, completely or not at all.

    Args:
        path: the file; missing folders are made.
        pixels: ``uint8 [H, W]`` or ``int16 [H, W]`` (an index image), or ``uint8 [3, H, W]`` (RGB).
        palette: RGB colour of each class, for ``uint8 [H, W]``.

    Raises:
        ValueError: labels outside 0..65535.
    """
    with written_whole(path) as temporary:
        save_png(temporary, pixels, palette)


def save_png(file: Path, pixels: Tensor, palette: list[tuple[int, int, int]] | None = None) -> None:
    """Writes a PNG file inside :func:`sparserefine.files.whole.written_whole`; arguments as for :func:`write_png`."""
    array = pixels.cpu().numpy()
    if array.ndim == 3:
        image = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    elif array.dtype == np.uint8:
        image = Image.fromarray(array)
        if palette:
            image.putpalette([channel for colour in palette for channel in colour])
    else:
        if array.size and (array.min() < 0 or array.max() > 65535):
            raise ValueError(f"labels {array.min()}..{array.max()}, expected 0..65535, the range of a PNG")
        image = Image.fromarray(array.astype(np.uint16))
    image.save(file, format="PNG")
