"""One refiner for several bases."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from projects import assert_same_run, killed_at, train, write_short_project
from sparserefine import BaseConfig, load_base, read_image
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.main import main
from sparserefine.data.crops import CropDataset
from sparserefine.data.readers.config import DataConfig
from sparserefine.training.mixing import Mixed, repeated
from sparserefine.training.stored_logits import StoredLogits

OTHER = "unet:other.safetensors"
BOTH = ["--bases", f"[{OTHER}]"]
STORED = ["--logits.source", "stored", "--logits.folder", "logits"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project for a short run; the working directory is its folder."""
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_belongs_to_an_image_is_found() -> None:
    mixed = Mixed([lambda index, size: f"a{index} {size}", lambda index, size: f"b{index} {size}"], images=3)
    assert [mixed(index, (4, 5)) for index in (0, 2, 3, 5)] == ["a0 (4, 5)", "a2 (4, 5)", "b0 (4, 5)", "b2 (4, 5)"]


def test_each_image_comes_with_the_logits_of_each_base(project: Path) -> None:
    from sparserefine.data.crops import AugmentConfig

    data = DataConfig("folder", "data").read("train")

    def of(base: int) -> Any:
        return lambda index, size: torch.full((2, 5, 5), float(10 * base + index))

    mixed, images = Mixed([of(0), of(1), of(2)], len(data)), repeated(data, 3)

    def seen(index: int) -> tuple[str, float]:
        crop = CropDataset(images, mixed, AugmentConfig(crop=(16, 16)), seed=3, cache_gb=1)[index]
        return crop.name, float(crop.logits[0, 0, 0])

    found = [seen(index) for index in range(12)]
    pairs = {(name, float(10 * base + image)) for base in range(3) for image, name in enumerate("01")}
    assert set(found[:6]) == set(found[6:]) == pairs
    assert found[:6] != found[6:]
    assert found == [seen(index) for index in range(12)]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Name and logits of each crop that a run has trained on."""
    from sparserefine.training.module import RefinerModule

    seen: list[tuple[str, Tensor]] = []
    original = RefinerModule.training_step

    def noted(self: Any, batch: Any, index: int) -> Tensor:
        seen.extend(zip(batch.names, batch.logits, strict=True))
        return original(self, batch, index)

    monkeypatch.setattr(RefinerModule, "training_step", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("source", ["live", "stored"])
def test_a_run_learns_from_all(project: Path, batches: list[tuple[str, Tensor]], source: str) -> None:
    options = [*BOTH, "--augment.flip", "false", *(STORED if source == "stored" else [])]
    if source == "stored":
        assert main(["logits", "config.yaml", *options]) == 0
    assert train(*options) == 0
    logits = {
        (name, base): load_base(BaseConfig(f"unet:{base}.safetensors", ratio=0.25))(
            read_image(project / "data" / "images" / f"{name}.png")[None]
        )[0].half()
        for name in "01"
        for base in ("base", "other")
    }
    found = Counter(
        next(key for key, value in logits.items() if key[0] == name and is_part(outputs, value))
        for name, outputs in batches
    )
    assert found == dict.fromkeys(logits, 3)  # 6 steps of 2 crops


def test_a_teacher_teaches_for_all(project: Path, batches: list[tuple[str, Tensor]]) -> None:
    options = ["--training.targets", "teacher", "--training.steps", "2"]
    assert train(*BOTH, *options) == 0
    assert Counter(name for name, _ in batches) == {"0": 2, "1": 2}


def is_part(part: Tensor, whole: Tensor) -> bool:
    """Whether these logits are a rectangle of those."""
    height, width = part.shape[1:]
    windows = whole.unfold(1, height, 1).unfold(2, width, 1)
    return bool((windows == part.half()[:, None, None]).all(-1).all(-1).all(0).any())


def test_logits_of_all_bases_are_stored_apart(project: Path, capsys: Any) -> None:
    assert main(["logits", "config.yaml", *BOTH, *STORED]) == 0
    first, other = (load_base(BaseConfig(name, ratio=0.25), 2).identity for name in ("unet:base.safetensors", OTHER))
    folder = project / "logits" / f"base-{other.rpartition(':')[2]}"
    assert {StoredLogits("logits").header(name)["base"] for name in "012"} == {first}
    assert {StoredLogits(folder).header(name)["base"] for name in "01"} == {other}
    assert not (folder / "2.safetensors").exists()  # of the validation split
    shown = capsys.readouterr().out
    assert "3 stored in logits" in shown
    assert f"2 stored in {folder.relative_to(project)}" in shown
    assert main(["logits", "config.yaml", *BOTH, *STORED]) == 0
    assert "2 were there" in capsys.readouterr().out
    (folder / "1.safetensors").write_bytes((project / "logits" / "1.safetensors").read_bytes())
    assert train(*BOTH, *STORED) == 1
    assert f"this configuration has base {other}" in capsys.readouterr().err


def test_other_bases_stand_in_for_each(project: Path) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    save_unet(UNet(2, (4, 8)), project / "fold.safetensors")
    fold = {"split": "train", "base": "unet:fold.safetensors", "instead_of": OTHER}
    config["logits"] = {"source": "stored", "folder": "logits", "crossfit": [fold]}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["logits", "config.yaml", *BOTH]) == 0
    names = ("unet:base.safetensors", "unet:fold.safetensors", OTHER)
    first, stand_in, other = (load_base(BaseConfig(name, ratio=0.25), 2).identity for name in names)
    folder = project / "logits" / f"base-{other.rpartition(':')[2]}"
    assert {StoredLogits("logits").header(name)["base"] for name in "012"} == {first}
    assert {StoredLogits(folder).header(name)["base"] for name in "01"} == {stand_in}


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bases_only(project: Path, capsys: Any) -> None:
    assert train(*BOTH, out="whole") == 0
    killed_at(3, *BOTH)
    (project / "other.safetensors").rename(project / "moved.safetensors")
    roles = json.loads((project / "run" / "run.json").read_text())["origin"]["bases"]
    assert set(roles) == {"base", "bases:0"}
    assert train("--resume") == 1
    assert f"bases[0] had identity {roles['bases:0']} when the run was started, it has None" in capsys.readouterr().err
    save_unet(UNet(2, (4, 8)), project / "third.safetensors")
    assert train("--resume", "--bases", "[unet:third.safetensors]") == 1
    assert "bases[0] had identity" in capsys.readouterr().err
    assert train("--resume", "--bases", "[unet:moved.safetensors]") == 0
    assert_same_run("whole", "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bases", "[unet:base.safetensors]"], "expected names of bases, each once, and not base.name itself"),
        (["--bases", f"[{OTHER}, {OTHER}]"], "each once"),
        (["--bases", "['']"], "bases: ''"),
        (["--bases", "[unet:nowhere.safetensors]"], "nowhere.safetensors"),
        (
            ["--logits.crossfit", f"[{{split: train, base: {OTHER}, instead_of: {OTHER}}}]"],
            "expected base.name or one of bases: ['unet:base.safetensors']",
        ),
    ],
)
def test_wrong_bases_are_named(project: Path, capsys: Any, options: list[str], words: str) -> None:
    assert train(*options) != 0
    assert words in capsys.readouterr().err


def test_scores_and_logits_do_not_mix(project: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "scoring_module.py").write_text(
        "import torch\nfrom sparserefine.bases.loaded import LoadedModel\n"
        "def build():\n    return LoadedModel(lambda x: x[:, :2].abs(), 2, outputs='scores')\n"
    )
    monkeypatch.syspath_prepend(str(project))
    for command in (["train", "config.yaml"], ["logits", "config.yaml", *STORED]):
        assert main([*command, "--bases", "[python:scoring_module:build]"]) == 1
        assert "python:scoring_module:build returns scores, unet:base.safetensors returns" in capsys.readouterr().err


def test_bases_of_another_kind_have_their_own_settings(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one kind they share normalisation and class map with the base."""
    from sparserefine.images.classes import Classes
    from sparserefine.training.logits import Bases

    (project / "other_kind.py").write_text("def build():\n    return lambda x: x[:, :2]\n")
    monkeypatch.syspath_prepend(str(project))
    config = BaseConfig("unet:base.safetensors", ratio=0.25, mean=(0.5, 0.5, 0.5), class_map=(1, 0))
    bases, classes = Bases(config, torch.device("cpu")), Classes.numbered(2)
    alike, unlike = (bases.base(name, classes).config for name in (OTHER, "python:other_kind:build"))
    assert (alike.ratio, alike.mean, alike.class_map) == (0.25, (0.5, 0.5, 0.5), (1, 0))
    assert (unlike.ratio, unlike.class_map) == (0.25, None)
    assert unlike.mean != alike.mean
