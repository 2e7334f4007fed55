"""Makes every network and every figure that docs/results.md tells about HRF, from the images alone.

python examples/hrf/all.py --device auto --minutes 60

Stages run in order, several at once with --jobs; a stage that has ended is skipped, so the same command goes on where
the last one stopped. --list prints all commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import Options, Recipe, Stage, main

FOLDS = {"06-09": "10-13", "10-13": "06-09"}
"""Training subjects, and those that the base for their coarse logits is trained on."""
HERE = Path(os.path.relpath(Path(__file__).parent))
NETWORKS = {
    "base8": Recipe(0.125, (288, 288), 2400, "2e-3"),
    "base4": Recipe(0.25, (448, 448), 2400, "2e-3"),
    "base2": Recipe(0.5, (512, 512), 2400, "1e-3", "base4"),
    "dense2": Recipe(0.5, (512, 512), 1200, "7e-4", "base2"),
    "dense1": Recipe(1.0, (640, 640), 1200, "7e-4", "base2"),
}
"""``dense2`` is ``base2``, trained for longer."""
RATIOS = (4, 2, 8)
"""Refiners for bases at 1/4, 1/2 and 1/8."""

LEVERS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ema": ("--training.ema", "0.99"),
    "focus": ("--augment.focus", "0.5"),
    "twice_the_batch": ("--training.accumulate", "2"),
    "deep_supervision": ("--training.deep_supervision", "0.4"),
    "boundary_weight": ("--training.boundary_weight", "1"),
    "wider": ("--extractor.planes", "[32,64,128,192]"),
    "five_levels": ("--extractor.planes", "[16,32,64,128,192]"),
    "two_blocks": ("--extractor.blocks", "2"),
    "two_teachers": ("--teacher.name", "python:examples.hrf.ensemble:two", "--teacher.source", "live"),
    "lower_threshold": ("--selector.threshold", "0.1"),
    "from_demo": ("--training.init", "demo"),
}
"""Options that are tried one at a time, on images at half the size."""


def networks(o: Options) -> Iterator[Stage]:
    """Bases, the bases of the folds, and the dense peers, each from the weights of the lower resolution."""

    def stage(kind: str, subjects: str, suffix: str = "", seed: int = 0) -> Stage:
        return NETWORKS[kind].stage(o, kind, (f"hrf:{o.data}", subjects, "14-15"), 12, suffix=suffix, seed=seed)

    for kind in NETWORKS:
        yield stage(kind, "06-13")
        if kind.startswith("base"):
            for held_out, subjects in FOLDS.items():
                yield stage(kind, subjects, f"_without_{held_out}")
    for kind in ("base4", "base2", "dense2", "dense1"):
        yield stage(kind, "06-13", "_seed1", 1)


def refiners(o: Options) -> Iterator[Stage]:
    """Coarse logits and teacher predictions once for each base; then refiners by targets and seed."""

    def config(ratio: int) -> list[str]:
        return [str(HERE / f"refine{ratio}.yaml"), "--data.root", o.data]

    for ratio in RATIOS:
        folds = tuple(f"base{ratio}_without_{subjects}" for subjects in FOLDS)
        needs = (f"base{ratio}", *folds, "dense2")
        yield Stage(f"logits{ratio}", ("-m", "sparserefine", "logits", *config(ratio), "--device", o.device), needs)

    def run(ratio: int, variant: str, seed: int, steps: int, *options: str) -> Stage:
        name = f"refiner{ratio}_{variant}{f'_seed{seed}' if seed else ''}"
        total, every = o.steps(steps, 6)
        command = [
            *("-m", "sparserefine", "train", *config(ratio), "--out", f"{o.out}/{name}", "--training.device", o.device),
            *("--training.seed", str(seed), "--training.steps", total, "--training.val_every", every, *options),
        ]
        return Stage(name, tuple(command), (f"logits{ratio}",), again=("--resume",))

    without_context = ("--extractor.context", "false")
    for seed in (0, 1):
        for targets in ("both", "labels", "teacher"):
            yield run(4, targets, seed, 2400, "--training.targets", targets)
        yield run(4, "both_without_context", seed, 2400, *without_context)
        yield run(2, "labels", seed, 2400)
        yield run(8, "both", seed, 2400)
    other = f"unet:{o.out}/base4_seed1/best.safetensors"
    several = run(4, "several_bases", 0, 2400, "--bases", f"[{other}]", "--logits.source", "live")
    yield replace(several, needs=("logits4", "base4_seed1"))


def halves(o: Options) -> Iterator[Stage]:
    """Refiners of images at half the size: levers, with two seeds, and the first step of a cascade."""
    config = [str(HERE / "refine_half.yaml"), "--data.root", f"{o.out}/half"]
    yield Stage("half", (str(HERE / "half.py"), o.data, f"{o.out}/half"))
    needs = ("half", "base4", *(f"base4_without_{subjects}" for subjects in FOLDS), "dense2", "dense2_seed1")
    yield Stage("logits_half", ("-m", "sparserefine", "logits", *config, "--device", o.device), needs)

    def run(name: str, seed: int, steps: int, *options: str) -> Stage:
        total, every = o.steps(steps, 2)
        command = [
            *("-m", "sparserefine", "train", *config, "--out", f"{o.out}/{name}", "--training.device", o.device),
            *("--training.seed", str(seed), "--training.steps", total, "--training.val_every", every, *options),
        ]
        return Stage(name, tuple(command), ("logits_half",), again=("--resume",))

    yield run("refiner_half", 0, 2400)
    for name, options in LEVERS.items():  # a quarter of the steps, and half of the batch
        for seed in (0, 1):
            yield run(f"half_{name}{'_seed1' if seed else ''}", seed, 600, "--training.batch", "2", *options)


def reports(o: Options) -> Iterator[Stage]:
    """Scores on the test subjects beside the dense network at full size, and at half: one JSON file each."""
    for name in (f"refiner4_{targets}" for targets in ("both", "labels", "teacher")):
        yield from (_report(o, name, dense, ratio) for dense, ratio in (("dense1", 1.0), ("dense2", 0.5)))
    yield _report(o, "refiner2_labels", "dense2", 0.5)
    yield _report(o, "refiner8_both", "dense2", 0.5)
    cascade = ("--base.name", f"refiner:{o.out}/refiner_half/best", "--base.ratio", "0.5")
    step = _report(o, "refiner4_both", "dense2", 0.5, *cascade, name="cascade")
    yield replace(step, needs=(*step.needs, "refiner_half"))


def _report(o: Options, refiner: str, dense: str, ratio: float, *more: str, name: str = "") -> Stage:
    config = HERE / f"refine{refiner[len('refiner')]}.yaml"
    command = [
        *("-m", "sparserefine", "evaluate", str(config), "--data.root", o.data, "--device", o.device),
        *("--refiner", f"{o.out}/{refiner}/best", "--json", f"{o.out}/test_{name or refiner}_{dense}.json"),
        *("--dense", f"unet:{o.out}/{dense}/best.safetensors", "--dense_ratio", f"{ratio:g}", *more),
    ]
    return Stage(f"test_{name or refiner}_{dense}", tuple(command), (refiner, dense))


def stages(o: Options) -> list[Stage]:
    """All stages, in the order in which they matter."""
    return [*networks(o), *refiners(o), *halves(o), *reports(o)]


if __name__ == "__main__":
    main(__doc__, "../shared/data/hrf", "runs/hrf", stages)
