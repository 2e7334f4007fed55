r"""Puts trained networks and one test photograph into the package, for ``sparserefine demo``.

    python examples/hrf/export_demo.py --refiner runs/hrf/refiner4/best \
        --dense runs/hrf/dense1/best.safetensors

Weights are stored as float16; the photograph is copied as it is.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from sparserefine import SparseRefiner
from sparserefine.bases.families.unet import load_unet, save_unet
from sparserefine.studies.demo import ASSETS, IMAGE, demo_refiner_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--threshold", type=float, help="entropy in nats, not the stored")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/hrf"))
    args = parser.parse_args()

    refiner = SparseRefiner.from_pretrained(args.refiner)
    if args.threshold is not None:
        refiner.selector = replace(refiner.selector, threshold=args.threshold)
    refiner.save_pretrained(demo_refiner_folder(), dtype=torch.float16)
    save_unet(load_unet(args.dense), ASSETS / "dense.safetensors", dtype=torch.float16)
    shutil.copyfile(args.data / "images" / f"{IMAGE}.webp", ASSETS / f"{IMAGE}.webp")
    shutil.copyfile(args.data / "labels" / f"{IMAGE}.png", ASSETS / f"{IMAGE}.png")
    for file in sorted(ASSETS.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size / 1e6:6.2f} MB  {file.relative_to(ASSETS)}")


if __name__ == "__main__":
    main()
