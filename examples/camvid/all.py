"""Makes every network and every figure that docs/results.md tells about CamVid, from the images alone.

python examples/camvid/all.py --device auto --minutes 60

The published validation part is the test here, and is never chosen on: a stretch of each training drive chooses. CamVid
is for non-commercial use (CC BY-NC 4.0): no image and no weights of it are in this project.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import Options, Recipe, Stage, main

HERE = Path(os.path.relpath(Path(__file__).parent))
NETWORKS = {
    "base4": Recipe(0.25, (80, 112), 2400, "2e-3"),
    "base2": Recipe(0.5, (160, 208), 2400, "1e-3", "base4"),
    "dense1": Recipe(1.0, (320, 416), 2400, "1e-3", "base4"),
}
CHOOSING = (0.70, 0.85)
"""The stretch of each drive that chooses, in parts of its frames."""


def splits(images: Path) -> dict[str, list[str]]:
    """Names of the images of each split: ``fit``, ``choose`` and ``test``, and the halves of ``fit``."""
    found: dict[str, list[str]] = {"fit": [], "choose": [], "test": [], "first": [], "second": []}
    frames = sorted(f"train/{file.stem}" for file in (images / "train").glob("*.webp"))
    for _, drive in groupby(frames, key=lambda name: name.split("_")[0]):
        names = list(drive)
        start, stop = (round(len(names) * part) for part in CHOOSING)
        fit = names[:start] + names[stop:]
        found["choose"] += names[start:stop]
        found["fit"] += fit
        found["first"] += fit[: len(fit) // 2]
        found["second"] += fit[len(fit) // 2 :]
    found["test"] = sorted(f"val/{file.stem}" for file in (images / "val").glob("*.webp"))
    return found


def prepare(data: Path, folder: Path) -> None:
    """A folder dataset of links to the images and labels, with a list for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "labels"):
        if not (folder / name).exists():
            (folder / name).symlink_to((data / name).resolve(), target_is_directory=True)
    shutil.copyfile(HERE / "classes.txt", folder / "classes.txt")
    for name, names in splits(data / "images").items():
        (folder / f"{name}.txt").write_text("\n".join(names) + "\n")


def networks(o: Options) -> Iterator[Stage]:
    """Bases, the bases of the folds, and the dense peers, each from the weights of the lower resolution."""

    def stage(kind: str, split: str, suffix: str = "", seed: int = 0) -> Stage:
        splits = (f"folder:{o.out}/data", split, "choose")
        return NETWORKS[kind].stage(o, kind, splits, 8, "--ignore", "11", "--upright", suffix=suffix, seed=seed)

    for kind in NETWORKS:
        yield stage(kind, "fit")
        if kind != "dense1":
            yield stage(kind, "second", "_without_first")
            yield stage(kind, "first", "_without_second")
    for kind in NETWORKS:
        yield stage(kind, "fit", "_seed1", 1)


def refiners(o: Options) -> Iterator[Stage]:
    """Coarse logits and teacher predictions once for each base; then two refiners each."""

    def config(ratio: int) -> list[str]:
        return [str(HERE / f"refine{ratio}.yaml"), "--data.root", f"{o.out}/data"]

    for ratio in (2, 4):
        needs = (f"base{ratio}", f"base{ratio}_without_first", f"base{ratio}_without_second", "dense1")
        yield Stage(f"logits{ratio}", ("-m", "sparserefine", "logits", *config(ratio), "--device", o.device), needs)
    for ratio, seed in ((2, 0), (4, 0), (2, 1), (4, 1)):
        name = f"refiner{ratio}{f'_seed{seed}' if seed else ''}"
        total, every = o.steps(2400, 6)
        command = [
            *("-m", "sparserefine", "train", *config(ratio), "--out", f"{o.out}/{name}", "--training.device", o.device),
            *("--training.seed", str(seed), "--training.steps", total, "--training.val_every", every),
        ]
        yield Stage(name, tuple(command), (f"logits{ratio}",), again=("--resume",))


def reports(o: Options) -> Iterator[Stage]:
    """Scores on the test images beside the dense network: one JSON file each."""
    for ratio in (2, 4):
        command = [
            *("-m", "sparserefine", "evaluate", str(HERE / f"refine{ratio}.yaml"), "--data.root", f"{o.out}/data"),
            *("--refiner", f"{o.out}/refiner{ratio}/best", "--json", f"{o.out}/test{ratio}.json"),
            *("--dense", f"unet:{o.out}/dense1/best.safetensors", "--device", o.device),
        ]
        yield Stage(f"test{ratio}", tuple(command), (f"refiner{ratio}", "dense1"))


def stages(o: Options) -> list[Stage]:
    """All stages, in the order in which they matter."""
    prepare(Path(o.data), o.out / "data")
    return [*networks(o), *refiners(o), *reports(o)]


if __name__ == "__main__":
    main(__doc__, "../shared/data/camvid", "runs/camvid", stages)
