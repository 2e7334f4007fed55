"""A project without labels: generated images, a model that knows bright from dark, a configuration to learn from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from projects import write_project

MODEL = """
import torch


class Bright(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.scale = torch.nn.Parameter(torch.tensor(12.0))

    def forward(self, x):
        z = self.scale * x.mean(1, keepdim=True)
        return torch.cat([-z, z, *[-z.abs() - 1] * (self.classes - 2)], 1)


def bright():
    return Bright(2)


def of_three_classes():
    return Bright(3)
"""


def write_unlabelled_project(folder: Path) -> None:
    """As :func:`projects.write_project`, without labels; the teacher is the base itself at full resolution."""
    write_project(folder)
    shutil.rmtree(folder / "data" / "labels")
    (folder / "bright_or_dark.py").write_text(MODEL)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["base"] = {"name": "python:bright_or_dark:bright", "ratio": 0.25, "mean": [0.47] * 3, "std": [0.25] * 3}
    config["logits"] = {"source": "live", "folder": "logits"}
    config["teacher"] = {"folder": "teacher"}
    config["training"] |= {"targets": "teacher", "pictures": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
