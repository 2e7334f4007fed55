"""A small project to train on: generated images, an untrained base, a configuration; runs of it, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lines import lines_image
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.main import main

STEPS, EVERY = 6, 2
"""Of a short run: its steps, and the steps between validations."""


def write_project(folder: Path) -> None:
    """A folder dataset, an untrained base ``base.safetensors``, another one, and ``config.yaml``."""
    for seed in range(4):
        lines_image(folder / "data", seed, (72 + 4 * (seed % 2), 88))
    (folder / "data" / "train.txt").write_text("0 1")
    (folder / "data" / "val.txt").write_text("2")
    (folder / "data" / "test.txt").write_text("3")
    (folder / "data" / "classes.txt").write_text("ground\nline 255 0 0\n")
    torch.manual_seed(1)
    for name in ("base", "other"):
        save_unet(UNet(2, (4, 8)), folder / f"{name}.safetensors")
    config = {
        "data": {"name": "folder", "root": "data"},
        "base": {"name": "unet:base.safetensors", "ratio": 0.25},
        "out": "run",
        "selector": {"threshold": 0.1},
        "extractor": {"planes": [8, 16]},
        "logits": {"source": "stored", "folder": "logits"},
        "augment": {"crop": [48, 48], "max_class_share": 1.0},
        "training": {"steps": 24, "val_every": 12, "batch": 2, "lr": 0.01, "device": "cpu"},
        "boundary_px": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def write_short_project(folder: Path) -> None:
    """The same, with a configuration for a short run."""
    write_project(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["logits"] = {"source": "live"}
    config["training"] |= {"steps": STEPS, "val_every": EVERY, "pictures": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def train(*options: str, out: str = "run") -> int:
    """``sparserefine train`` in the current folder; its exit code."""
    return main(["train", "config.yaml", "--out", out, *options])


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[object], None]) -> None:
    """Calls ``action(module)`` before the first batch of an optimiser step, counted from 0."""
    from sparserefine.training.module import RefinerModule

    original = RefinerModule.training_step

    def replaced(self, batch, index):
        if self.global_step == step:
            action(self)
        return original(self, batch, index)

    monkeypatch.setattr(RefinerModule, "training_step", replaced)


def die(*_: object) -> None:
    raise Killed


def killed_at(step: int, *options: str, out: str = "run") -> None:
    """A run that ends at ``step`` as if the process had been killed there."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, die)
        with pytest.raises(Killed):
            train(*options, out=out)


def steps_of(out: str) -> list[int]:
    """The steps in the log of a run."""
    return [json.loads(line)["step"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: str, other: str) -> None:
    """Asserts that two runs ended at the same bits and wrote the same log."""
    for name in ("best", "last"):
        weights = [load_file(Path(out) / name / "model.safetensors") for out in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert (Path(one) / "log.jsonl").read_text() == (Path(other) / "log.jsonl").read_text()
