"""The header of a TIFF file: its bands, their depth and meaning, pages, nodata, and where on Earth it lies."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import TiffImagePlugin

from sparserefine.files.claims import REWRITE
from sparserefine.files.image_config import ImageConfig

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of a TIFF and of a BigTIFF."""
GEO = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}
"""Tags of GeoTIFF: pixel size, tie points, affine transform, coordinate system with its numbers and texts. With the
type of their values: float64, uint16, text."""
NODATA = 42113
"""GDAL's tag of the value that marks pixels without data."""
_SUBFILE, _ORIENTATION, _EXTRA, _FORMAT, _PLANES, _SAMPLES = 254, 274, 338, 339, 284, 277
_KINDS = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex float"}
_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5
"""Photometric interpretations."""
_COLOURS = {
    _WHITE_IS_ZERO: ("grey",),
    _GREY: ("grey",),
    _RGB: ("red", "green", "blue"),
    _PALETTE: ("number of a colour",),
    4: ("mask",),
    _CMYK: ("cyan", "magenta", "yellow", "black"),
    6: ("Y", "Cb", "Cr"),
    8: ("L", "a", "b"),
    9: ("L", "a", "b"),
    10: ("L", "a", "b"),
}
"""Bands of a picture, by photometric interpretation; others are extra samples."""
_TRANSPARENCY = (1, 2, 999)
"""Marks of an extra band; the last one is that of an old Corel Draw."""
_PILLOWS_GREY = (*tuple(f"uint{n}" for n in (1, 2, 4, 8, 12, 16, 32)), "int16", "int32", "float32")
"""One band that Pillow reads as it is; it does not know the sign of 8 bits."""
_STRETCHED = ("uint2", "uint4")
"""Which it stretches to 8 bits."""
_MOST_PAGES = 1000
"""That are counted."""
_WHICH = "say which to read, such as images.bands: [1, 2, 3]"


class BandsError(ValueError):
    """The file has not the bands of a picture, or not those that are asked for."""


@dataclass(frozen=True)
class Tiff:
    """What the header of a TIFF says.

    Attributes:
        width: W [px].
        height: H [px].
        bands: number of bands.
        bits: of each sample.
        kind: ``uint``, ``int``, ``float``, or something that no image of ours has.
        photometric: what the first bands are, such as 1 for grey and 2 for red, green and blue.
        colours: how many bands those are; the others are extra.
        extra: what each extra band is said to be: 1 and 2 are transparency, 0 is unknown; the file may have none.
        contiguous: whether the samples of a pixel lie together.
        orientation: as EXIF counts it, 1 to 8.
        pages: pictures in the file, without smaller copies of them and masks.
        masked: whether the file has a mask of the pixels with data.
        nodata: value of pixels without data.
        compression: Pillow's name of it; ``None``: one that it does not know.
        sparse: whether parts of the image are not stored.
        place: the tags of GeoTIFF, as they are.
    """

    width: int
    height: int
    bands: int
    bits: int
    kind: str
    photometric: int
    colours: int
    extra: tuple[int, ...]
    contiguous: bool
    orientation: int
    pages: int
    masked: bool
    nodata: float | None
    compression: str | None
    sparse: bool
    place: Mapping[int, Any]

    @property
    def depth(self) -> str:
        """Such as ``uint16``."""
        return f"{self.kind}{self.bits}"

    @property
    def transparent(self) -> bool:
        """Whether the one extra band is said to be transparency. Some programs leave out the mark."""
        missing = self.extra == () and self.photometric == _RGB
        return self.bands == self.colours + 1 and (missing or self.extra[:1] in [(mark,) for mark in _TRANSPARENCY])

    @property
    def white_is_zero(self) -> bool:
        """Whether the values are shown inverted."""
        return self.photometric == _WHITE_IS_ZERO

    def described(self) -> str:
        """Such as ``4 bands of uint16``."""
        return f"{self.bands} band{'' if self.bands == 1 else 's'} of {self.depth}"

    def named_bands(self) -> str:
        """Such as ``4 bands of uint8: 1 red, 2 green, 3 blue, 4 marked as transparency``."""
        colours = _COLOURS.get(self.photometric, ("grey",))[: self.colours]
        names = [f"{n} {name}" for n, name in enumerate(colours, 1)]
        first, last = len(names) + 1, self.bands
        if self.transparent:
            names.append(f"{first} marked as transparency")
        elif first <= last:
            names.append(f"{first} unnamed" if first == last else f"{first} to {last} unnamed")
        return f"{self.described()}: {', '.join(names)}"


def read_tiff(path: Path) -> Tiff | None:
    """The header of the file; ``None``: it is no TIFF, or so damaged that only a reader can say how.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head not in MAGIC:
            return None
        try:
            head += file.read(12 if head[2:] in (b"+\0", b"\0+") else 4)
            return _parsed(_directory(file, head, None), _subfiles(file, head))
        except (SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError, struct.error):
            return None


def placed(path: Path, config: ImageConfig) -> Mapping[int, Any]:
    """Where on Earth the pixels of a file lie: its tags of GeoTIFF, none if it has none, or is read turned."""
    tiff = read_tiff(path)
    turned = tiff is not None and tiff.orientation != 1 and config.exif != "ignore"
    return {} if tiff is None or turned else tiff.place


def _directory(file: BinaryIO, head: bytes, at: int | None) -> TiffImagePlugin.ImageFileDirectory_v2:
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(tags.next if at is None else at)
    tags.load(file)
    return tags


def _subfiles(file: BinaryIO, head: bytes) -> list[int]:
    """The kind of each image in the file: bit 0 means a smaller copy, bit 2 a mask."""
    seen: set[int] = set()
    kinds: list[int] = []
    at = None
    while len(seen) < _MOST_PAGES:
        page = _directory(file, head, at)
        kinds.append(int(page.get(_SUBFILE, 0)))
        at = page.next
        if not at or at in seen:
            break
        seen.add(at)
    return kinds


def _parsed(tags: TiffImagePlugin.ImageFileDirectory_v2, subfiles: list[int]) -> Tiff:
    bands = int(tags.get(_SAMPLES, 1))
    bits = _numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1))
    kinds = _numbers(tags.get(_FORMAT, 1))
    photometric = int(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1))
    extra = _numbers(tags.get(_EXTRA, ()))
    colours = min(len(_COLOURS.get(photometric, ("grey",))), bands)
    orientation = int(tags.get(_ORIENTATION, 1))
    return Tiff(
        width=int(tags[TiffImagePlugin.IMAGEWIDTH]),
        height=int(tags[TiffImagePlugin.IMAGELENGTH]),
        bands=bands,
        bits=max(bits[:bands]),
        kind=_KINDS.get(max(kinds[:bands]), "unknown "),
        photometric=photometric,
        # GDAL writes any bands as grey and extra ones. Three of them lose nothing as red, green and blue.
        colours=3 if photometric == _GREY and bands == 3 and not any(extra) else colours,
        extra=extra,
        contiguous=int(tags.get(_PLANES, 1)) != 2,
        orientation=orientation if 1 <= orientation <= 8 else 1,
        pages=max(1, sum(kind & 0b101 == 0 for kind in subfiles)),
        masked=0b100 in subfiles,
        nodata=_number(tags.get(NODATA)),
        compression=TiffImagePlugin.COMPRESSION_INFO.get(int(tags.get(TiffImagePlugin.COMPRESSION, 1))),
        sparse=0 in _numbers(tags.get(TiffImagePlugin.TILEBYTECOUNTS, ())),
        place={tag: tags[tag] for tag in GEO if tag in tags},
    )


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),)


def _number(text: Any) -> float | None:
    """GDAL writes a text; NaN needs no telling, since no pixel of that value is data."""
    try:
        value = float(str(text).strip("\0 "))
    except ValueError:
        return None
    return None if math.isnan(value) else value


def check_bands(tiff: Tiff, config: ImageConfig) -> None:
    """Checks that the file has the bands that are asked for, or those of a picture if none are.

    Raises:
        BandsError: it has not; or it has more, of which none may be left out without being told.
    """
    if config.bands is not None:
        there = 3 if tiff.photometric == _PALETTE else tiff.bands
        if max(config.bands) > there:
            raise BandsError(f"images.bands asks for band {max(config.bands)}, the file has {tiff.named_bands()}")
        return
    if tiff.white_is_zero and tiff.bits > 8 and config.range is not None:
        raise BandsError(f"{tiff.described()}, of which 0 is white; images.bands: [1] reads them as they are stored")
    if tiff.bands == tiff.colours:
        return
    shallow = tiff.bits <= 8 or (tiff.photometric == _RGB and config.range is None)
    if not (tiff.transparent and shallow):
        raise BandsError(f"{tiff.named_bands()}; {_WHICH}")


def check_plain(tiff: Tiff, config: ImageConfig) -> None:
    """Checks that the values are pixels as they are stored, before a reader that takes them so.

    Raises:
        BandsError: they are numbers of colours, inverted, or must be blended.
    """
    plain = tiff.photometric in (_GREY, _RGB) and tiff.bands == tiff.colours
    if not plain and (config.bands is None or tiff.photometric == _PALETTE):
        raise BandsError(f"{tiff.named_bands()}, stored in a way that Pillow does not read; {REWRITE}")


def check_transparency(alpha: np.ndarray, tiff: Tiff) -> None:
    """Checks that a band that is said to be transparency can be that of a picture.

    Programs that do not know what a fourth band is, such as infrared, mark it as transparency. A picture is opaque in
    most places where it is seen at all, and its edges are few; a measured band is 255 in few places.

    Args:
        alpha: ``uint8 [H, W]``, 255 is opaque.
        tiff: its file.

    Raises:
        BandsError: it cannot.
    """
    seen, opaque = np.count_nonzero(alpha), np.count_nonzero(alpha == 255)
    if opaque == 0 or 2 * opaque < seen:
        share = f"{opaque} of its {alpha.size} pixels are opaque and {alpha.size - seen} transparent"
        raise BandsError(f"{tiff.named_bands()}, but {share}, unlike a picture's; {_WHICH}")


def pillow_reads(tiff: Tiff, config: ImageConfig, rasters: bool) -> bool:
    """Whether Pillow reads the bands that are asked for, and all bits of them that count.

    Args:
        tiff: a file that :func:`check_bands` accepts.
        config: bands and range.
        rasters: whether there is another reader. It is needed for what Pillow does not read, and preferred where Pillow
            reads only the higher 8 of 16 bits: these are enough for a picture, but the largest value is not seen.
    """
    if tiff.compression is None or (tiff.sparse and rasters):
        return False
    declared = config.range is not None or config.bands is not None
    if tiff.bands == 1:
        exact = tiff.depth not in _STRETCHED if config.range is not None else True
        inverted = tiff.white_is_zero and tiff.depth == "uint8" and config.bands is not None
        return tiff.depth in _PILLOWS_GREY and exact and not inverted and not (tiff.depth == "uint32" and declared)
    if tiff.depth == "uint16":
        return tiff.contiguous and not declared and (tiff.bands > 3 or not rasters) and tiff.photometric != _GREY
    if tiff.depth != "uint8" or (tiff.photometric == _GREY and not tiff.transparent):
        return False
    if tiff.bands == tiff.colours or config.bands is None:
        return True
    return tiff.photometric == _RGB and tiff.bands == 4 and tiff.extra in ((), (2,)) and tiff.contiguous
