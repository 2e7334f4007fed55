"""Image and label files that few programs write, whose pixels are easily read as something else."""

from __future__ import annotations

import json
import logging
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparserefine.data.readers.pairs import pairs_csv
from sparserefine.files import samples
from sparserefine.files.image_config import ImageConfig, Percentiles
from sparserefine.files.images import ImageError, read_image, read_pixels
from sparserefine.files.labels import read_label
from sparserefine.files.rasters import have_rasters
from tiffs import write_tiff

raster = pytest.mark.skipif(not have_rasters(), reason="needs rasterio: pip install sparserefine[raster]")
NIR = np.full((4, 5, 4), 90, np.uint8)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_told", set())


def write_png(path: Path, size: tuple[int, int], bits: int, colour: int, rows: bytes) -> Path:
    """A PNG of rows as they are stored."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0)
    length = len(rows) // size[0]
    lines = b"".join(b"\0" + rows[start : start + length] for start in range(0, len(rows), length))
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_a_header_that_only_pillow_takes(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", NIR, photometric=2, extra=[0])
    path.write_bytes(b"II\0*" + path.read_bytes()[4:])
    with pytest.raises(ImageError, match="odd header, so what its bands are is not known; rewrite it"):
        read_image(path)
    with pytest.raises(ImageError, match="odd header"):
        read_label(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_shown_as_white(dtype: type[np.unsignedinteger], tmp_path: Path) -> None:
    most = np.iinfo(dtype).max
    pixels = np.array([[0, most, most // 5]], dtype)[..., None]
    path = write_tiff(tmp_path / "a.tif", pixels, photometric=0)
    assert read_image(path)[:, 0].tolist() == [[255, 0, 204]] * 3


def test_white_is_zero_of_16_bits_in_a_range(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.array([[[0], [500], [1000]]], np.uint16), photometric=0)
    with pytest.raises(ImageError, match=r"1 band of uint16, of which 0 is white; images.bands: \[1\] reads them as"):
        read_image(path, ImageConfig(range=(0, 1000)))
    assert read_image(path, ImageConfig(bands=(1,), range=(0, 1000)))[0, 0].tolist() == [0, 0.5, 1]


@raster
def test_a_chosen_band_in_which_white_is_zero_is_read_as_stored(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.array([[[0], [7], [255]]], np.uint8), photometric=0)
    assert read_image(path, ImageConfig(bands=(1,)))[0, 0].tolist() == [0, 7, 255]


def four_bits(path: Path) -> Path:
    """A TIFF of one row, 0 to 9 in 4 bits each."""
    write_tiff(path, np.array([[[0x01], [0x23], [0x45], [0x67], [0x89]]], np.uint8), photometric=1)
    data = path.read_bytes()
    for tag, kind, old, new in ((256, "I", 5, 10), (258, "H", 8, 4)):
        at = data.index(struct.pack(f"<HHI{kind}", tag, {"I": 4, "H": 3}[kind], 1, old)) + 8
        data = data[:at] + struct.pack(f"<{kind}", new) + data[at + struct.calcsize(kind) :]
    path.write_bytes(data)
    return path


@raster
def test_a_range_is_of_the_values_that_4_bits_store(tmp_path: Path) -> None:
    path = four_bits(tmp_path / "a.tif")
    assert read_image(path)[0, 0].tolist() == [17 * k for k in range(10)]
    in_range = read_image(path, ImageConfig(range=(0, 10)))[0, 0].tolist()
    assert in_range == pytest.approx([k / 10 for k in range(10)])


def test_labels_of_4_bits_have_two_meanings(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"greys of 4 bits, in which a viewer shows number 1 as 17, .*save it with"):
        read_label(four_bits(tmp_path / "a.tif"))
    with pytest.raises(ImageError, match="greys of 2 bits, in which a viewer shows number 1 as 85"):
        read_label(write_png(tmp_path / "a.png", (1, 4), 2, 0, bytes([0b00011011])))
    mask = write_png(tmp_path / "mask.png", (1, 4), 2, 0, bytes([0b00111100]))
    assert read_label(mask).tolist() == [[0, 255, 255, 0]]


@pytest.mark.parametrize("colour", [2, 4])
def test_labels_of_16_bits_in_several_channels(colour: int, tmp_path: Path) -> None:
    pixels = np.full((1, 4, {2: 3, 4: 2}[colour]), 65535, ">u2")
    pixels[..., : {2: 3, 4: 1}[colour]] = np.arange(4)[None, :, None]
    path = write_png(tmp_path / "a.png", (1, 4), 16, colour, pixels.tobytes())
    with pytest.raises(ImageError, match="16 bits in each of several channels, expected 8"):
        read_label(path)


def test_labels_of_16_bits_in_a_ppm(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6\n2 1\n65535\n" + np.array([1, 1, 1, 2, 2, 2], ">u2").tobytes())
    with pytest.raises(ImageError, match="16 bits in each of several channels, expected 8"):
        read_label(tmp_path / "a.ppm")
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n" + np.array([1, 2], ">u2").tobytes())
    assert read_label(tmp_path / "a.pgm").tolist() == [[1, 2]]


def test_labels_in_jpeg_2000_may_be_cut_off_at_a_size(tmp_path: Path) -> None:
    label = Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64), dtype=np.uint8))
    label.save(tmp_path / "a.jp2", quality_mode="rates", quality_layers=[30])  # the transform without loss
    with pytest.raises(ImageError, match="JPEG 2000, which changes values"):
        read_label(tmp_path / "a.jp2")


@pytest.mark.parametrize("config", [ImageConfig(), ImageConfig(range=(0, 10)), ImageConfig(bands=(1,), range=(0, 10))])
def test_complex_pixels(config: ImageConfig, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.full((4, 5, 1), 5, np.uint64), photometric=1)
    data = path.read_bytes()
    at = data.index(struct.pack("<HHIH", 339, 3, 1, 1)) + 8
    path.write_bytes(data[:at] + struct.pack("<H", 6) + data[at + 2 :])
    with pytest.raises(ImageError, match="complex float pixels of 64 bits, expected whole or floating-point ones"):
        read_image(path, config)


def test_bytes_with_sign_need_a_range(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.full((4, 5, 1), 100, np.int8), photometric=1)
    with pytest.raises(ImageError, match="integer pixels of 8 bits with sign have no defined range; say which"):
        read_image(path)


def test_large_unsigned_numbers_are_named_as_they_are(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.full((4, 5, 1), 3_000_000_000, np.uint32), photometric=1)
    with pytest.raises(ImageError, match=r"integer pixels 3000000000\.\.3000000000, expected 0\.\.65535"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_told(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(np.full((4, 5, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    with caplog.at_level(logging.WARNING):
        assert int(read_image(tmp_path / f"a.{suffix}").max()) == 10
    assert "an animation; only its first picture is read" in caplog.text


@raster
def test_files_beside_a_raster_count_for_nothing(tmp_path: Path) -> None:
    import rasterio

    path = write_tiff(tmp_path / "a.tif", np.full((4, 5, 4), 1000, np.uint16), photometric=2, extra=[0])
    mask = write_tiff(tmp_path / "mask.tif", np.zeros((4, 5, 1), np.uint8), photometric=1)
    with rasterio.open(mask, "r+") as dataset:
        dataset.update_tags(INTERNAL_MASK_FLAGS_1="2")
    mask.rename(tmp_path / "a.tif.msk")
    with rasterio.open(path) as dataset:
        assert not dataset.read_masks(1).any()
    assert read_pixels(path, ImageConfig(bands=(1, 2, 3, 4))).valid is None


def test_nodata_is_a_number_that_a_configuration_can_store() -> None:
    with pytest.raises(ValueError, match="nodata = nan, expected a finite number: NaN and"):
        ImageConfig(nodata=math.nan)
    one, other = (
        ImageConfig(nodata=0, range=Percentiles((2, 98))),
        ImageConfig(nodata=0.0, range=Percentiles((2.0, 98.0))),
    )
    assert one.digest("a") == other.digest("a")
    assert json.dumps(one.nodata) == "0.0"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("i,j.png,l.png,train", r"row 'i,j.png,l.png,train' has 4 columns, expected 3"),
        (",l.png,train", "names no image, expected its path"),
        (".,l.png,train", "names no image, expected its path"),
        ("x" * 200_000 + ",l.png,train", r"no table of image,label,split \(field larger than .*check quotes"),
    ],
    ids=["comma", "empty", "dot", "long"],
)
def test_rows_of_a_table_that_are_none(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for name in ("i.png", "l.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "pairs.csv").write_text(f"image,label,split\ni.png,l.png,train,\n{row}\n")
    with pytest.raises(ValueError, match=message):
        pairs_csv(tmp_path, "train")
