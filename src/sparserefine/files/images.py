"""Reads images as a viewer shows them or as chosen bands, and writes PNG files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin, TiffTags, UnidentifiedImageError
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
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.ranges import RangeError, check_meaning, to_pixels
from sparserefine.files.rasters import have_rasters
from sparserefine.files.regular import regular_file
from sparserefine.files.samples import from_picture, from_raster, tell_once, warn_if_dark
from sparserefine.files.text import first_line, printable
from sparserefine.files.tiff import GEO, MAGIC, NODATA, BandsError, check_bands, check_plain, pillow_reads, read_tiff
from sparserefine.files.whole import written_whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats of :data:`IMAGE_SUFFIXES`. No other decoder of Pillow's sees a file, whatever its name:
some run programs (EPS: Ghostscript), and few of them are tested as much."""
_ANIMATED = ("GIF", "PNG", "WEBP")
MAX_PIXELS = 2**31
"""Largest width x height that is read unless ``images.max_megapixels`` says otherwise. A file of a few megabytes may
decompress to that many pixels, at 4 bytes each in memory; lower it where images come from strangers."""
_ORIENTATION = 0x0112  # EXIF tag
_TURNED_BACK = {6: 8, 8: 6}
"""Orientation that undoes another; the others undo themselves."""
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


@dataclass(frozen=True)
class Pixels:
    """An image as the method takes it.

    Attributes:
        image: ``uint8 [C, H, W]``, or ``float32 [C, H, W]`` in 0..1.
        valid: ``bool [H, W]``, false where the file has no data; ``None``: it has data everywhere.
    """

    image: Tensor
    valid: Tensor | None = None


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
def opened(path: Path, what: str, *, turn: int | None = None, most_pixels: int | None = None) -> Iterator[Image.Image]:
    """Opens and decodes ``what``; any failure raises an :class:`ImageError` with the path.

    Args:
        path: the file.
        what: what it should be, for messages.
        turn: the EXIF orientation, 1 to 8, by which it is rotated; ``None``: that of its own tag.
        most_pixels: largest width x height; default: :data:`MAX_PIXELS`.
    """
    # From an open file: of a name, Pillow maps plain pixels into memory, and mixes up the sides of a turned TIFF.
    with _errors_named(path, what), _OURS, path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        kind = image.info.get("compression") if image.format == "TIFF" else image.format
        check_size(image.size, kind, path, MAX_PIXELS if most_pixels is None else most_pixels)
        applied = 1
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            applied = _known(image.tag_v2.get(_ORIENTATION))  # by load()
            if read_tiff(path) is None:  # Pillow takes more than the standard
                raise BandsError(f"a TIFF with an odd header, so what its bands are is not known; {REWRITE}")
            check_tiff(image, path)
        elif image.format == "JPEG2000":
            check_jpeg_2000(path)
        image.load()
        if image.format == "PNG":
            check_png(image, path)
        elif image.format in ("JPEG", "MPO"):
            check_jpeg(image, path)
        if turn is not None and turn != applied:
            yield _turned(_turned(image, _TURNED_BACK.get(applied, applied)), turn)
        else:
            yield image if applied != 1 else _turned(image, _orientation(image) if turn is None else turn)


@contextmanager
def _errors_named(path: Path, what: str) -> Iterator[None]:
    """Any failure to read ``what`` raises an :class:`ImageError` with the path."""
    try:
        regular_file(path, what)
    except (OSError, ValueError) as error:
        raise ImageError(str(error)) from error
    shown, start = printable(path), b""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        yield
    except ImageError:
        raise
    except (ClaimError, RangeError, BandsError) as error:
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
    return f"; the file may be of a kind that Pillow cannot read: {REWRITE}" if start in MAGIC else ""


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF tag, 1 to 8."""
    try:
        return _known(image.getexif().get(_ORIENTATION))
    except Exception:  # a damaged EXIF block may raise anything; without one, a picture is shown as it is stored
        return 1


def _known(orientation: Any) -> int:
    return orientation if orientation in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image, rotated as its orientation says."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def read_image(path: str | Path, config: ImageConfig = ImageConfig()) -> Tensor:  # noqa: B008  # frozen
    """Reads an image file, by default as RGB, the way an image viewer shows it.

    Rotation by the EXIF tag is applied, palettes are resolved, grey becomes three equal channels, transparent pixels
    are blended with white, and 16-bit grey is scaled to 8 bits (not clipped). A TIFF with other bands than those is
    refused unless ``config.bands`` chooses among them.

    Args:
        path: an image file of the formats of :data:`IMAGE_SUFFIXES`; its content decides, not its name.
        config: the bands to read, and the range of their values.

    Returns:
        ``uint8 [C, H, W]``; with a range, or with chosen bands of 16 bits, ``float32 [C, H, W]`` in 0..1. C is 3 unless
        bands are chosen.

    Raises:
        ImageError: the file is missing, no regular file, truncated, not an image, has more pixels than allowed, has
            not the bands that are asked for, or values without a known range, such as floating-point pixels.
    """
    return read_pixels(path, config).image


def read_pixels(path: str | Path, config: ImageConfig = ImageConfig()) -> Pixels:  # noqa: B008  # frozen
    """Reads an image file, and where it has no data; see :func:`read_image`."""
    path, turn = Path(path), 1 if config.exif == "ignore" else None
    most_pixels = MAX_PIXELS if config.max_megapixels is None else round(config.max_megapixels * 1e6)
    with _errors_named(path, "an image"):
        tiff = read_tiff(path)
        if tiff is not None:
            check_bands(tiff, config)
            check_meaning(tiff.kind, tiff.bits, tiff.bands, config)
            if tiff.pages > 1:
                tell_once("pages", f"{printable(path)}: {tiff.pages} pages; only the first one is read")
        if tiff is not None and not pillow_reads(tiff, config, have_rasters()):
            check_plain(tiff, config)
            check_size((tiff.width, tiff.height), tiff.compression, path, most_pixels)
            found = from_raster(path, "GTiff", tiff.described(), tiff.nodata, tiff.orientation, config)
        else:
            with opened(path, "an image", turn=turn, most_pixels=most_pixels) as image:
                picture = from_picture(image, path, tiff, config)
                orientation = 1 if picture else _orientation(image)
                if image.format in _ANIMATED and getattr(image, "is_animated", False):
                    tell_once("pages", f"{printable(path)}: an animation; only its first picture is read")
            found = picture or from_raster(path, "PNG", "colours of 16 bits", None, orientation, config)
        if config.range is None:
            warn_if_dark(found, path)
        pixels = to_pixels(found.values, found.valid, config)
        return Pixels(pixels, None if found.valid is None else torch.from_numpy(found.valid))


def orientation_of(path: str | Path) -> int:
    """How cameras say that an image has to be turned, 1 (not at all) to 8 as EXIF counts it. It is not decoded.

    Raises:
        ImageError: as for :func:`read_image`.
    """
    path = Path(path)
    with _errors_named(path, "an image"):
        tiff = read_tiff(path)
        if tiff is not None:
            return tiff.orientation
        with _OURS, Image.open(path, formats=FORMATS) as image:
            # Pillow decodes a PNG to look for the tag behind its pixels, which takes too long where there is none.
            if image.format == "PNG" and "exif" not in image.info and not _png_has_text(path):
                return 1
            return _orientation(image)


def _png_has_text(path: Path) -> bool:
    """Whether a PNG has chunks in which an orientation can stand."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def stored_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as it is stored, not turned [px]. It is not decoded.

    Raises:
        ImageError: as for :func:`read_image`.
    """
    path = Path(path)
    with _errors_named(path, "an image"):
        tiff = read_tiff(path)
        if tiff is not None:
            return tiff.height, tiff.width
        with _OURS, Image.open(path, formats=FORMATS) as image:
            return image.height, image.width


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
    _picture(pixels, palette).save(file, format="PNG")


def save_tiff(
    file: Path,
    pixels: Tensor,
    palette: list[tuple[int, int, int]] | None = None,
    *,
    place: Mapping[int, Any] | None = None,
    nodata: int | None = None,
) -> None:
    """Writes a TIFF file inside :func:`sparserefine.files.whole.written_whole`.

    Args:
        file: the file.
        pixels: as for :func:`write_png`.
        palette: as for :func:`write_png`.
        place: tags of GeoTIFF, as :func:`sparserefine.files.tiff.placed` reads them.
        nodata: value of pixels without data.
    """
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in (place or {}).items():
        tags.tagtype[tag] = GEO[tag]
        tags[tag] = value
    if nodata is not None:
        tags.tagtype[NODATA] = TiffTags.ASCII
        tags[NODATA] = str(nodata)
    _picture(pixels, palette).save(file, format="TIFF", compression="tiff_adobe_deflate", tiffinfo=tags)


def _picture(pixels: Tensor, palette: list[tuple[int, int, int]] | None) -> Image.Image:
    array = pixels.cpu().numpy()
    if array.ndim == 3:
        return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    if array.dtype == np.uint8:
        image = Image.fromarray(array)
        if palette:
            # Decoders refuse a number that has no colour: one that marks pixels without data.
            more = int(array.max(initial=0)) + 1 - len(palette)
            image.putpalette([channel for colour in [*palette, *[(0, 0, 0)] * more] for channel in colour])
        return image
    if array.size and (array.min() < 0 or array.max() > 65535):
        raise ValueError(f"labels {array.min()}..{array.max()}, expected 0..65535, the range of 16 bits")
    return Image.fromarray(array.astype(np.uint16))
