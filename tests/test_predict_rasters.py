"""predict reads images as its refiner was trained to, keeps where they lie, and leaves out what has no data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from sparserefine import (
    Classes,
    ImageConfig,
    Selector,
    SparseRefiner,
    read_image,
    read_label,
)
from sparserefine.commands.main import main
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.files.image_config import Percentiles
from sparserefine.files.images import save_png, save_tiff, write_png
from sparserefine.files.rasters import have_rasters
from sparserefine.files.tiff import GEO, placed
from sparserefine.inference.predict import predict
from tiffs import write_tiff
from tiny import CLASSES, tiny_refiner

SIZE = (24, 32)
WIDE = np.random.default_rng(5).integers(1, 3000, (*SIZE, 8)).astype(np.uint16)
RGB = np.random.default_rng(6).integers(1, 256, (*SIZE, 3)).astype(np.uint8)
raster = pytest.mark.skipif(not have_rasters(), reason="needs rasterio: pip install sparserefine[raster]")


@torch.no_grad()
def expected(refiner: SparseRefiner, path: Path) -> torch.Tensor:
    return refiner(read_image(path, refiner.config.images)[None]).labels()[0].long()


def test_a_geotiff_keeps_its_place(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", RGB, photometric=2, geo=True)
    refiner = tiny_refiner()
    report = predict([path], refiner, tmp_path / "out")
    assert report.written == (tmp_path / "out" / "a.tif",)
    assert torch.equal(read_label(report.written[0]), expected(refiner, path))
    place = placed(report.written[0], ImageConfig())
    assert place == placed(path, ImageConfig())
    assert place[33550] == (0.5, 0.5, 0.0)
    with Image.open(report.written[0]) as written:
        assert written.getpalette()[:9] == [channel for colour in CLASSES.palette for channel in colour]


@raster
@pytest.mark.parametrize("nodata", ["", "0"])
def test_other_programs_find_the_place_of_the_labels(nodata: str, tmp_path: Path) -> None:
    import rasterio

    pixels = RGB.copy()
    pixels[2:9, 3:8] = 0
    path = write_tiff(tmp_path / "a.tif", pixels, photometric=2, geo=True, nodata=nodata)
    (written,) = predict([path], tiny_refiner(), tmp_path / "out").written
    with rasterio.open(path) as before, rasterio.open(written) as after:
        assert before.crs == after.crs == rasterio.crs.CRS.from_epsg(32633)
        assert before.transform == after.transform == rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
        assert after.nodata == (255 if nodata else None)
        assert (after.read_masks(1) == 0).sum() == (7 * 5 if nodata else 0)
        assert after.colormap(1)[1] == (128, 64, 128, 255)


@pytest.mark.parametrize(("given", "suffixes"), [("auto", "tif png"), ("png", "png png"), ("tif", "tif tif")])
def test_formats(given: str, suffixes: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tiff(tmp_path / "in" / "a.tif", RGB, photometric=2, geo=True)
    Image.fromarray(RGB).save(tmp_path / "in" / "b.tif")
    refiner = tiny_refiner()
    report = predict([tmp_path / "in"], refiner, tmp_path / "out", format=given, overlay=True)
    assert not report.failures
    a, b = suffixes.split()
    assert {path.name for path in report.written} == {f"a.{a}", "a_overlay.png", f"b.{b}", "b_overlay.png"}
    for name, suffix in (("a", a), ("b", b)):
        labels = read_label(tmp_path / "out" / f"{name}.{suffix}")
        assert torch.equal(labels, expected(refiner, tmp_path / "in" / f"{name}.tif"))
    with pytest.raises(ValueError, match="format = 'gif', expected 'auto', 'png' or 'tif'"):
        predict([tmp_path / "in"], refiner, tmp_path / "out", format="gif")


def test_a_turned_geotiff_has_no_place(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", RGB, photometric=2, geo=True, orientation=6)
    assert predict([path], tiny_refiner(), tmp_path / "out").written == (tmp_path / "out" / "a.png",)
    kept = tiny_refiner(images=ImageConfig(exif="ignore"))
    assert predict([path], kept, tmp_path / "out").written == (tmp_path / "out" / "a.tif",)


def test_where_there_is_no_data_nothing_is_selected_and_the_label_says_so(tmp_path: Path) -> None:
    pixels = RGB.copy()
    pixels[5:15, 4:30] = 0
    path = write_tiff(tmp_path / "a.tif", pixels, photometric=2, nodata="0")
    everything = tiny_refiner(selector=Selector(threshold=0.0))
    for given in ("png", "tif"):
        report = predict([path], everything, tmp_path / "out", format=given, overlay=True, overwrite=True)
        assert not report.failures
        labels = read_label(report.written[0])
        empty = torch.zeros(SIZE, dtype=torch.bool)
        empty[5:15, 4:30] = True
        assert torch.equal(labels == 255, empty)
        assert report.images[0].density == pytest.approx(1 - 260 / (24 * 32))
        assert (read_image(report.written[1])[:, empty] == 0).all()
        read_image(report.written[0])  # a palette with a colour for 255


def test_valid_is_checked() -> None:
    with pytest.raises(ValueError, match=r"valid is torch.bool \(1, 4, 4\), expected torch.bool \(1, 24, 32\)"):
        tiny_refiner()(torch.zeros(1, 3, *SIZE), torch.ones(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "how",
    [
        ImageConfig(range=(0, 3000)),
        ImageConfig(range="12bit"),
        ImageConfig(range=((0, 3000), (5, 100), (0.5, 0.75))),
        ImageConfig(range=Percentiles((2, 98)), exif="ignore", nodata=-9999),
        pytest.param(ImageConfig(bands=(4, 3, 8), range=(0, 3000)), marks=raster),
    ],
    ids=["range", "bits", "ranges", "percentiles", "bands"],
)
def test_predict_reads_as_the_stored_refiner_was_trained(how: ImageConfig, tmp_path: Path) -> None:
    bands = 8 if how.bands else 1
    path = write_tiff(tmp_path / "a.tif", WIDE[..., :bands], photometric=1, extra=[0] * (bands - 1))
    refiner = tiny_refiner(images=how)
    refiner.save_pretrained(tmp_path / "refiner")
    assert "images" in json.loads((tmp_path / "refiner" / "config.json").read_text())
    loaded = SparseRefiner.from_pretrained(tmp_path / "refiner")
    assert loaded.config.images == how
    report = predict([path], loaded, tmp_path / "out")
    assert not report.failures
    assert torch.equal(read_label(report.written[0]), expected(refiner, path))
    assert not torch.equal(read_image(path, how), read_image(path)) if bands == 1 else True


def test_what_is_the_default_or_the_machines_is_not_stored(tmp_path: Path) -> None:
    tiny_refiner(images=ImageConfig(max_megapixels=5)).save_pretrained(tmp_path / "a")
    assert "images" not in json.loads((tmp_path / "a" / "config.json").read_text())
    tiny_refiner(images=ImageConfig(nodata=0, max_megapixels=5)).save_pretrained(tmp_path / "b")
    assert SparseRefiner.from_pretrained(tmp_path / "b").config.images == ImageConfig(nodata=0)


def test_the_limit_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny_refiner().save_pretrained(tmp_path / "refiner")
    Image.fromarray(RGB).save(tmp_path / "a.png")
    command = ["predict", "a.png", "--refiner", "refiner", "--out", "out", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--max_megapixels", "0.0005"]) == 1
    assert "32 x 24 pixels, expected at most 500 (0.0005 megapixels)" in capsys.readouterr().err
    monkeypatch.setattr("sparserefine.files.images.MAX_PIXELS", 500)
    assert main(command) == 1
    assert "--max_megapixels" in capsys.readouterr().err
    assert main([*command, "--max_megapixels", "1"]) == 0


def test_labels_of_many_classes_have_16_bits(tmp_path: Path) -> None:
    labels = torch.tensor([[0, 300], [65535, 7]], dtype=torch.int32)
    save_tiff(tmp_path / "a.tif", labels, nodata=65535)
    assert torch.equal(read_label(tmp_path / "a.tif"), labels.long())
    with Image.open(tmp_path / "a.tif") as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        assert image.tag_v2[42113] == "65535"
        assert not set(GEO) & set(image.tag_v2)


def test_a_palette_has_a_colour_for_each_label(tmp_path: Path) -> None:
    """Of two colours a PNG has 1 bit a pixel, in which 255 would become 1."""
    labels = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    save_png(tmp_path / "a.png", labels, [(1, 2, 3), (4, 5, 6)])
    assert torch.equal(read_label(tmp_path / "a.png"), labels.long())
    assert read_image(tmp_path / "a.png")[:, 0].T.tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0]]


# ---- data sets


def test_a_dataset_reads_as_it_is_told_and_ignores_what_has_no_data(tmp_path: Path) -> None:
    values = WIDE[..., :1].copy()
    values[3:5, 2:7] = 0
    write_tiff(tmp_path / "a.tif", values, photometric=1, nodata="0")
    write_png(tmp_path / "a.png", torch.ones(SIZE, dtype=torch.uint8))
    data = Dataset((Sample("a", tmp_path / "a.tif", tmp_path / "a.png"),), Classes.numbered(2))
    told = replace(data, images=ImageConfig(range=(0, 3000)))
    image, label = told.read(0)
    assert torch.equal(image, read_image(tmp_path / "a.tif", told.images))
    assert torch.equal(label == 255, torch.from_numpy(values[..., 0] == 0))
    assert (label[label != 255] == 1).all()
    assert data.image_digests != told.image_digests
    limited = replace(data, images=ImageConfig(exif="apply", max_megapixels=10))
    assert data.image_digests == limited.image_digests
