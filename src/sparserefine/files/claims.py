"""Checks that an image file holds what its header claims. Pillow shows rows that a file lacks as black, silently."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin

_PIXELS_A_BYTE = {
    "PPM": 8,
    "BMP": 1024,
    "GIF": 4096,
    "JPEG": 1024,
    "MPO": 1024,
    "PNG": 10_000,
    "JPEG2000": 500_000,
    "WEBP": 2_000_000,
    "raw": 8,
    "packbits": 1024,
    "jpeg": 1024,
    "tiff_jpeg": 1024,
    "tiff_lzw": 25_000,
    "tiff_deflate": 10_000,
    "tiff_adobe_deflate": 10_000,
}
"""More pixels than a byte of a file can describe, by format or TIFF compression. Deflate: 1032 bytes of 8 one-bit
pixels. LZW: the longest string, for 12 bits. JPEG: 64 pixels take 1 bit or more. The other compressions of TIFF have
none, nor have JPEG 2000 and WebP: their numbers hold only above ``_BLANK``, where they refuse some blank images."""
_BLANK = 2**26
"""Pixels that a JPEG 2000 or WebP of any length may claim: a blank WebP of any size can take 34 bytes."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: first column, first row, step of columns, step of rows."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of a PNG, by its colour type."""
REWRITE = "rewrite it, such as with `gdal_translate -co COMPRESS=DEFLATE -co INTERLEAVE=PIXEL`"
"""The cure for a TIFF of a kind that Pillow cannot read."""
_NOISE = bytes(range(1, 255))
_MORE = _NOISE + b"".join(b"\xff" + bytes([0xD0 + n]) + _NOISE for n in range(8))
"""Data of a JPEG that any scan can go on with, from its middle or from a restart on."""
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""Ends the data of a scan: zeros are stuffing, the others restarts."""


class ClaimError(ValueError):
    """The file does not hold what its header claims, or claims too much."""


def check_size(size: tuple[int, int], kind: str | None, path: Path, most_pixels: int) -> None:
    """Checks the size before memory for the pixels is taken.

    Args:
        size: width and height that the file claims [px].
        kind: Pillow's name of the format or, of a TIFF, of the compression; ``None``: one that it does not know.
        path: the file.
        most_pixels: limit for width x height.

    Raises:
        ClaimError: the image is larger, or larger than a file of that many bytes can be.
    """
    width, height = size
    if width * height > most_pixels:
        raise ClaimError(
            f"{width} x {height} pixels, expected at most {most_pixels} ({most_pixels / 1e6:g} megapixels); if you "
            "trust the file, raise images.max_megapixels (--max_megapixels)"
        )
    stored, most = path.stat().st_size, _PIXELS_A_BYTE.get(kind or "")
    allowed = _BLANK if kind in ("JPEG2000", "WEBP") else 0
    if most is not None and width * height > max(allowed, most * stored):
        raise ClaimError(f"claims {width} x {height} pixels, more than its {stored} bytes can hold; it is damaged")


def check_tiff(image: TiffImagePlugin.TiffImageFile, path: Path) -> None:
    """Checks, before it is loaded, that the file has the data of every strip or tile.

    Raises:
        ClaimError: some are missing, shorter than their pixels, or outside the file.
    """
    tags, compression = image.tag_v2, image.info.get("compression")
    if compression == "tiff_jpeg":  # of TIFF 6.0, which keeps its data elsewhere
        return
    width, height = int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH])
    kind, columns, rows = "strips", width, int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
    offsets, counts = tags.get(TiffImagePlugin.STRIPOFFSETS), tags.get(TiffImagePlugin.STRIPBYTECOUNTS)
    if offsets is None:
        kind, columns, rows = "tiles", int(tags[TiffImagePlugin.TILEWIDTH]), int(tags[TiffImagePlugin.TILELENGTH])
        offsets, counts = tags[TiffImagePlugin.TILEOFFSETS], tags.get(TiffImagePlugin.TILEBYTECOUNTS)
    rows = min(rows, height) if kind == "strips" else rows  # "all rows in one strip" is 2^32 - 1
    if min(columns, rows) < 1:
        raise ClaimError(f"{kind} of {columns} x {rows} pixels; it is damaged")
    separate = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    samples = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    down = -(-height // rows)
    wanted = down * -(-width // columns) * (samples if separate else 1)
    if len(offsets) < wanted:
        raise ClaimError(f"claims {width} x {height} pixels in {wanted} {kind}, holds {len(offsets)} of them")
    if counts is not None and len(counts) < wanted:
        raise ClaimError(f"claims {wanted} {kind}, gives the length of {len(counts)}; it is damaged")
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    bits_a_pixel = bits[0] if separate else sum(bits[:samples]) if len(bits) > 1 else samples * bits[0]
    row_bytes = -(-columns * int(bits_a_pixel) // 8)
    stored = path.stat().st_size
    with path.open("rb") as file:
        for n, offset in enumerate(islice(offsets, wanted)):
            full = kind == "tiles" or n % down < down - 1
            rows_here = rows if full else height - rows * (down - 1)
            needed = row_bytes * rows_here if compression == "raw" else 1
            held = needed if counts is None else counts[n]
            if kind == "tiles" and counts is not None and offset == held == 0:
                raise ClaimError(f"a sparse TIFF: number {n + 1} of its {wanted} tiles is not stored; {REWRITE}")
            short = held < needed or offset < 8 or offset + needed > stored
            # libtiff is content with a JPEG of fewer rows than its strip; separate planes may be subsampled.
            if short or (compression == "jpeg" and not separate and _jpeg_rows(file, offset) < rows_here):
                raise ClaimError(f"number {n + 1} of its {wanted} {kind} is cut short or missing")


def _jpeg_rows(file: BinaryIO, offset: int) -> int:
    """The number of rows that the header of a JPEG stream at ``offset`` states; 0 if there is none."""
    file.seek(offset + 2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF and head[1] != 0xDA:
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):  # a frame's header
            return int.from_bytes(file.read(3)[1:], "big")
        file.seek(int.from_bytes(head[2:], "big") - 2, os.SEEK_CUR)
    return 0


def check_jpeg_2000(path: Path) -> None:
    """Checks, before it is loaded, that the file has every tile.

    Raises:
        ClaimError: some are missing.
    """
    wanted, held = 0, set()
    with path.open("rb") as file:
        _seek_codestream(file)
        while len(head := file.read(4)) == 4 and head[:2] != b"\xff\xd9":
            length = int.from_bytes(head[2:], "big")
            if head[:2] == b"\xff\x51":  # SIZ: sizes of image and tiles, and where the first tile begins
                right, bottom, _, _, columns, rows, left, top = struct.unpack(">8I", file.read(length - 2)[2:34])
                wanted = -(-(right - left) // columns) * -(-(bottom - top) // rows)
            elif head[:2] == b"\xff\x90":  # SOT: a tile's number, and the length of this part of it
                number, length = struct.unpack(">HI", file.read(6))
                held.add(number)
                if length < 14:  # 0: the rest of the file
                    break
                file.seek(length - 10, os.SEEK_CUR)
            else:
                file.seek(length - 2, os.SEEK_CUR)
    if len(held) < wanted:
        raise ClaimError(f"claims {wanted} tiles, holds {len(held)} of them; it is cut short or damaged")


def _seek_codestream(file: BinaryIO) -> None:
    """To behind the first marker of the data, which may lie in a box of a file of boxes."""
    if file.read(2) == b"\xff\x4f":
        return
    file.seek(0)
    while len(head := file.read(8)) == 8 and head[4:] != b"jp2c":
        length = int.from_bytes(head[:4], "big")
        file.seek(int.from_bytes(file.read(8), "big") - 16 if length == 1 else length - 8, os.SEEK_CUR)
    file.seek(10 if head[:4] == b"\0\0\0\1" else 2, os.SEEK_CUR)  # a long box has 8 bytes of length


def check_jpeg(image: Image.Image, path: Path) -> None:
    """Checks, after it is loaded, that no scan of the file ends early.

    libjpeg fills what is missing with grey. With more data where a scan ends, it decodes those instead, but skips them
    behind a whole scan. So the file is decoded again if its last pixel may be that grey, or if it is progressive, where
    what is missing may be detail only.

    Raises:
        ClaimError: some scan does.
    """
    width, height = image.size
    corner = np.asarray(image.getpixel((width - 1, height - 1)))
    grey = ((corner == 127) | (corner == 128)).all()
    blended = 1 in (width % 16, height % 16)  # colours of a block's first pixels are blended with the block before
    if not (grey or blended or image.info.get("progressive")):
        return
    longer = _with_longer_scans(path.read_bytes())
    if longer is None:
        return
    with JpegImagePlugin.JpegImageFile(io.BytesIO(longer)) as other:
        if not np.array_equal(np.asarray(other), np.asarray(image)):
            raise ClaimError(f"claims {width} x {height} pixels, its data end early; it is cut short")


def _with_longer_scans(data: bytes) -> bytes | None:
    """A JPEG with more data at the end of each scan, and nothing behind it.

    None if it is arithmetically coded, where zeros at the end are left out by right, or has no end.
    """
    parts: list[bytes] = []
    start, at = 0, 2
    while marker := _MARKER.search(data, at):
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return b"".join([*parts, data[start:at]])
        if 0xC9 <= kind <= 0xCF and kind != 0xCC:
            return None
        at += int.from_bytes(data[at : at + 2], "big")
        if kind == 0xDA and (end := _MARKER.search(data, at)):
            parts += [data[start : end.start()], _MORE]
            start = at = end.start()
    return None


def check_png(image: Image.Image, path: Path) -> None:
    """Checks, after it is loaded, that the file has the data of every row.

    Only if the last row is zero, as it is if there were no data for it, the file is read once more.

    Raises:
        ClaimError: there are fewer rows.
    """
    width, height = image.size
    if not image.info.get("interlace") and np.asarray(image.crop((0, height - 1, width, height))).any():
        return
    with path.open("rb") as file:
        claimed, held = _png_bytes(file)
    if held < claimed:
        raise ClaimError(f"claims {width} x {height} pixels, holds {held} of {claimed} bytes of them; it is cut short")


def _png_bytes(file: BinaryIO) -> tuple[int, int]:
    """Decompressed size of the pixels that a PNG's header claims, and of those it holds (counted no further)."""
    file.seek(8)
    inflate, claimed, held = zlib.decompressobj(), 0, 0
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"IHDR":
            claimed = _claimed_bytes(file.read(length))
        elif head[4:] == b"IDAT":
            data = file.read(length)
            while data and held < claimed:
                held += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
            if held >= claimed:
                break
        else:
            file.seek(length, os.SEEK_CUR)
        file.seek(4, os.SEEK_CUR)  # the chunk's checksum
    return claimed, held


def _claimed_bytes(header: bytes) -> int:
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits = header[8] * _CHANNELS[header[9]]
    passes = _ADAM7 if header[12] else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    return sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
