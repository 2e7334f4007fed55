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

LEVERS = {
    "plain": (),
    "without_context": ("--extractor.context", "false"),
    "focus": ("--augment.focus", "0.5"),
    "ema": ("--training.ema", "0.995"),
    "twice_the_batch": ("--training.accumulate", "2"),
    "five_levels": ("--extractor.planes", "[16,32,64,128,192]"),
    "two_blocks": ("--extractor.blocks", "2"),
    "from_demo": ("--training.init", "demo"),
    "lower_threshold": ("--selector.threshold", "0.1"),
}
"""Options that are tried, one at a time."""
STRONG = (*LEVERS["five_levels"], *LEVERS["focus"], *LEVERS["ema"])


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
        needs = (f"base{ratio}", *folds, "base2")
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
        yield run(4, "both_strong", seed, 2400, *STRONG)
        yield run(2, "labels", seed, 2400)
        yield run(8, "both", seed, 2400)
    other = f"unet:{o.out}/base4_seed1/best.safetensors"
    several = run(4, "several_bases", 0, 2400, "--bases", f"[{other}]", "--logits.source", "live")
    yield replace(several, needs=("logits4", "base4_seed1"))
    for name, options in LEVERS.items():  # a quarter of the steps
        yield run(4, f"short_{name}", 0, 600, *options)


def reports(o: Options) -> Iterator[Stage]:
    """Scores on the test subjects beside the dense network at full size, and at half: one JSON file each."""
    for name in (f"refiner4_{targets}" for targets in ("both", "labels", "teacher")):
        yield from (_report(o, name, dense, ratio) for dense, ratio in (("dense1", 1.0), ("dense2", 0.5)))
    yield _report(o, "refiner2_labels", "dense2", 0.5)
    yield _report(o, "refiner8_both", "dense2", 0.5)


def _report(o: Options, refiner: str, dense: str, ratio: float) -> Stage:
    config = HERE / f"refine{refiner[len('refiner')]}.yaml"
    command = [
        *("-m", "sparserefine", "evaluate", str(config), "--data.root", o.data, "--device", o.device),
        *("--refiner", f"{o.out}/{refiner}/best", "--json", f"{o.out}/test_{refiner}_{dense}.json"),
        *("--dense", f"unet:{o.out}/{dense}/best.safetensors", "--dense_ratio", f"{ratio:g}"),
    ]
    return Stage(f"test_{refiner}_{dense}", tuple(command), (refiner, dense))


def stages(o: Options) -> list[Stage]:
    """All stages, in the order in which they matter."""
    return [*networks(o), *refiners(o), *reports(o)]


if __name__ == "__main__":
    main(__doc__, "../shared/data/hrf", "runs/hrf", stages)
