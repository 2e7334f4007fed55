"""Images of any bands and depth: what is read, what is refused, and what is told."""

from __future__ import annotations

import logging
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from sparserefine.files import images, samples
from sparserefine.files.image_config import ImageConfig, Percentiles
from sparserefine.files.images import ImageError, read_image, read_pixels
from sparserefine.files.rasters import have_rasters
from sparserefine.files.typed import from_json
from tiffs import write_tiff

AS_SHOWN = ImageConfig()
SIZE = (20, 30)
raster = pytest.mark.skipif(not have_rasters(), reason="needs rasterio: pip install sparserefine[raster]")
NIR = np.broadcast_to(np.array([90, 110, 70, 20], np.uint8), (*SIZE, 4))
SCENE = np.random.default_rng(0).integers(0, 3000, (*SIZE, 8)).astype(np.uint16)
SCENE[3, 4, :] = 2999
FLOATS = (SCENE / 10_000).astype(np.float32)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_told", set())


@pytest.fixture
def no_rasterio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)


def refused(path: Path, config: ImageConfig = AS_SHOWN) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path, config)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def planes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def scaled(array: np.ndarray, low: float, high: float) -> Tensor:
    """The definition of a range, in double precision."""
    return planes(((array.astype(np.float64) - low) / (high - low)).clip(0, 1)).float()


# ---- a fourth band of 8 bits


@pytest.mark.parametrize("extra", [2, 1, 0], ids=["transparency", "multiplied transparency", "unnamed"])
def test_a_fourth_band_is_not_blended_or_dropped(extra: int, tmp_path: Path) -> None:
    """It is infrared: 20 everywhere. Blended over white, (90, 110, 70) would read (242, 244, 240)."""
    message = refused(write_tiff(tmp_path / "a.tif", NIR, photometric=2, extra=[extra]))
    assert message.startswith("4 bands of uint8: 1 red, 2 green, 3 blue, 4 ")
    assert "images.bands: [1, 2, 3]" in message


def test_a_band_of_infrared_is_unlike_transparency(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    path = write_tiff(tmp_path / "a.tif", values, photometric=2, extra=[2])
    opaque, clear = (values[..., 3] == 255).sum(), (values[..., 3] == 0).sum()
    assert f"{opaque} of its 600 pixels are opaque and {clear} transparent, unlike a picture's" in refused(path)


def test_transparency_of_a_picture_is_blended(tmp_path: Path) -> None:
    """A logo: opaque in the middle, with a soft edge, on nothing."""
    values = np.random.default_rng(1).integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    values[..., 3] = 0
    values[4:16, 4:26, 3] = 128
    values[5:15, 5:25, 3] = 255
    found = read_image(write_tiff(tmp_path / "a.tif", values, photometric=2, extra=[2]))
    Image.fromarray(values).save(tmp_path / "a.png")
    assert torch.equal(found, read_image(tmp_path / "a.png"))
    assert torch.equal(found[:, 5:15, 5:25], planes(values[5:15, 5:25, :3]))


@pytest.mark.parametrize("bands", [(1, 2, 3, 4), (4, 3, 2), (4,)], ids=str)
@pytest.mark.parametrize("extra", [2, pytest.param(0, marks=raster), pytest.param(1, marks=raster)])
def test_chosen_bands_are_as_stored(extra: int, bands: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    path = write_tiff(tmp_path / "a.tif", values, photometric=2, extra=[extra])
    found = read_image(path, ImageConfig(bands=bands))
    assert found.dtype == torch.uint8
    assert torch.equal(found, planes(values[..., [band - 1 for band in bands]]))


def test_chosen_bands_of_pictures(tmp_path: Path) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "grey.png")
    numbers = Image.fromarray(rgba[..., 0] % 4, "P")
    numbers.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    numbers.save(tmp_path / "palette.tif")
    assert torch.equal(read_image(tmp_path / "a.png", ImageConfig(bands=(4, 1))), planes(rgba[..., [3, 0]]))
    assert torch.equal(read_image(tmp_path / "grey.png", ImageConfig(bands=(1,))), planes(rgba[..., :1]))
    assert set(read_image(tmp_path / "palette.tif", ImageConfig(bands=(3,))).unique().tolist()) == {3, 30, 60, 90}
    assert "band 5, the file has 4 (RGBA)" in refused(tmp_path / "a.png", ImageConfig(bands=(5,)))
    assert "band 2, the file has 1 (L)" in refused(tmp_path / "grey.png", ImageConfig(bands=(1, 2)))


def test_bands_that_a_tiff_has_not(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", NIR, photometric=2, extra=[2])
    message = refused(path, ImageConfig(bands=(1, 7)))
    assert message.startswith("images.bands asks for band 7, the file has 4 bands of uint8: 1 red")


# ---- 16 bits


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_values_of_16_bits_far_below_white_are_told_once(
    order: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, bands in (("a", 3), ("b", 1)):
        write_tiff(tmp_path / f"{name}.tif", SCENE[..., :bands], photometric=2 if bands == 3 else 1, order=order)
    with caplog.at_level(logging.WARNING):
        found = read_image(tmp_path / "a.tif")
        read_image(tmp_path / "b.tif")
    (message,) = caplog.messages
    seen = "2999" if have_rasters() else "at most 3071"
    assert f"a.tif: the largest of its 16-bit values is {seen} of 65535" in message
    assert "images.range" in message
    assert torch.equal(found, planes((SCENE[..., :3] >> 8).astype(np.uint8)))  # as before


def test_grey_of_12_bits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = SCENE[..., :1] + 1096
    path = write_tiff(tmp_path / "a.tif", values, photometric=1)
    with caplog.at_level(logging.WARNING):
        found = read_image(path)
    assert "the largest of its 16-bit values is 4095 of 65535" in caplog.text
    assert "12bit" in caplog.text
    assert found.max() == round(4095 * 255 / 65535)


@pytest.mark.parametrize("largest", [0, 2**14, 65535])
def test_values_that_use_16_bits_are_not_told(largest: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.full((4, 5, 1), largest, np.uint16)
    read_image(write_tiff(tmp_path / "a.tif", values, photometric=1))
    read_image(write_tiff(tmp_path / "b.tif", SCENE[..., :1], photometric=1), ImageConfig(range=(0, 3000)))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("given", "low", "high"), [((0, 3000), 0, 3000), ((500, 1000), 500, 1000), ("12bit", 0, 4095)], ids=str
)
def test_a_declared_range(given: object, low: float, high: float, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :1], photometric=1)
    found = read_image(path, ImageConfig(range=given))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scaled(SCENE[..., :1], low, high).repeat(3, 1, 1), rtol=0, atol=1e-6)
    assert read_image(path, ImageConfig(bands=(1,), range=given)).shape == (1, *SIZE)


def test_a_range_of_8_bits(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    ranges = ((0, 255), (50, 100), (100, 200))
    found = read_image(tmp_path / "a.png", ImageConfig(range=ranges))
    for channel, (low, high) in enumerate(ranges):
        wanted = scaled(rgb[..., channel : channel + 1], low, high)[0]
        torch.testing.assert_close(found[channel], wanted, rtol=0, atol=1e-6)


def test_percentiles_are_those_of_the_whole_image_and_each_band(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 200, (*SIZE, 3)).astype(np.uint8)
    rgb[..., 2] = 7
    Image.fromarray(rgb).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", ImageConfig(range=Percentiles((10, 90))))
    for channel in range(2):
        low, high = np.percentile(rgb[..., channel], (10, 90))
        wanted = scaled(rgb[..., channel : channel + 1], low, high)[0]
        torch.testing.assert_close(found[channel], wanted, rtol=0, atol=1e-6)
    assert (found[2] == 0).all()  # one value


@raster
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bands", [4, 8])
def test_bands_of_16_bits(bands: int, planar: bool, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :bands], photometric=1, extra=[0] * (bands - 1), planar=planar)
    found = read_image(path, ImageConfig(bands=(4, 3, 2), range=(0, 3000)))
    torch.testing.assert_close(found, scaled(SCENE[..., [3, 2, 1]], 0, 3000), rtol=0, atol=1e-6)
    full = read_image(path, ImageConfig(bands=(bands,)))
    torch.testing.assert_close(full, planes(SCENE[..., bands - 1 : bands].astype(np.float32) / 65535))


@pytest.mark.parametrize(
    ("bands", "photometric", "said"),
    [
        (4, 2, "4 bands of uint16: 1 red, 2 green, 3 blue, 4 unnamed"),
        (8, 1, "8 bands of uint16: 1 grey, 2 to 8 unnamed"),
    ],
)
def test_bands_of_16_bits_are_listed(bands: int, photometric: int, said: str, tmp_path: Path) -> None:
    extra = [0] * (bands - (3 if photometric == 2 else 1))
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :bands], photometric=photometric, extra=extra)
    assert refused(path) == f"{said}; say which to read, such as images.bands: [1, 2, 3]"


@pytest.mark.usefixtures("no_rasterio")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (SCENE, "8 bands of uint16"),
        (FLOATS[..., :3], "3 bands of float32"),
        (FLOATS.astype(np.float64), "8 bands of float64"),
    ],
    ids=["uint16", "float32", "float64"],
)
def test_without_rasterio_the_error_names_it(values: np.ndarray, said: str, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", values, photometric=1, extra=[0] * (values.shape[2] - 1), planar=True)
    message = refused(path, ImageConfig(bands=(1, 2), range=(0, 1)))
    assert message.startswith(f"{said}, which Pillow does not read; rasterio does: pip install sparserefine[raster]")


@raster
def test_three_bands_that_are_called_grey_are_the_three_channels(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :3], photometric=1, extra=[0, 0])
    found = read_image(path, ImageConfig(range=(0, 3000)))
    torch.testing.assert_close(found, scaled(SCENE[..., :3], 0, 3000), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config", [ImageConfig(range=(0, 65535)), ImageConfig(bands=(1, 2, 3))], ids=["range", "bands"]
)
def test_colours_of_16_bits_in_a_png(config: ImageConfig, tmp_path: Path) -> None:
    """Pillow reads the higher 8 bits, which is right for a picture and not for values."""
    path, low = tmp_path / "a.png", 1000
    values = SCENE[..., :3] + low
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
    path.write_bytes(
        PngImagePlugin._MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert torch.equal(read_image(path), planes((values >> 8).astype(np.uint8)))
    if have_rasters():
        torch.testing.assert_close(read_image(path, config), scaled(values, 0, 65535), rtol=0, atol=1e-6)
    else:
        assert "pip install sparserefine[raster]" in refused(path, config)


def test_colours_of_16_bits_in_other_files(tmp_path: Path) -> None:
    data = SCENE[..., :3].astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6 # wide\n30 20\n65535\n" + data)
    assert read_image(tmp_path / "a.ppm").shape == (3, *SIZE)
    message = refused(tmp_path / "a.ppm", ImageConfig(range=(0, 3000)))
    assert message == "colours of 16 bits, of which 8 are read; convert it to a TIFF of bands"


# ---- other numbers


@raster
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("bands", [1, 3])
def test_numbers_with_a_declared_range(dtype: type, bands: int, tmp_path: Path) -> None:
    values = (SCENE[..., :bands].astype(np.float64) - (0 if dtype is np.uint32 else 500)).astype(dtype)
    path = write_tiff(tmp_path / "a.tif", values, photometric=1 if bands == 1 else 2)
    found = read_image(path, ImageConfig(bands=tuple(range(1, bands + 1)), range=(-100, 2000)))
    torch.testing.assert_close(found, scaled(values, -100, 2000), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (np.float32, "floating-point pixels"),
        (np.int16, "integer pixels of 16 bits with sign"),
        (np.uint32, "integer pixels of 32 bits"),
    ],
)
def test_numbers_without_a_range_are_refused(dtype: type, said: str, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :3].astype(dtype), photometric=2)
    message = refused(path)
    assert message.startswith(f"{said} have no defined range")
    assert "images.range" in message


def test_one_band_of_floats_needs_no_rasterio(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", FLOATS[..., :1], photometric=1)
    found = read_image(path, ImageConfig(range=(0, 0.3)))
    torch.testing.assert_close(found, scaled(FLOATS[..., :1], 0, 0.3).repeat(3, 1, 1), rtol=0, atol=1e-6)


@raster
def test_signed_bytes(tmp_path: Path) -> None:
    """Pillow reads -1 as 255."""
    values = np.array([-128, -1, 0, 127], np.int8).reshape(2, 2, 1)
    path = write_tiff(tmp_path / "a.tif", values, photometric=1)
    found = read_image(path, ImageConfig(bands=(1,), range=(-128, 127)))
    torch.testing.assert_close(found, scaled(values, -128, 127), rtol=0, atol=1e-6)


# ---- no data


def test_nodata_of_a_picture(tmp_path: Path) -> None:
    """Black pixels have no data; pixels with one black band have."""
    rgb = np.random.default_rng(1).integers(1, 256, (*SIZE, 3)).astype(np.uint8)
    rgb[2:5, 3:7] = 0
    rgb[9, 9] = 255, 0, 0
    found = read_pixels(write_tiff(tmp_path / "a.tif", rgb, photometric=2, nodata="0"))
    assert found.valid is not None
    assert torch.equal(found.valid, torch.from_numpy((rgb != 0).any(-1)))
    assert torch.equal(found.image, planes(rgb))
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png").valid is None
    by_hand = read_pixels(tmp_path / "a.png", ImageConfig(nodata=0)).valid
    assert by_hand is not None
    assert torch.equal(by_hand, found.valid)


def test_a_file_that_has_data_everywhere(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.full((3, 4, 1), 7, np.uint8), photometric=1, nodata="-9999")
    assert read_pixels(path).valid is None


def test_percentiles_leave_out_what_is_no_data(tmp_path: Path) -> None:
    values = FLOATS[..., :1].copy()
    values[0], values[1, :5], values[2, 0] = -9999, np.nan, np.inf
    path = write_tiff(tmp_path / "a.tif", values, photometric=1, nodata="-9999")
    found = read_pixels(path, ImageConfig(bands=(1,), range=Percentiles((0, 100))))
    known = (values != -9999) & np.isfinite(values)
    assert found.valid is not None
    assert torch.equal(found.valid, torch.from_numpy(known[..., 0]))
    low, high = values[known].min(), values[known].max()
    wanted = scaled(np.where(known, values, low), float(low), float(high))
    torch.testing.assert_close(found.image, wanted, rtol=0, atol=1e-6)


def test_an_image_without_any_data(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.full((3, 4, 1), np.nan, np.float32), photometric=1)
    found = read_pixels(path, ImageConfig(range=Percentiles((2, 98))))
    assert found.valid is not None
    assert not found.valid.any()
    assert (found.image == 0).all()


@pytest.mark.parametrize(("bands", "valid"), [((1,), [False, True]), ((1, 2), None), ((2, 3), None)])
def test_nodata_is_that_of_the_chosen_bands(bands: tuple[int, ...], valid: list[bool] | None, tmp_path: Path) -> None:
    rgb = np.array([[[0, 5, 6], [1, 2, 0]]], np.uint8)
    found = read_pixels(write_tiff(tmp_path / "a.tif", rgb, photometric=2, nodata="0"), ImageConfig(bands=bands)).valid
    assert (None if found is None else found[0].tolist()) == valid


@pytest.mark.usefixtures("no_rasterio")
def test_nodata_of_colours_of_16_bits_needs_rasterio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pillow reads the higher 8 bits: 0 of all values below 256."""
    path = write_tiff(tmp_path / "a.tif", SCENE[..., :3], photometric=2, nodata="0")
    assert read_pixels(path).valid is None
    assert "a.tif: nodata 0 is not looked for; rasterio does: pip install sparserefine[raster]" in caplog.text


@raster
def test_nodata_of_bands_of_16_bits(tmp_path: Path) -> None:
    values = SCENE + 1
    values[4:7] = 0
    values[9, 9, 0] = 0
    path = write_tiff(tmp_path / "a.tif", values, photometric=1, extra=[0] * 7, nodata="0")
    valid = read_pixels(path, ImageConfig(bands=(1, 2), range=(0, 3000))).valid
    assert valid is not None
    assert torch.equal(valid, torch.from_numpy((values[..., :2] != 0).any(-1)))


@pytest.mark.parametrize("exif", [None, "ignore"])
def test_a_mask_of_the_file_itself(exif: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture that Pillow reads, with a second image in the file: the mask."""
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, SIZE).astype(np.uint8))
    known = np.zeros(SIZE, np.uint8)
    known[3:, 5:] = 255
    mask = Image.fromarray(known)
    mask.encoderinfo = {"tiffinfo": {254: 4}}
    path = tmp_path / "a.tif"
    grey.save(path, save_all=True, append_images=[mask], tiffinfo={274: 6})
    found = read_pixels(path, ImageConfig(exif=exif))
    assert "pages" not in caplog.text
    if not have_rasters():
        assert "a.tif: has a mask of the pixels with data, which is not read" in caplog.text
        return
    assert found.valid is not None
    wanted = known > 0
    assert torch.equal(found.valid, torch.from_numpy((wanted if exif else np.rot90(wanted, 3)).copy()))
    grey.save(tmp_path / "b.tif", tiffinfo={274: 6})
    whole = read_image(tmp_path / "b.tif", ImageConfig(exif=exif))
    assert torch.equal(found.image, whole * found.valid)


# ---- turned, pages, size


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    quarter = {3: 2, 6: 3, 8: 1}
    return np.rot90(array, quarter[orientation])


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "wide.tif"])
def test_exif_is_applied_or_ignored(suffix: str, orientation: int, tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix.endswith("tif"):
        if suffix == "wide.tif" and not have_rasters():
            pytest.skip("needs rasterio: pip install sparserefine[raster]")
        stored = SCENE[..., :3] if suffix == "wide.tif" else rgb
        write_tiff(path, stored, photometric=2, orientation=orientation)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(rgb).save(path, exif=exif)
    range_ = (0, 3000) if suffix == "wide.tif" else None
    shown, as_stored = (read_image(path, ImageConfig(exif=exif, range=range_)) for exif in ("apply", "ignore"))
    if suffix != "jpg":
        expected = scaled(SCENE[..., :3], 0, 3000) if range_ else planes(rgb)
        torch.testing.assert_close(as_stored, expected, rtol=0, atol=1e-6)
    assert torch.equal(shown, planes(turned(as_stored.numpy().transpose(1, 2, 0), orientation)))
    assert torch.equal(read_image(path, ImageConfig(range=range_)), shown)


@pytest.mark.parametrize(
    "entries",
    [
        [
            (0x0112, 3, 1, struct.pack("<H", 6)),
            (0x011A, 10, 1, struct.pack("<ii", -1, 0)),
            (0x011B, 5, 1, struct.pack("<II", 1, 0)),
        ],
        [(0x0112, 3, 1, struct.pack("<H", 6)), (0x011A, 3, 2, struct.pack("<HH", 72, 1)), (0x0100, 2, 5, b"abcd\0")],
    ],
    ids=["broken rational", "wrong types"],
)
def test_a_picture_with_broken_exif_is_turned(entries: list[tuple[int, int, int, bytes]], tmp_path: Path) -> None:
    directory, data, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHI", tag, kind, count)
        directory += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", start + len(data))
        data += value if len(value) > 4 else b""
    exif = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + data
    rgb = np.random.default_rng(1).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif, quality=95)
    Image.fromarray(rgb).save(tmp_path / "b.jpg", quality=95)
    assert torch.equal(read_image(tmp_path / "a.jpg"), torch.rot90(read_image(tmp_path / "b.jpg"), -1, (1, 2)))


def test_pages_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Image.new("L", (4, 3), value) for value in (1, 2))
    for name in ("a.tif", "b.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second, second])
        assert (read_image(tmp_path / name) == 1).all()
    (message,) = caplog.messages
    assert f"{tmp_path / 'a.tif'}: 3 pages; only the first one is read" in message


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("pages", [1, 2])
def test_turned_pixels_without_compression(pages: int, orientation: int, tmp_path: Path) -> None:
    """Pillow mixes up their sides if it opens the file by its name."""
    grey = np.random.default_rng(1).integers(0, 256, SIZE).astype(np.uint8)
    page = Image.fromarray(grey)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page] * (pages - 1), tiffinfo={274: orientation})
    shown = np.rot90(grey, {1: 0, 3: 2, 6: 3}[orientation])
    assert torch.equal(read_image(tmp_path / "a.tif"), planes(np.stack([shown] * 3, -1)))


@raster
def test_what_only_pillow_resolves_is_not_read_otherwise(tmp_path: Path) -> None:
    """Numbers of colours are no grey."""
    page = Image.fromarray(np.zeros(SIZE, np.uint8), "P")
    page.putpalette([255, 0, 0])
    page.save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    tag = data.index(struct.pack("<HHI", 259, 3, 1))
    data[tag + 8 : tag + 10] = struct.pack("<H", 34887)  # LERC
    (tmp_path / "a.tif").write_bytes(data)
    message = refused(tmp_path / "a.tif")
    assert message.startswith("1 band of uint8: 1 number of a colour, stored in a way that Pillow does not read")


def test_limit_in_megapixels(tmp_path: Path) -> None:
    Image.new("1", (2000, 1000)).save(tmp_path / "a.png")
    message = refused(tmp_path / "a.png", ImageConfig(max_megapixels=1.9))
    assert message.startswith("2000 x 1000 pixels, expected at most 1900000 (1.9 megapixels)")
    assert "--max_megapixels" in message
    assert read_image(tmp_path / "a.png", ImageConfig(max_megapixels=2)).shape == (3, 1000, 2000)


def test_the_limit_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    Image.new("1", (20, 10)).save(tmp_path / "a.png")
    assert "expected at most 10 " in refused(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", ImageConfig(max_megapixels=1)).shape == (3, 10, 20)


@raster
def test_limit_of_rasters(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE, photometric=1, extra=[0] * 7)
    config = ImageConfig(bands=(1,), max_megapixels=0.0005)
    assert refused(path, config).startswith("30 x 20 pixels, expected at most 500")


@raster
def test_a_raster_that_is_cut_short(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", SCENE, photometric=1, extra=[0] * 7)
    path.write_bytes(path.read_bytes()[:-500])
    assert "cut short" in refused(path, ImageConfig(bands=(1,)))


# ---- the configuration


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bands": [0]}, "images.bands has 0, expected whole numbers from 1"),
        ({"bands": []}, "images.bands = [], expected 1 to 16 bands"),
        ({"bands": [1] * 17}, "expected 1 to 16 bands"),
        ({"range": [5, 5]}, "images.range has [5.0, 5.0], expected two finite numbers, the lower one first"),
        ({"range": [[0, 1], [0, 2]]}, "images.range has 2 pairs for 3 channels"),
        ({"bands": [1], "range": [[0, 1], [0, 2]]}, "images.range has 2 pairs for 1 channels"),
        ({"range": {"percentile": [98, 2]}}, "percentile = [98, 2], expected two of 0 to 100, the lower one first"),
        ({"range": "9bit"}, "range = '9bit', expected '10bit' or '12bit'"),
        ({"range": [1, 2, 3]}, "range = [1, 2, 3], expected"),
        ({"exif": "turn"}, "exif = 'turn', expected 'apply' or 'ignore'"),
        ({"max_megapixels": 0}, "images.max_megapixels = 0, expected above 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(values: dict[str, object], said: str) -> None:
    names = ("bands", "range", "exif", "nodata", "max_megapixels")
    with pytest.raises(ValueError, match="f: ") as caught:
        from_json(ImageConfig, values, "f", optional=names)
    assert said in str(caught.value)
