"""Makes a folder dataset of HRF at half the size: ``python examples/hrf/half.py ../shared/data/hrf runs/hrf/half``.

A refiner trained on it is the first step of the cascade 1/4 -> 1/2 -> full, and levers are tried on it in a quarter of
the time. A label pixel is vessel where at least half of it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparserefine.data.readers.hrf import HRF_CLASSES, hrf
from sparserefine.files.images import write_png
from sparserefine.images.resize import resize

SPLITS = ("06-13", "06-09", "10-13", "14-15", "01-05")


def main() -> None:
    data, out = map(Path, sys.argv[1:3])
    for split in SPLITS:
        part = hrf(data, split)
        for index, sample in enumerate(part.samples):
            if (out / "labels" / f"{sample.name}.png").exists():
                continue
            image, label = part.read(index)
            size = (label.shape[0] // 2, label.shape[1] // 2)
            small, share = resize(image[None], size)[0], resize(label[None, None], size)[0, 0]
            write_png(out / "images" / f"{sample.name}.png", small.round().clamp(0, 255).to(torch.uint8))
            write_png(out / "labels" / f"{sample.name}.png", (share >= 0.5).to(torch.uint8))
        (out / f"{split}.txt").write_text("".join(f"{sample.name}\n" for sample in part.samples))
    lines = (f"{name} {r} {g} {b}" for name, (r, g, b) in zip(HRF_CLASSES.names, HRF_CLASSES.palette, strict=True))
    (out / "classes.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
