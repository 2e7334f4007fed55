"""Writes TIFF files of any bands and depth, which Pillow does not write."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

_GEO = ((33550, 12, (0.5, 0.5, 0.0)), (33922, 12, (0.0, 0.0, 0.0, 500_000.0, 4_000_000.0, 0.0)))
_KEYS = (34735, 3, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633))  # projected, EPSG:32633
_CODES = {3: "H", 4: "I", 12: "d"}
_KINDS = {"u": 1, "i": 2, "f": 3}


def write_tiff(
    path: Path,
    pixels: np.ndarray,
    *,
    photometric: int,
    extra: Sequence[int] = (),
    planar: bool = False,
    nodata: str = "",
    geo: bool = False,
    orientation: int = 1,
    order: Literal["<", ">"] = "<",
) -> Path:
    """An uncompressed TIFF in one strip (or one for each band).

    Args:
        path: the file.
        pixels: ``[H, W, C]``.
        photometric: 1 for grey, 2 for red, green and blue.
        extra: what each extra band is: 0 unknown, 1 and 2 transparency.
        planar: bands one behind the other.
        nodata: GDAL's text of the value that marks pixels without data.
        geo: half a metre a pixel, in EPSG:32633.
        orientation: as EXIF counts it.
        order: ``<`` or ``>``, order of the bytes.
    """
    height, width, bands = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order))
    stored = np.ascontiguousarray(data.transpose(2, 0, 1) if planar else data).tobytes()
    strips = bands if planar else 1
    tags: list[tuple[int, int, tuple[float, ...]]] = [
        (256, 4, (width,)),
        (257, 4, (height,)),
        (258, 3, (8 * pixels.dtype.itemsize,) * bands),
        (259, 3, (1,)),
        (262, 3, (photometric,)),
        (273, 4, (0,) * strips),
        (274, 3, (orientation,)),
        (277, 3, (bands,)),
        (278, 4, (height,)),
        (279, 4, (len(stored) // strips,) * strips),
        (284, 3, (2 if planar else 1,)),
        *([(338, 3, tuple(extra))] if extra else []),
        (339, 3, (_KINDS[pixels.dtype.kind],) * bands),
        *((*_GEO, _KEYS) if geo else ()),
    ]
    texts = [(42113, nodata.encode() + b"\0")] if nodata else []
    start = 8 + 2 + 12 * (len(tags) + len(texts)) + 4
    directory, beside = b"", b""
    sizes = [len(values) * struct.calcsize(_CODES[kind]) for _, kind, values in tags] + [len(t) for _, t in texts]
    first = start + sum(size + size % 2 for size in sizes if size > 4)

    def add(tag: int, kind: int, count: int, value: bytes) -> None:
        nonlocal directory, beside
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack(f"{order}I", start + len(beside))
            beside += value + b"\0" * (len(value) % 2)

    for tag, kind, values in tags:
        if tag == 273:
            values = tuple(first + n * (len(stored) // strips) for n in range(strips))
        add(tag, kind, len(values), struct.pack(f"{order}{len(values)}{_CODES[kind]}", *values))
    for tag, text in texts:
        add(tag, 2, len(text), text)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags) + len(texts))
    path.write_bytes(head + directory + bytes(4) + beside + stored)
    return path
