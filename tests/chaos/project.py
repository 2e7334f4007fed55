"""A tiny project to attack: a data set, an untrained base, a configuration."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from lines import lines_image
from sparserefine.bases.families.unet import UNet, save_unet

CONFIG = {
    "data": {"name": "folder", "root": "data"},
    "base": {"name": "unet:base.safetensors", "ratio": 0.5},
    "out": "run",
    "selector": {"threshold": 0.1},
    "extractor": {"planes": [8, 8]},
    "logits": {"source": "live", "folder": "logits"},
    "augment": {"crop": [24, 24], "max_class_share": 1.0},
    "training": {"steps": 9, "val_every": 3, "batch": 2, "lr": 0.05, "device": "cpu"},
    "boundary_px": 2,
}


def make(folder: Path) -> Path:
    """Writes the project; the same bytes each time."""
    for index in range(4):
        lines_image(folder / "data", index, (32 + 4 * (index % 2), 40), lines=3)
    (folder / "data" / "train.txt").write_text("0 1\n")
    (folder / "data" / "val.txt").write_text("2\n")
    (folder / "data" / "test.txt").write_text("3\n")
    (folder / "data" / "classes.txt").write_text("ground\nline 255 0 0\n")
    torch.manual_seed(1)
    save_unet(UNet(2, (4, 8)), folder / "base.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder
