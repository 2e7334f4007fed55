"""Recipes: configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

import trees
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.arguments import config_of
from sparserefine.commands.main import main, parser_of
from sparserefine.commands.recipes import FOLDER
from sparserefine.data.crops import AugmentConfig
from sparserefine.data.readers.config import PUBLISHED
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import PRESETS
from sparserefine.training.config import TrainingConfig

THRESHOLDS = {"hrnet_w48": 0.3, "segformer_b5": 0.1, "segnext_l": 0.1, "mask2former_t": 0.05, "mask2former_l": 0.005}
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def test_all_are_listed_with_what_they_are(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(RECIPES)]] == RECIPES
    assert all(len(line.split()) > 5 for line in lines[: len(RECIPES)])


@pytest.mark.parametrize("name", RECIPES)
def test_one_is_printed_as_it_is(name, capsys):
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("arguments", [["show"], ["show", "nothing"], ["show", "../demo/refiner/config"]])
def test_one_that_is_not_there(arguments, capsys):
    assert main(["recipes", *arguments]) == 1
    assert "`sparserefine recipes` lists them" in capsys.readouterr().err


def test_a_file_of_the_same_name_is_taken_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").write_text("unheard_of: 1\n")
    assert main(["train", "folder"]) == 2
    assert "unheard_of" in capsys.readouterr().err


def test_there_is_one_for_every_dataset_and_every_model_of_the_paper():
    models = {name.removeprefix("cityscapes_") for name in RECIPES if name.startswith("cityscapes_")}
    assert models == set(THRESHOLDS)
    others = {name for name in RECIPES if not name.startswith("cityscapes_")}
    assert others == {*PUBLISHED, "folder"} - {"cityscapes"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cityscapes_")])
def test_settings_of_the_paper(name):
    parser = parser_of("train")
    config = config_of(parser.instantiate(parser.parse_args(["--config", str(FOLDER / f"{name}.yaml")])))
    thresholds = {
        "hrnet_w48": 0.3,
        "segformer_b5": 0.1,
        "segnext_l": 0.1,
        "mask2former_t": 0.05,
        "mask2former_l": 0.005,
    }
    assert config.selector.threshold == thresholds[name.removeprefix("cityscapes_")]
    assert config.refiner.extractor == PRESETS["paper"]
    assert config.ensembler == EnsemblerConfig("gated", "paper")
    assert config.base.size == ((640, 1280) if "segnext" in name else (512, 1024))
    assert (config.upsampling, config.augment) == ("nearest", AugmentConfig())
    c = config.training
    assert (c.epochs, c.batch * c.accumulate, c.lr, c.weight_decay) == (500, 32, 3e-4, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_is_built_and_makes_a_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = trees.TREES[name.partition("_")[0]](tmp_path / "tree", (48, 64))
    save_unet(UNet(tree.classes, (4, 8)), tmp_path / "base.safetensors")
    splits = {"train": "train", "val": "val"} | {key: str(tree.settings[key]) for key in tree.settings}
    data = [option for key, split in splits.items() for option in (f"--data.{key}", split)]
    size = ["--base.size", "[24,32]"] if name.startswith("cityscapes_") else []
    short = ["--training.epochs", "null", "--training.steps", "1", "--training.val_every", "1", "--training.batch", "1"]
    few = [
        "--training.accumulate",
        "1",
        "--training.workers",
        "0",
        "--training.device",
        "cpu",
        "--logits.source",
        "live",
    ]
    crop = ["--augment.crop", "[32,32]", "--augment.max_class_share", "1", "--selector.threshold", "0.01"]
    base = ["--base.name", "unet:base.safetensors", "--data.root", "tree", "--out", "run", "--logits.source", "live"]
    assert main(["train", name, *base, *data, *size, *short, *few, *crop]) == 0
    assert Path("run/best/config.json").is_file()


@pytest.mark.parametrize(
    ("epochs", "images", "steps"),
    [(1, 8, 1), (1, 9, 2), (0.5, 800, 50), (50, 16, 100), (51, 16, 200), (0.01, 3, 1)],
)
def test_epochs_in_steps(epochs, images, steps):
    config = TrainingConfig(epochs=epochs, batch=4, accumulate=2, val_every=100)
    assert config.in_steps(images) == TrainingConfig(steps=steps, batch=4, accumulate=2, val_every=100)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ValueError, match="give only one"):
        TrainingConfig(steps=5, epochs=2)
