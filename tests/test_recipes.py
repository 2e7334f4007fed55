"""Recipes: configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects import write_project
from sparserefine.commands.main import main
from sparserefine.commands.recipes import FOLDER
from sparserefine.training.config import TrainingConfig

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


@pytest.mark.slow
def test_a_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    short = ["--training.epochs", "1", "--training.batch", "2", "--augment.crop", "[32,32]", "--out", "run"]
    base = ["--base.name", "unet:base.safetensors", "--data.root", "data", "--data.val", "train"]
    assert main(["train", "folder", *base, *short, "--training.device", "cpu", "--selector.threshold", "0.01"]) == 0
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
