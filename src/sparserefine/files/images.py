"""Reads images as a viewer shows them, reads label maps, and writes PNG files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparserefine.files.whole import written_whole

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2")


class ImageError(ValueError):
    """A file that is not a readable image, or an image whose pixels have no defined meaning here."""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens and decodes an image, rotated by its EXIF tag; any failure raises an :class:`ImageError` with the path."""
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # This library is made for images of 100 megapixels and more.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                yield ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path}: {error}; if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS before reading it"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path}: not a readable image, or cut short ({error}); check the file") from error


def read_image(path: str | Path) -> Tensor:
    """Reads an image file as RGB, the way an image viewer shows it.

    Rotation by the EXIF tag is applied, palettes are resolved, grey becomes three equal channels, transparent pixels
    are blended with white, and 16-bit grey is scaled to 8 bits (not clipped).

    Args:
        path: an image file of any format that Pillow reads.

    Returns:
        ``uint8 [3, H, W]``.

    Raises:
        ImageError: the file is missing, truncated, not an image, has floating-point pixels, or integer pixels outside
            0..65535.
    """
    path = Path(path)
    with _opened(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
            wide = np.asarray(image).astype(np.int64)
            if wide.min() < 0 or wide.max() > 65535:
                raise ImageError(
                    f"{path}: integer pixels {wide.min()}..{wide.max()}, expected 0..65535; convert them to 16 bits"
                )
            grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
            array = np.repeat(grey[..., None], 3, axis=2)
        elif image.mode == "F":
            raise ImageError(f"{path}: floating-point pixels have no defined range; convert the image to 8 or 16 bits")
        else:
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_label(path: str | Path) -> Tensor:
    """Reads an index image, whose pixel values are class numbers (1-bit, palette, 8-bit or 16-bit grey file).

    Args:
        path: a label file; PNG by convention.

    Returns:
        ``int64 [H, W]``.

    Raises:
        ImageError: the file is unreadable, or a colour image, whose classes are unknown.
    """
    path = Path(path)
    with _opened(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise ImageError(
                f"{path}: labels must be an index image (1 channel), this one has mode {image.mode!r}; convert it"
            )
        return torch.from_numpy(np.array(image).astype(np.int64))


def write_png(path: str | Path, pixels: Tensor, palette: list[tuple[int, int, int]] | None = None) -> None:
    """Writes a PNG file.

    Args:
        path: the file; missing folders are made.
        pixels: ``uint8 [H, W]`` or ``int16 [H, W]`` (an index image), or ``uint8 [3, H, W]`` (RGB).
        palette: RGB colour of each class, for ``uint8 [H, W]``.

    Raises:
        ValueError: labels outside 0..65535.
    """
    array = pixels.cpu().numpy()
    if array.ndim == 3:
        image = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    elif array.dtype == np.uint8:
        image = Image.fromarray(array)
        if palette:
            image.putpalette([channel for colour in palette for channel in colour])
    else:
        if array.size and (array.min() < 0 or array.max() > 65535):
            raise ValueError(f"{path}: labels {array.min()}..{array.max()}, expected 0..65535, the range of a PNG")
        image = Image.fromarray(array.astype(np.uint16))
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG")
