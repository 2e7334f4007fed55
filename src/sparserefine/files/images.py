"""Reads images as a viewer shows them or as chosen bands, reads label maps, and writes PNG files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
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
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.ranges import RangeError, check_meaning, to_pixels
from sparserefine.files.rasters import have_rasters, read_raster
from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line, printable
from sparserefine.files.tiff import MAGIC, BandsError, Tiff, check_bands, check_transparency, pillow_reads, read_tiff
from sparserefine.files.whole import written_whole

_log = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Pillow's names of the formats of :data:`IMAGE_SUFFIXES`. No other decoder of Pillow's sees a file, whatever its name:
some run programs (EPS: Ghostscript), and few of them are tested as much."""
MAX_PIXELS = 2**31
"""Largest width x height that is read unless ``images.max_megapixels`` says otherwise. A file of a few megabytes may
decompress to that many pixels, at 4 bytes each in memory; lower it where images come from strangers."""
_DARK = 2**14
"""A 16-bit image of lower values only has a range of its own, of 12 bits or so: it would be read nearly black."""
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
def _opened(path: Path, what: str, config: ImageConfig = ImageConfig()) -> Iterator[Image.Image]:  # noqa: B008  # frozen
    """Opens and decodes ``what``, rotated by its EXIF tag; any failure raises an :class:`ImageError` with the path."""
    with _errors_named(path, what), _OURS, Image.open(path, formats=FORMATS) as image:
        kind = image.info.get("compression") if image.format == "TIFF" else image.format
        check_size(image.size, kind, path, _most_pixels(config))
        orientation = 1
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            orientation = int(image.tag_v2.get(_ORIENTATION, 1))
            check_tiff(image, path)
        elif image.format == "JPEG2000":
            check_jpeg_2000(path)
        image.load()  # which turns a TIFF
        if image.format == "PNG":
            check_png(image, path)
        elif image.format in ("JPEG", "MPO"):
            check_jpeg(image, path)
        if config.exif == "ignore":
            turn = _TURNS.get(_TURNED_BACK.get(orientation, orientation))
            yield image if turn is None else image.transpose(turn)
        else:
            yield _upright(image)


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


def _most_pixels(config: ImageConfig) -> int:
    return MAX_PIXELS if config.max_megapixels is None else round(config.max_megapixels * 1e6)


def _advice(start: bytes) -> str:
    """What else may be wrong with a file of these first bytes."""
    return f"; the file may be of a kind that Pillow cannot read: {REWRITE}" if start in MAGIC else ""


def _upright(image: Image.Image) -> Image.Image:
    """The image, rotated by its EXIF tag."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block may raise anything; without one, a picture is shown as it is stored
        return 1
    return orientation if orientation in _TURNS else 1


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
            return _orientation(image)


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
    path = Path(path)
    with _errors_named(path, "an image"):
        tiff = read_tiff(path)
        if tiff is not None:
            check_bands(tiff, config)
            check_meaning(tiff.kind, tiff.bits, tiff.bands, config)
            if tiff.pages > 1:
                _tell("pages", f"{printable(path)}: {tiff.pages} pages; only the first one is read")
        if tiff is not None and not pillow_reads(tiff, config, have_rasters()):
            check_size((tiff.width, tiff.height), tiff.compression, path, _most_pixels(config))
            stored = _from_raster(path, tiff, config)
        else:
            with _opened(path, "an image", config) as image:
                stored = _from_picture(image, path, tiff, config)
        if config.range is None and not np.issubdtype(stored.values.dtype, np.floating):
            _warn_if_dark(stored, path)
        pixels = to_pixels(stored.values, stored.valid, config)
        return Pixels(pixels, None if stored.valid is None else torch.from_numpy(stored.valid))


@dataclass(frozen=True)
class _Stored:
    """What a file holds.

    Attributes:
        values: ``[C, H, W]``, or ``[1, H, W]`` of a grey picture.
        valid: ``bool [H, W]``, false where there is no data; ``None``: nowhere.
        halved: whether these are the higher 8 bits of 16.
    """

    values: np.ndarray
    valid: np.ndarray | None
    halved: bool = False


def _from_raster(path: Path, tiff: Tiff | None, config: ImageConfig) -> _Stored:
    described = "colours of 16 bits" if tiff is None else tiff.described()
    values, valid = read_raster(path, "PNG" if tiff is None else "GTiff", config.bands, described)
    valid = _with_data(values, valid, _nodata(tiff, config))
    if config.exif != "ignore" and tiff is not None and tiff.orientation in _TURNS:
        values = np.ascontiguousarray(_turned(values, tiff.orientation))
        valid = None if valid is None else np.ascontiguousarray(_turned(valid, tiff.orientation))
    return _Stored(values, valid)


def _from_picture(image: Image.Image, path: Path, tiff: Tiff | None, config: ImageConfig) -> _Stored:
    halved = _halved(image, path, tiff)
    if halved and (config.range is not None or config.bands is not None):
        return _from_raster(path, tiff, config)
    alpha = image.getchannel("A") if config.bands is None and image.mode in ("LA", "PA", "RGBA", "La") else None
    if alpha is not None and tiff is not None:
        check_transparency(np.asarray(alpha), tiff)
    nodata = _nodata(tiff, config)
    valid = None if nodata is None else _with_data(_planes(image, None), None, nodata)
    if config.bands is not None:
        return _Stored(_planes(image, config.bands), valid)
    if image.mode == "F" or image.mode.startswith("I"):
        return _Stored(np.asarray(image)[None], valid)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode in ("1", "L"):
        return _Stored(np.asarray(image.convert("L"))[None], valid)
    return _Stored(np.array(image.convert("RGB")).transpose(2, 0, 1), valid, halved)


def _planes(image: Image.Image, bands: Sequence[int] | None) -> np.ndarray:
    """Bands as they are stored, ``[C, H, W]``; ``None``: all that are not transparency, and numbers of colours."""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA") and bands is not None:
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if bands is None:
        return values[:-1] if image.mode in ("LA", "PA", "RGBA", "La") else values
    if max(bands) > len(values):
        raise BandsError(f"images.bands asks for band {max(bands)}, the file has {len(values)} ({image.mode})")
    return values[[band - 1 for band in bands]]


def _halved(image: Image.Image, path: Path, tiff: Tiff | None) -> bool:
    """Whether Pillow read the higher 8 bits of 16: it has no colours of more than 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return False
    if tiff is not None:
        return tiff.bits > 8
    with path.open("rb") as file:  # a PNG states the bits of a sample in its header
        head = file.read(25)
    return head[1:4] == b"PNG" and head[24] == 16


def _nodata(tiff: Tiff | None, config: ImageConfig) -> float | None:
    return config.nodata if config.nodata is not None else None if tiff is None else tiff.nodata


def _with_data(values: np.ndarray, valid: np.ndarray | None, nodata: float | None) -> np.ndarray | None:
    """``bool [H, W]``, false where all bands are ``nodata`` or one is NaN or infinite; ``None``: nowhere."""
    parts = [] if valid is None else [valid]
    if nodata is not None:
        parts.append((values != nodata).any(0))
    if np.issubdtype(values.dtype, np.floating):
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
    return values


def _warn_if_dark(stored: _Stored, path: Path) -> None:
    """Warns of values of 16 bits that use a small part of them."""
    if stored.values.dtype == np.uint8 and not stored.halved:
        return
    known = stored.values if stored.valid is None else stored.values[:, stored.valid]
    largest = int(known.max(initial=0))
    largest, seen = (256 * largest + 255, "at most ") if stored.halved else (largest, "")
    if 0 < largest < _DARK:
        _tell(
            "dark",
            f"{printable(path)}: the largest of its 16-bit values is {seen}{largest} of {2**16 - 1}, so it is read "
            "nearly black; if that is not meant, say which values become 0 and 1, such as "
            f"images.range: [0, {largest}]{', 12bit' if largest < 2**12 else ''} or {{percentile: [2, 98]}}",
        )


_told: set[str] = set()


def _tell(what: str, message: str) -> None:
    """Warns once in a process: a data set may have thousands of files of a kind."""
    if what not in _told:
        _told.add(what)
        _log.warning("%s (told once)", message)


def read_label(path: str | Path) -> Tensor:
    """Reads an index image, whose pixel values are class numbers (1-bit, palette, 8-bit or 16-bit grey file).

    Args:
        path: a label file; PNG by convention.

    Returns:
        ``int64 [H, W]``.

    Raises:
        ImageError: as for :func:`read_image`, or a colour image, whose classes are unknown.
    """
    path = Path(path)
    with _opened(path, "a label image") as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise ImageError(
                f"{printable(path)}: labels must be an index image (1 channel), this one has mode {image.mode!r}; "
                "convert it"
            )
        return torch.from_numpy(np.array(image).astype(np.int64))


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
