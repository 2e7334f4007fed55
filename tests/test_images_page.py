"""The configuration and the commands of docs/images.md, run on a small data set of GeoTIFFs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lines import lines_image
from sparserefine import ImageConfig, SparseRefiner, read_image, read_label
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.main import main
from sparserefine.files.image_config import Percentiles
from tiffs import write_tiff

PAGE = Path(__file__).resolve().parents[1] / "docs" / "images.md"
SHORT = (
    *("--training.steps", "2", "--training.val_every", "2", "--training.batch", "1", "--training.device", "cpu"),
    *("--augment.crop", "[32, 32]", "--augment.max_class_share", "1", "--extractor.planes", "[4, 8]"),
    *("--selector.threshold", "0.1", "--training.pictures", "0"),
)


@pytest.fixture
def fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four bands of 16 bits, of which the first is noise, and the others are a picture in 0..3000."""
    pytest.importorskip("rasterio", reason="needs rasterio: pip install sparserefine[raster]")
    pytest.importorskip("lightning", reason="needs Lightning: pip install sparserefine[train]")
    for seed in range(3):
        lines_image(tmp_path / "fields", seed, (48, 56))
    for path in sorted((tmp_path / "fields" / "images").iterdir()):
        rgb = read_image(path).permute(1, 2, 0).numpy().astype(np.float64)
        noise = np.random.default_rng(0).integers(0, 65536, (*rgb.shape[:2], 1))
        bands = np.concatenate([noise, rgb[..., ::-1] / 255 * 3000], axis=2).astype(np.uint16)
        write_tiff(path.with_suffix(".tif"), bands, photometric=1, extra=[0, 0, 0], geo=True)
        path.unlink()
    (tmp_path / "fields" / "train.txt").write_text("0 1")
    (tmp_path / "fields" / "val.txt").write_text("2")
    (tmp_path / "fields" / "classes.txt").write_text("ground\nline 255 0 0\n")
    torch.manual_seed(1)
    save_unet(UNet(2, (4, 8)), tmp_path / "base.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_configuration_and_commands(fields: Path, capsys: pytest.CaptureFixture) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (configuration,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    config = yaml.safe_load(configuration)
    config["base"]["name"] = "unet:base.safetensors"
    (fields / "fields.yaml").write_text(yaml.safe_dump(config))
    (fields / "scene.tif").write_bytes((fields / "fields/images/2.tif").read_bytes())
    (commands,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    for command in commands.splitlines():
        program, name, *arguments = shlex.split(command)
        assert program == "sparserefine"
        more = SHORT if name == "train" else ("--device", "cpu")
        assert main([name, *arguments, *more]) == 0, capsys.readouterr().err
    stored = json.loads((fields / "runs/fields/best/config.json").read_text())["images"]
    assert (stored["bands"], stored["range"]) == ([4, 3, 2], [0, 3000])
    best = {out: SparseRefiner.from_pretrained(fields / "runs" / out / "best") for out in ("fields", "percentiles")}
    assert best["percentiles"].config.images == ImageConfig((4, 3, 2), Percentiles((2, 98)))
    image = read_image("scene.tif", best["fields"].config.images)
    with torch.no_grad():
        assert torch.equal(read_label("labels/scene.tif"), best["fields"](image[None]).labels()[0].long())


@pytest.mark.slow
def test_evaluation_reads_as_the_refiner_does(fields: Path, capsys: pytest.CaptureFixture) -> None:
    config = {
        "data": {"name": "folder", "root": "fields", "test": "val"},
        "base": {"name": "unet:base.safetensors", "ratio": 0.5},
        "out": "run",
        "images": {"bands": [4, 3, 2], "range": [0, 3000]},
    }
    (fields / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "config.yaml", *SHORT]) == 0
    rows = {}
    for name, options in (("same", ()), ("other", ("--images.range", "[0, 9000]"))):
        command = ["evaluate", "config.yaml", "--refiner", "run/best", "--device", "cpu", "--json", f"{name}.json"]
        assert main([*command, *options]) == 0
        rows[name] = json.loads((fields / f"{name}.json").read_text())["rows"]["refined"]["dice"]
        told = "range=(0.0, 3000.0)" in capsys.readouterr().err
        assert told == (name == "other")
    assert rows["same"] == rows["other"]
