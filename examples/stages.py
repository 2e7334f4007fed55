"""Runs the stages of an experiment: each once, in the order of their needs, several at a time, for a given time."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: what it makes, and the folder for it.
        command: its arguments; Python's own path stands before them.
        needs: names of the stages whose results it reads.
        again: further arguments if it was begun before and has left ``config.json``.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What all experiments can be told on the command line.

    Attributes:
        data: folder of the images.
        out: folder for results; ``<out>/<stage>/done`` says that a stage has ended well.
        device: where networks run.
        share: of the steps of all trainings.
    """

    data: str
    out: Path
    device: str
    share: float

    def steps(self, steps: int, validations: int) -> tuple[str, str]:
        """Steps, and steps between validations, shortened to the share."""
        every = max(1, round(steps * self.share / validations))
        return str(every * validations), str(every)


@dataclass(frozen=True)
class Recipe:
    """How a dense network is trained (``train_dense.py``).

    Attributes:
        ratio: size of its input relative to the image.
        crop: height and width of the crops [px of its input].
        steps: optimiser steps of eight crops.
        lr: peak learning rate.
        first: name of the recipe whose weights it begins with; ``None``: random ones.
    """

    ratio: float
    crop: tuple[int, int]
    steps: int
    lr: str
    first: str | None = None

    def stage(
        self,
        o: Options,
        name: str,
        splits: Sequence[str],
        validations: int,
        *more: str,
        suffix: str = "",
        seed: int = 0,
    ) -> Stage:
        """The stage that trains it.

        Args:
            o: of the command line.
            name: of this recipe.
            splits: data as ``reader:folder``, and the splits to train on and to choose by.
            validations: how often it is scored.
            more: further arguments of ``train_dense.py``.
            suffix: appended to the names of this stage and of the one that it begins with: other images or seeds.
            seed: of weights and crops.
        """
        total, every = o.steps(self.steps, validations)
        needs = () if self.first is None else (self.first + suffix,)
        command = [
            os.path.relpath(Path(__file__).with_name("train_dense.py")),
            *("--data", splits[0], "--train", splits[1], "--val", splits[2], *more),
            *("--ratio", f"{self.ratio:g}", "--crop", *map(str, self.crop), "--batch", "8", "--lr", self.lr),
            *("--steps", total, "--val-every", every, "--seed", str(seed), "--device", o.device),
            *("--out", f"{o.out}/{name}{suffix}"),
            *(argument for need in needs for argument in ("--init", f"{o.out}/{need}/best.safetensors")),
        ]
        return Stage(name + suffix, tuple(command), needs)


def main(doc: str, data: str, out: str, stages: Callable[[Options], Sequence[Stage]]) -> None:
    """The command line of an experiment.

    Args:
        doc: what it does, for ``--help``.
        data: default folder of the images.
        out: default folder for results.
        stages: all stages, in the order in which they matter.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--minutes", type=float, default=60.0, help="after these, nothing new is begun")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of each training; 0.1: a tenth")
    parser.add_argument("--jobs", type=int, default=1, help="stages that run at once")
    parser.add_argument("--only", nargs="+", default=[""], help="stages whose names begin so; default: all")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    every = stages(Options(args.data, args.out, args.device, args.share))
    wanted = [stage for stage in every if stage.name.startswith(tuple(args.only))]
    if args.list:
        for stage in wanted:
            print(f"# {stage.name}{' after ' if stage.needs else ''}{', '.join(stage.needs)}")
            print(f"python {shlex.join(stage.command)}")
        return
    left = _run(wanted, args.out, args.jobs, time.monotonic() + 60 * args.minutes)
    if left:
        sys.exit(f"not done: {', '.join(left)}; the same command goes on")


def _run(todo: list[Stage], out: Path, jobs: int, deadline: float) -> list[str]:
    """Runs the stages whose needs are met; returns the names of those that failed or were not begun."""
    running: dict[Stage, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    while todo or running:
        for stage in list(todo):
            if (out / stage.name / "done").exists():
                print(f"{stage.name}: done before", flush=True)
            elif (
                len(running) >= jobs
                or time.monotonic() > deadline
                or not all((out / name / "done").exists() for name in stage.needs)
            ):
                continue
            else:
                command = stage.command + (stage.again if (out / stage.name / "config.json").exists() else ())
                print(f"{stage.name}: {shlex.join(command)}", flush=True)
                (out / "logs").mkdir(parents=True, exist_ok=True)
                with (out / "logs" / f"{stage.name}.txt").open("ab") as log:
                    running[stage] = subprocess.Popen((sys.executable, *command), stdout=log, stderr=log)
            todo.remove(stage)
        if not running:
            break  # out of time, or what the rest needs has failed
        time.sleep(0.2)
        for stage, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[stage]
            if code:
                failed.append(stage.name)
            else:
                (out / stage.name).mkdir(exist_ok=True)
                (out / stage.name / "done").touch()
            print(f"{stage.name}: {'done' if not code else f'exit code {code}, see its log'}", flush=True)
    return failed + [stage.name for stage in todo]
