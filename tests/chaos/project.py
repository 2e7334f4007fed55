"""A tiny project to attack: a data set, an untrained base, a configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

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
        _lines(folder / "data", index, (32 + 4 * (index % 2), 40))
    (folder / "data" / "train.txt").write_text("0 1\n")
    (folder / "data" / "val.txt").write_text("2\n")
    (folder / "data" / "test.txt").write_text("3\n")
    (folder / "data" / "classes.txt").write_text("ground\nline 255 0 0\n")
    torch.manual_seed(1)
    save_unet(UNet(2, (4, 8)), folder / "base.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def _lines(root: Path, index: int, size: tuple[int, int]) -> None:
    """Bright lines on noise, and their label."""
    generator = np.random.default_rng(index)
    label = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(label)
    for _ in range(3):
        draw.line([tuple(generator.integers(0, size[::-1]).tolist()) for _ in range(2)], fill=1, width=3)
    mask = np.array(label)
    noisy = np.stack([mask * 120 + 60] * 3, axis=-1) + generator.normal(0, 12, (*size, 3))
    for name, picture in (("images", Image.fromarray(noisy.clip(0, 255).astype(np.uint8))), ("labels", label)):
        (root / name).mkdir(parents=True, exist_ok=True)
        picture.save(root / name / f"{index}.png")
