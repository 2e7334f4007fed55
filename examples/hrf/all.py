"""Makes every network and every figure that docs/results.md reports about HRF, from the images alone.

    python examples/hrf/all.py --device auto --minutes 60

Stages run in the order of ``stages()``, several at once with ``--jobs``; a stage that has its result is skipped, so the
same command goes on where the last one ended. ``--minutes`` bounds how long new stages are begun; ``--share`` shortens all
trainings (0.1: a tenth of the steps). ``--only`` names stages by their first letters.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDS = {"06-09": "10-13", "10-13": "06-09"}
"""Training subjects, and those that the base for their coarse logits is trained on."""
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: what it makes.
        result: the file that is there when it has ended.
        needs: names of the stages whose results it reads.
        command: its arguments.
    """

    name: str
    result: Path
    needs: tuple[str, ...]
    command: tuple[str, ...]


def networks(out: Path, data: str, device: str, share: float) -> Iterator[Stage]:
    """Bases, the bases of the folds, and the dense peers: one recipe, each resolution from the weights of the lower."""
    recipes = {  # name: ratio, crop, steps, rate, the network that it begins with
        "base8": (0.125, 288, 2400, 2e-3, None),
        "base4": (0.25, 448, 2400, 2e-3, None),
        "base2": (0.5, 512, 2400, 1e-3, "base4"),
        "dense1": (1.0, 640, 2400, 1e-3, "base2"),
    }

    def stage(name: str, kind: str, subjects: str, suffix: str, seed: int) -> Stage:
        ratio, crop, steps, lr, first = recipes[kind]
        steps = max(2, round(steps * share / 12) * 12)
        command = [
            *(sys.executable, str(HERE / "train_dense.py"), "--data", data, "--device", device, "--train", subjects),
            *("--ratio", f"{ratio:g}", "--crop", str(crop), str(crop), "--batch", "8", "--lr", f"{lr:g}"),
            *("--steps", str(steps), "--val-every", str(max(1, steps // 12)), "--seed", str(seed)),
            *("--out", str(out / name)),
        ]
        needs = () if first is None else (first + suffix,)
        if needs:
            command += ["--init", str(out / needs[0] / "best.safetensors")]
        return Stage(name, out / name / "last.safetensors", needs, tuple(command))

    for kind in recipes:
        yield stage(kind, kind, "06-13", "", 0)
        if kind.startswith("base"):
            for held_out, subjects in FOLDS.items():
                yield stage(f"{kind}_without_{held_out}", kind, subjects, f"_without_{held_out}", 0)
    for kind in ("base4", "base2", "dense1"):
        yield stage(f"{kind}_seed1", kind, "06-13", "_seed1", 1)


def stages(args: argparse.Namespace) -> list[Stage]:
    """All stages, in the order in which they matter."""
    return list(networks(args.out, args.data, args.device, args.share))


def run(every: list[Stage], only: tuple[str, ...], jobs: int, deadline: float) -> list[Stage]:
    """Runs the stages whose needs are met, ``jobs`` at once; returns those that were not begun or failed."""
    running: dict[Stage, subprocess.Popen[bytes]] = {}
    failed: list[Stage] = []
    known = {stage.name: stage for stage in every}
    todo = [stage for stage in every if stage.name.startswith(only)]
    while todo or running:
        for stage in list(todo):
            ready = all(known[name].result.exists() for name in stage.needs)
            if stage.result.exists():
                print(f"{stage.name}: done before", flush=True)
            elif not ready or len(running) >= jobs or time.monotonic() > deadline:
                continue
            else:
                print(f"{stage.name}: {shlex.join(stage.command[1:])}", flush=True)
                stage.result.parent.mkdir(parents=True, exist_ok=True)
                with (stage.result.parent / f"{stage.name}.log").open("wb") as log:
                    running[stage] = subprocess.Popen(stage.command, stdout=log, stderr=subprocess.STDOUT)
            todo.remove(stage)
        if not running:
            break  # out of time, or what the rest needs has failed
        time.sleep(0.2)
        for stage, process in list(running.items()):
            if process.poll() is not None:
                del running[stage]
                if process.returncode or not stage.result.exists():
                    failed.append(stage)
                print(f"{stage.name}: {'FAILED, see its log' if stage in failed else 'done'}", flush=True)
    return failed + todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/hrf")
    parser.add_argument("--out", type=Path, default=Path("runs/hrf"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    left = run(stages(args), tuple(args.only), args.jobs, time.monotonic() + 60 * args.minutes)
    if left:
        sys.exit("not done: " + ", ".join(stage.name for stage in left) + "; the same command goes on")


if __name__ == "__main__":
    main()
