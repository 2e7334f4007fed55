"""Image files that lie, and files that are no images: one line each, and nothing runs or is taken for black pixels."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps
from torch import Tensor

from sparserefine.files import claims, images
from sparserefine.files.images import ImageError, read_image
from sparserefine.files.labels import read_label

HEIGHT, WIDTH, CLAIMED = 16, 50, 300
PIXELS = np.random.default_rng(7).integers(1, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
Reader = Callable[[Path], Tensor]


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytearray:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def refused(path: Path, content: bytes, read: Reader = read_image) -> str:
    """The one line that refuses the content."""
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- formats


@pytest.mark.parametrize("read", [read_image, read_label])
def test_postscript_never_reaches_ghostscript(read: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, program = tmp_path / "mark", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it looks for the program once
    path = tmp_path / "a.png"
    assert "not a readable image" in refused(
        path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", read
    )
    assert not mark.exists()
    with Image.open(path) as image, suppress(OSError):
        image.load()
    assert mark.exists(), "Pillow does not run the program either, so this test would not notice"


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "SGI", "DDS"])
def test_other_formats_of_pillow_are_refused(kind: str, tmp_path: Path) -> None:
    assert "expected PNG, JPEG" in refused(tmp_path / "a.png", encoded(kind))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_the_content_decides_not_the_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(kind))
    assert torch.equal(read_image(tmp_path / "a.jpg"), torch.from_numpy(PIXELS).permute(2, 0, 1))


# ---- headers that claim more rows than there are


def taller(kind: str, data: bytearray) -> bytearray:
    """The file with ``CLAIMED`` rows in its header."""
    if kind == "PNG":
        data[20:24] = struct.pack(">I", CLAIMED)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[22:26] = struct.pack("<i", CLAIMED)
    elif kind == "GIF":
        frame = data.rfind(b"\x2c\0\0\0\0")
        data[8:10] = data[frame + 7 : frame + 9] = struct.pack("<H", CLAIMED)
    else:
        assert kind == "PPM"
        data = data.replace(b"50 16", b"50 %d" % CLAIMED, 1)
    return data


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("PNG", "BMP") for mode in ("RGB", "1", "P")]
    + [("GIF", "P"), ("PPM", "RGB"), ("PPM", "1")],
)
def test_fewer_rows_than_claimed(kind: str, mode: str, tmp_path: Path) -> None:
    data = taller(kind, encoded(kind, Image.fromarray(PIXELS).convert(mode)))
    message = refused(tmp_path / "a.png", data)
    assert "cut short" in message or "bytes can hold" in message


def tiff(compression: str | None, changes: dict[int, int], mode: str = "RGB") -> bytearray:
    """A TIFF in strips of 8 rows, with other values of some tags."""
    image = Image.fromarray(PIXELS).convert(mode)
    data = encoded("TIFF", image, compression=compression, tiffinfo={278: 8})
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack("<HH", data[entry : entry + 4])
        if tag in changes:
            assert kind in (3, 4)
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, changes[tag])
    return data


COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tiff_with_fewer_strips_than_claimed(compression: str | None, tmp_path: Path) -> None:
    mode = "1" if compression == "group4" else "RGB"
    (tmp_path / "whole.tif").write_bytes(tiff(compression, {}, mode))
    assert read_image(tmp_path / "whole.tif").shape == (3, HEIGHT, WIDTH)
    message = refused(tmp_path / "a.tif", tiff(compression, {257: 20}, mode))  # rows, in a third strip
    assert "claims 50 x 20 pixels in 3 strips, holds 2" in message


@pytest.mark.parametrize("compression", [c for c in COMPRESSIONS if c != "group4"])
def test_tiff_with_one_strip_of_fewer_rows_than_claimed(compression: str | None, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    data = encoded("TIFF", image, compression=compression)
    whole = tmp_path / "whole.tif"
    whole.write_bytes(data)
    assert read_image(whole).shape == (3, HEIGHT, WIDTH)
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[entry : entry + 2])[0] in (257, 278):
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 20)
    assert "cut short" in refused(tmp_path / "a.tif", data + bytes(4000))


def test_tiff_whose_strip_lies_outside_the_file(tmp_path: Path) -> None:
    data = encoded("TIFF")
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[entry : entry + 2])[0] == 273:
            data[entry + 8 : entry + 12] = struct.pack("<I", len(data) - 5)
    assert "number 1 of its 1 strips is cut short or missing" in refused(tmp_path / "a.tif", data)


@pytest.mark.parametrize("boxes", [True, False], ids=["jp2", "j2k"])
def test_jpeg_2000_with_fewer_tiles_than_claimed(boxes: bool, tmp_path: Path) -> None:
    data = encoded("JPEG2000", tile_size=(16, 16), no_jp2=not boxes)
    (tmp_path / "whole.jp2").write_bytes(data)
    assert torch.equal(read_image(tmp_path / "whole.jp2"), torch.from_numpy(PIXELS).permute(2, 0, 1))
    size = data.find(b"\xff\x51")
    data[size + 10 : size + 14] = struct.pack(">I", CLAIMED)
    if boxes:
        header = data.find(b"ihdr")
        data[header + 4 : header + 8] = struct.pack(">I", CLAIMED)
    assert "claims 76 tiles, holds 4 of them" in refused(tmp_path / "a.jp2", data)


def test_a_sparse_tiff_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    entries = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: 16, 323: 16, 324: 0, 325: 0}
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + bytes(4)
    message = refused(tmp_path / "a.tif", data + bytes(300))
    assert "a sparse TIFF: number 1 of its 1 tiles is not stored; rewrite it" in message


@pytest.mark.parametrize("changes", [{259: 34712}, {258: 7}], ids=["compression", "bits"])
def test_a_tiff_that_pillow_cannot_read_needs_rasterio(
    changes: dict[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    message = refused(tmp_path / "a.tif", tiff("tiff_lzw", changes, "L"))
    assert message.endswith(", which Pillow does not read; rasterio does: pip install sparserefine[raster]")
    assert "gdal" not in refused(tmp_path / "a.png", encoded("PNG")[:60])


# ---- JPEG: data that end early


SMOOTH = Image.fromarray(PIXELS).resize((200, 256))
JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "restarts at rows": {"restart_marker_rows": 1},
    "whole colours": {"subsampling": 0},
    "progressive": {"progressive": True},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_jpeg_whose_data_end_early(options: dict[str, object], mode: str, tmp_path: Path) -> None:
    image = SMOOTH.convert(mode)
    if mode == "CMYK":  # Pillow leaves black empty
        image = Image.merge(mode, (*SMOOTH.split(), SMOOTH.convert("L")))
    for width, height in ((200, 256), (97, 113)):  # the second: blocks of which one pixel is seen
        data = encoded("JPEG", image.crop((0, 0, width, height)), **options)
        path, middle = tmp_path / "a.jpg", (data.rfind(b"\xff\xda") + len(data)) // 2  # of the last scan
        assert "its data end early" in refused(path, data[:middle] + b"\xff\xd9")
        assert "its data end early" in refused(path, data[:middle] + b"\xff\xd9" + data)


def test_jpeg_with_fewer_rows_than_claimed(tmp_path: Path) -> None:
    for options in (JPEGS["baseline"], JPEGS["restarts"], JPEGS["progressive"]):
        data = encoded("JPEG", SMOOTH, **options)
        frame = data.find(b"\xff\xc2" if "progressive" in options else b"\xff\xc0")
        data[frame + 5 : frame + 7] = struct.pack(">H", 2000)
        assert "claims 200 x 2000 pixels, its data end early" in refused(tmp_path / "a.jpg", data)


def test_jpeg_cut_before_a_restart(tmp_path: Path) -> None:
    data = encoded("JPEG", SMOOTH, restart_marker_rows=1)
    assert "its data end early" in refused(tmp_path / "a.jpg", data[: data.find(b"\xff\xd3")] + b"\xff\xd9")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_whole_jpegs(options: dict[str, object], mode: str, tmp_path: Path) -> None:
    """Some end with the grey of missing data, by right."""
    path = tmp_path / "a.jpg"
    for width, height in ((1, 1), (7, 9), (64, 48), (97, 113)):
        for level in (None, 0, 127, 128, 255):
            image = SMOOTH.crop((0, 0, width, height)).copy()
            for top in () if level is None else (0, height // 2):  # blank, with a border
                image = SMOOTH.crop((0, 0, width, height)).copy()
                image.paste((level, level, level), (0, top, width, height))
                path.write_bytes(encoded("JPEG", image.convert(mode), **options) + b"trailing" * (top > 0))
                assert read_image(path).shape == (3, height, width)
            path.write_bytes(encoded("JPEG", image.convert(mode), **options))
            assert read_image(path).shape == (3, height, width)


@pytest.mark.parametrize("options", [JPEGS["baseline"], JPEGS["progressive"]], ids=["baseline", "progressive"])
def test_jpegs_with_others_inside_or_behind(options: dict[str, object], tmp_path: Path) -> None:
    grey, exif = Image.new("RGB", (40, 30), (128, 128, 128)), Image.Exif()
    path, thumbnail = tmp_path / "a.jpg", bytes(encoded("JPEG", SMOOTH.resize((16, 16))))
    data = encoded("JPEG", grey, exif=exif, **options)
    block = b"Exif\0\0" + thumbnail
    data[2:2] = b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block
    path.write_bytes(data + thumbnail)
    assert (read_image(path) == 128).all()
    grey.save(path, "MPO", save_all=True, append_images=[SMOOTH], **options)
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert (read_image(path) == 128).all()


def test_zeros_at_the_end_of_an_arithmetically_coded_jpeg_are_left_out_by_right() -> None:
    data = encoded("JPEG", SMOOTH)
    assert claims._with_longer_scans(bytes(data)) is not None
    data[data.find(b"\xff\xc0") + 1] = 0xC9
    assert claims._with_longer_scans(bytes(data)) is None


# ---- PNG: rows of zeros are rows, and so are interlaced ones

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def interlaced(grey: np.ndarray, passes: int = 7) -> bytes:
    """An interlaced PNG of ``uint8 [H, W]`` with its first passes only."""
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in ADAM7[:passes] for row in grey[y::dy, x::dx] if row.size)
    height, width = grey.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 2), (16, 50), (17, 13)], ids=str)
@pytest.mark.parametrize("high", [1, 256], ids=["zeros", "noise"])
def test_interlaced_png(high: int, size: tuple[int, int], tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, high, size).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(interlaced(grey))
    assert torch.equal(read_label(tmp_path / "a.png"), torch.from_numpy(grey).long())
    if min(size) > 1:
        assert "cut short" in refused(tmp_path / "b.png", interlaced(grey, passes=6), read_label)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_png_of_zeros(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (13, 9)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (3, 9, 13)


# ---- sizes


def test_more_pixels_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    assert f"{WIDTH} x {HEIGHT} pixels, expected at most 799" in refused(tmp_path / "a.png", encoded("PNG"))
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH)
    assert read_image(tmp_path / "a.png").shape == (3, HEIGHT, WIDTH)


def test_pillows_own_limit_plays_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(tmp_path / "a.png").shape == (3, HEIGHT, WIDTH)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG", "JPEG2000", "PPM", "WEBP"])
def test_claims_beyond_any_file_of_that_length_take_no_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = Image.new("RGB", (WIDTH, HEIGHT)) if kind in ("WEBP", "JPEG2000") else None
    data, side = encoded(kind, blank, **({"lossless": True, "method": 0} if kind == "WEBP" else {})), 30_000
    if kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "JPEG":
        frame = data.find(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif kind == "JPEG2000":
        header = data.find(b"ihdr")
        data[header + 4 : header + 12] = struct.pack(">II", side, side)
    elif kind == "WEBP":
        side, header = 16_383, data.find(b"VP8L") + 9  # 14 bits for each side, less one
        data[header : header + 4] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    else:
        data = data.replace(b"50 16", b"%d %d" % (side, side), 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert f"claims {side} x {side} pixels, more than its {len(data)} bytes can hold" in refused(
        tmp_path / "a.png", data
    )


def test_blank_images_take_few_bytes(tmp_path: Path) -> None:
    for suffix, side, options in ((".webp", 1024, {"lossless": True, "method": 0}), (".jp2", 2048, {})):
        path = tmp_path / f"a{suffix}"
        Image.new("RGB", (side, side)).save(path, **options)
        assert path.stat().st_size < side * side / 10_000
        assert read_image(path).shape == (3, side, side)


@pytest.mark.slow
def test_a_blank_jpeg_2000_of_36_megapixels(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 6000)).save(tmp_path / "a.jp2")
    assert read_image(tmp_path / "a.jp2").shape == (3, 6000, 6000)


@pytest.mark.slow
def test_200_megapixels_of_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("1", (20_000, 10_000)).save(path, compression="group4")
    assert read_image(path).shape == (3, 10_000, 20_000)


# ---- Pillow's settings


def test_truncated_files_are_refused_whatever_a_program_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded("JPEG")
    assert "cut short" in refused(tmp_path / "a.jpg", data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_last_of_several_readers_restores_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with images._OURS:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with images._OURS:
        thread.start()
        assert inside.wait(10)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    leave.set()
    thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES


# ---- no regular files, damaged EXIF, whatever Pillow raises


@pytest.mark.parametrize("read", [read_image, read_label])
def test_what_is_no_file_is_named(read: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for path, words in (
        (tmp_path / "fifo.png", "is a FIFO"),
        (Path("/dev/zero"), "is a character device"),
        (tmp_path, "is a folder"),
        (Path(), "the path is empty"),
        (tmp_path / "a\0b.png", r"is no path"),
        (tmp_path / ("x" * 300), "cannot be looked up"),
    ):
        with pytest.raises(ImageError, match=words):
            read(path)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ImageError, match="may not be read"):
        read(tmp_path / "a.png")


def test_names_are_printed_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "a\nb\x1b[31m.png")
    assert str(caught.value).isprintable()
    assert r"a\nb\x1b[31m.png" in str(caught.value)


def test_a_damaged_exif_block_still_turns_the_picture(tmp_path: Path) -> None:
    """A tag with a value that Pillow reads but cannot write."""
    entries = ((0x0100, 9, 1, struct.pack("<i", -1)), (0x0112, 3, 1, struct.pack("<HH", 6, 0)))
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    block += b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path, exif=block)
    with Image.open(path) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert torch.equal(read_image(path), torch.from_numpy(np.rot90(PIXELS, -1).copy()).permute(2, 0, 1))


def test_an_exif_block_that_cannot_be_read_turns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(image: Image.Image) -> Image.Exif:
        raise OverflowError("argument out of range")

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image.Image, "getexif", damaged)
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(PIXELS).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (struct.error("unpack requires\na buffer"), "cut short"),
        (zlib.error("invalid block"), "cut short"),
        (RecursionError("too deep"), "cut short"),
        (OverflowError(), "cut short (OverflowError)"),
        (MemoryError(), "not enough memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_pillow_raises_is_one_line(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    assert words in refused(tmp_path / "a.png", encoded("PNG"))
