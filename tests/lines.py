"""Generated images with labels, of which data sets for tests are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def lines_image(path: Path, seed: int, size: tuple[int, int], *, lines: int = 5) -> None:
    """Bright lines on noise in ``path/images``, and their label in ``path/labels``: something a few steps can learn."""
    generator = np.random.default_rng(seed)
    label = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(label)
    for _ in range(lines):
        draw.line([tuple(generator.integers(0, size[::-1]).tolist()) for _ in range(2)], fill=1, width=3)
    mask = np.array(label)
    noisy = np.stack([mask * 120 + 60] * 3, axis=-1) + generator.normal(0, 12, (*size, 3))
    for folder, picture in (("images", Image.fromarray(noisy.clip(0, 255).astype(np.uint8))), ("labels", label)):
        target = path / folder / f"{seed}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
