"""What attacks start from: the commands, a project, what an undisturbed run of each leaves, file systems to mount."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from chaos import children, judge, project


@dataclass(frozen=True)
class Command:
    """A command to attack.

    Attributes:
        argv: its arguments.
        again: what to run after a kill: the first of these that is accepted.
        outputs: the folder that it writes to.
        readable: refiners in ``outputs`` that are good once they are there.
        former: a folder of the project that ``outputs`` is a copy of before the command runs; empty: none.
    """

    argv: tuple[str, ...]
    again: tuple[tuple[str, ...], ...]
    outputs: str
    readable: tuple[str, ...] = ()
    former: str = ""


_TRAIN = ("train", "config.yaml")
_LOGITS = ("logits", "config.yaml")
_PREDICT = ("predict", "data/images", "--refiner", "refiner", "--out", "masks", "--overlay")
_QUANTIZE = ("quantize", "data/images/0.png", "--refiner", "refiner", "--out", "int8")
COMMANDS = {
    "train": Command(_TRAIN, ((*_TRAIN, "--resume"), _TRAIN), "run", ("best", "last")),
    "logits": Command(_LOGITS, (_LOGITS,), "logits"),
    "predict": Command(_PREDICT, ((*_PREDICT, "--skip_existing"),), "masks"),
    "quantize": Command(_QUANTIZE, (_QUANTIZE,), "int8", (".",), "int8-of-before"),
}


@dataclass(frozen=True)
class Attack:
    """``command/kind/value``: the name says all that is needed to repeat it."""

    command: str
    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.command}/{self.kind}/{self.value}"


@dataclass
class Scene:
    """What all attacks start from.

    Attributes:
        folder: holds the rest.
        template: the project, with a trained refiner; each attack gets a copy.
        expected: for each command the folder that an undisturbed run leaves.
        events: for each command how often it renames (or removes, or makes a folder), and opens files to write.
        seconds: for each command how long an undisturbed run takes.
        varying: for each command keys of JSON that differ between two undisturbed runs.
        mounts: whether file systems can be mounted here.
        faults: what was wrong without any disturbance.
    """

    folder: Path
    template: Path
    expected: dict[str, Path]
    events: dict[str, dict[str, int]]
    seconds: dict[str, float]
    varying: dict[str, frozenset[str]]
    mounts: bool
    faults: tuple[str, ...] = ()


def command_line(arguments: tuple[str, ...]) -> Callable[[], int]:
    """``sparserefine`` with these arguments, in this process."""

    def work() -> int:
        from sparserefine.commands.main import main

        return main(list(arguments))

    return work


def prepare(folder: Path) -> Scene:
    """Makes the project, imports what the commands need, and runs each of them undisturbed, twice."""
    torch.set_num_threads(1)
    template = project.make(folder / "template")
    warm = project.make(folder / "warm")
    commands = (_TRAIN, ("quantize", "data/images/0.png", "--refiner", "run/best", "--out", "refiner"), _LOGITS)

    def each() -> None:
        for argv in (*commands, _PREDICT):
            if command_line(argv)():
                raise RuntimeError(f"{argv} failed")

    children.preload(each, warm)
    shutil.copytree(warm / "run" / "best", template / "refiner")
    shutil.copytree(warm / "refiner", template / "int8-of-before")
    shutil.rmtree(warm)
    scene = Scene(folder, template, {}, {}, {}, {}, _can_mount(folder))
    faults = []
    for name, command in COMMANDS.items():
        outputs = []
        for turn in ("one", "two"):
            stage = folder / f"undisturbed-{name}-{turn}"
            shutil.copytree(template, stage)
            set_up(command, stage)
            log = folder / f"events-{name}"
            outcome = children.run(_counted(command_line(command.argv), stage, log), stage)
            if outcome.code:
                raise RuntimeError(f"{command.argv} ended with {outcome.code} undisturbed: {outcome.stderr[-2000:]}")
            scene.seconds[name] = outcome.seconds
            scene.events[name] = json.loads(log.read_text())
            outputs.append(stage / command.outputs)
        scene.expected[name] = outputs[0]
        scene.varying[name] = judge.varying_in(*outputs)
        faults += [f"{name}, run twice: {fault}" for fault in _between(*outputs, scene.varying[name])]
        faults += [f"{name}: {fault}" for fault in judge.leftovers(outputs[0].parent)]
    scene.faults = tuple(faults)
    return scene


def _between(one: Path, other: Path, varying: frozenset[str]) -> list[str]:
    return judge.differences(one, other, varying) + judge.half_written(one)


def set_up(command: Command, stage: Path) -> None:
    """Makes the outputs that are there before the command runs."""
    if command.former:
        shutil.copytree(stage / command.former, stage / command.outputs)


def written_by(scene: Scene, command: str) -> int:
    """Bytes of the largest file that a command writes."""
    return max(path.stat().st_size for path in judge.finals(scene.expected[command]))


_RENAMES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def kind_of_event(event: str, arguments: tuple[object, ...], stage: Path) -> str:
    """``rename``, ``open`` (to write), or nothing, for an audit event about a path of the project."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if not writes or not isinstance(path, (str, bytes, os.PathLike)):
            return ""
        return "open" if Path(os.fsdecode(path)).absolute().is_relative_to(stage) else ""
    if event not in _RENAMES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return ""
    return "rename" if Path(os.fsdecode(arguments[0])).absolute().is_relative_to(stage) else ""


def _counted(work: Callable[[], int], stage: Path, log: Path) -> Callable[[], int]:
    """Runs ``work`` and writes how many events of each kind there were."""

    def counting() -> int:
        counts, parent = {"rename": 0, "open": 0}, os.getpid()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if os.getpid() == parent and (kind := kind_of_event(event, arguments, stage)):
                counts[kind] += 1

        sys.addaudithook(hook)
        code = work()
        total = dict(counts)
        log.write_text(json.dumps(total))
        return code

    return counting


def _can_mount(folder: Path) -> bool:
    probe = folder / "probe"
    probe.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "chaos", str(probe))
    except (OSError, RuntimeError):
        return False
    unmount_below(probe)
    probe.rmdir()
    return True


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def unmount_below(folder: Path) -> None:
    """Unmounts what attacks mounted on ``folder`` and below it."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed([p for p in points if Path(p).is_relative_to(folder)]):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
