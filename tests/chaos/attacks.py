"""The attacks on commands: each runs one in a child, disturbs it, and says what does not hold afterwards."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chaos import children, judge
from chaos.children import Child, Outcome
from chaos.scenes import COMMANDS, Attack, Scene, command_line, kind_of_event, mount, set_up, unmount_below

LOCK = ".sparserefine.lock"
_EARLY_S = 1.5
"""Python itself may still be starting [s]; what a signal does then is not ours."""


def _killed_at(work: Callable[[], int], stage: Path, kind: str, number: int) -> Callable[[], int]:
    """Runs ``work`` and kills the process just before event ``number`` of that kind."""

    def dying() -> int:
        left = [number]

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if kind_of_event(event, arguments, stage) == kind:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(hook)
        return work()

    return dying


def _limited(work: Callable[[], int], size: int, *, dies: bool) -> Callable[[], int]:
    """Runs ``work``; no file may grow beyond ``size`` bytes: the write fails, or the process dies in it."""

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return limited


def after(scene: Scene, attack: Attack, stage: Path) -> list[str]:
    """Faults of what an attack left: half files, a good refiner that does not load any more."""
    command = COMMANDS[attack.command]
    outputs = stage / command.outputs
    faults = children.result_of(lambda: judge.half_written(outputs), stage) if outputs.is_dir() else []
    for name in command.readable:
        folder = outputs / name
        if command.former or (folder / "config.json").exists() or (folder / judge.STAGED).exists():
            faults += _unreadable(folder, stage)
    return faults


def _unreadable(folder: Path, stage: Path) -> list[str]:
    def load() -> list[str]:
        from sparserefine import SparseRefiner

        try:
            SparseRefiner.from_pretrained(folder)
        except Exception as error:
            reason = str(error).replace(f"{stage}/", "").splitlines()[0][:160]
            return [f"a good refiner became unreadable: {type(error).__name__}: {reason}"]
        return []

    found: list[str] = children.result_of(load, stage)
    return found


def again(scene: Scene, attack: Attack, stage: Path) -> list[str]:
    """Runs the command again, as a user would; faults of that, and of what it leaves."""
    command = COMMANDS[attack.command]
    refusals = []
    for argv in command.again:
        outcome = children.run(command_line(argv), stage)
        faults = judge.fault_of_message(outcome.stderr, outcome.code)
        if outcome.code == 0:
            return [*faults, *finished(scene, attack, stage)]
        if faults:
            return [f"again: {fault}" for fault in faults]
        refusals.append(f"exit {outcome.code}: {outcome.stderr.strip()[-200:]}")
    return [f"can neither go on nor start: {' | '.join(refusals)}"]


def finished(scene: Scene, attack: Attack, stage: Path) -> list[str]:
    """Faults of the outputs after a run that ended well."""
    command = COMMANDS[attack.command]
    faults = children.result_of(
        lambda: judge.differences(
            stage / command.outputs, scene.expected[attack.command], scene.varying[attack.command]
        ),
        stage,
    )
    extra = {p.name for p in stage.iterdir()} - {p.name for p in scene.expected[attack.command].parent.iterdir()}
    return [*faults, *judge.leftovers(stage), *(f"unexpected in the current folder: {n}" for n in sorted(extra))]


def _signalled(scene: Scene, attack: Attack, stage: Path, number: int, seconds: float) -> tuple[str, list[str]]:
    work = command_line(COMMANDS[attack.command].argv)
    return _after_signal(scene, attack, stage, Child(work, stage).wait(at=(seconds, number)), number)


def _after_signal(
    scene: Scene, attack: Attack, stage: Path, outcome: Outcome, number: int, *, early: bool = False
) -> tuple[str, list[str]]:
    """Judges a command that got a signal; ``early``: perhaps before the command line could answer it."""
    if outcome.timed_out:
        return "hung", [f"did not end within two minutes of a signal; it stood at:\n{outcome.stderr[-4000:]}"]
    if outcome.code == 0:
        return "ended", [*after(scene, attack, stage), *finished(scene, attack, stage)]
    if outcome.signal == number != signal.SIGKILL and not finished(scene, attack, stage):
        return "ended", []  # the command had ended, the process not yet
    faults = []
    if number != signal.SIGKILL and not (early and outcome.signal == number):
        expected = {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        if outcome.code != expected:
            how = f"died of signal {outcome.signal}" if outcome.signal else f"exit {outcome.code}"
            faults.append(f"{signal.Signals(number).name}: {how}, expected exit {expected}")
        if not outcome.signal:
            faults += judge.fault_of_message(outcome.stderr, outcome.code)
    return "killed", [*faults, *after(scene, attack, stage), *again(scene, attack, stage)]


def _failed(
    scene: Scene, attack: Attack, stage: Path, outcome: Outcome, cure: Callable[[], None]
) -> tuple[str, list[str]]:
    """Judges a command whose writes fail: one line, exit 1, old files intact; and after ``cure`` it can go on."""
    faults = after(scene, attack, stage)
    if outcome.code == 0:
        cure()
        return "ended", [*faults, *finished(scene, attack, stage)]
    if outcome.code != 1:
        faults.append(f"exit {outcome.code}, expected 1: {outcome.stderr.strip()[-200:]}")
    faults += judge.fault_of_message(outcome.stderr, outcome.code)
    cure()
    return "refused", [*faults, *again(scene, attack, stage)]


def carry_out(scene: Scene, attack: Attack, stage: Path) -> tuple[str, list[str]]:
    """Carries out one attack in its copy of the project; how the command ended, and the faults."""
    command, value = COMMANDS[attack.command], attack.value
    set_up(command, stage)
    work, typical = command_line(command.argv), scene.seconds[attack.command]
    match attack.kind:
        case "rename" | "open":
            outcome = children.run(_killed_at(work, stage, attack.kind, int(value)), stage)
            return _after_signal(scene, attack, stage, outcome, signal.SIGKILL)
        case "KILL" | "TERM" | "INT":
            seconds = max(0.02, float(value) * typical)
            return _signalled(scene, attack, stage, signal.Signals[f"SIG{attack.kind}"], seconds)
        case "cut":
            outcome = children.run(_limited(work, int(value), dies=True), stage)
            return _after_signal(scene, attack, stage, outcome, signal.SIGKILL)
        case "limit":
            outcome = children.run(_limited(work, int(value), dies=False), stage)
            return _failed(scene, attack, stage, outcome, lambda: None)
        case "full":
            return _on_full_disk(scene, attack, stage, int(value))
        case "readonly":
            return _read_only(scene, attack, stage)
        case "two":
            return _two(scene, attack, stage, stopped=value == "stopped")
        case "slurm":
            return _slurm(scene, attack, stage)
        case "again":
            return _killed_often(scene, attack, stage, random.Random(int(value)))
        case "process":
            return _process(scene, attack, stage)
    raise ValueError(f"no attack {attack.kind!r}")


def _on_full_disk(scene: Scene, attack: Attack, stage: Path, free: int) -> tuple[str, list[str]]:
    """The output folder is a file system of its own with ``free`` bytes."""
    command = COMMANDS[attack.command]
    outputs = stage / command.outputs
    outputs.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=16m", "chaos", str(outputs))
    if command.former:
        shutil.copytree(stage / command.former, outputs, dirs_exist_ok=True)
    filler = outputs / "filler"
    with filler.open("wb") as file:
        room = os.statvfs(outputs)
        file.write(bytes(max(0, room.f_bavail * room.f_frsize - free // 4096 * 4096)))
    outcome = children.run(command_line(command.argv), stage)
    return _failed(scene, attack, stage, outcome, filler.unlink)


def _read_only(scene: Scene, attack: Attack, stage: Path) -> tuple[str, list[str]]:
    outputs = stage / COMMANDS[attack.command].outputs
    outputs.mkdir(exist_ok=True)
    if scene.mounts:
        mount("--bind", str(outputs), str(outputs))
        mount("-o", "remount,ro,bind", str(outputs))
        cure = lambda: unmount_below(stage)  # noqa: E731
    elif os.getuid():
        outputs.chmod(0o555)
        cure = lambda: outputs.chmod(0o755)  # noqa: E731
    else:
        return "skipped", []
    outcome = children.run(command_line(COMMANDS[attack.command].argv), stage)
    kind, faults = _failed(scene, attack, stage, outcome, cure)
    return kind, [*faults, *(["wrote into a read-only folder"] if kind == "ended" else [])]


def _two(scene: Scene, attack: Attack, stage: Path, *, stopped: bool) -> tuple[str, list[str]]:
    """Two runs into one folder: one ends well, the other is told who is there."""
    command = COMMANDS[attack.command]
    work = command_line(command.argv)
    first = Child(work, stage)
    if stopped:
        until = time.monotonic() + 10 * scene.seconds[attack.command]
        while time.monotonic() < until and not (stage / command.outputs / LOCK).exists():
            time.sleep(0.0002)
        first.signal(signal.SIGSTOP)
        second = Child(work, stage)
        outcomes = [second.wait(timeout=30)]
        first.signal(signal.SIGCONT)
        outcomes.insert(0, first.wait())
    else:
        second = Child(work, stage)
        outcomes = [first.wait(), second.wait()]
    faults, codes = [], sorted(outcome.code for outcome in outcomes)
    one_after_the_other = not stopped and attack.command == "logits" and codes == [0, 0]  # finds all there
    if codes != [0, 1] and not one_after_the_other:
        faults.append(f"exit codes {codes}, expected that one run succeeds and the other is refused with 1")
    for outcome, other in zip(outcomes, (second, first), strict=True):
        faults += judge.fault_of_message(outcome.stderr, outcome.code)
        if stopped and outcome.code == 1 and not any(str(other.pid) in line for line in judge.said(outcome.stderr)):
            faults.append(f"does not name process {other.pid}, which is there: {outcome.stderr.strip()[-200:]!r}")
    return "refused", [*faults, *after(scene, attack, stage), *finished(scene, attack, stage)]


def _slurm(scene: Scene, attack: Attack, stage: Path) -> tuple[str, list[str]]:
    """Variables of a cluster's job around a run on one device change nothing."""
    tools = stage.parent / f"{stage.name}-tools"
    tools.mkdir()
    requeued = tools / "requeued"
    (tools / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" >> '{requeued}'\n")
    (tools / "scontrol").chmod(0o755)
    variables = {
        **{"SLURM_JOB_ID": "123", "SLURM_JOBID": "123", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4"},
        **{"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1", "SLURM_NODELIST": "node", "SLURM_PROCID": "0"},
        **{"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "1"},
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    if attack.value == "checkpoint":
        (stage / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    child = Child(command_line(COMMANDS[attack.command].argv), stage, variables)
    at = (scene.seconds[attack.command] / 2, signal.SIGUSR1) if attack.value == "usr1" else None
    outcome = child.wait(at=at)
    if attack.value == "checkpoint":
        (stage / "hpc_ckpt_1.ckpt").unlink()
    faults = [f"called scontrol {requeued.read_text().strip()}"] if requeued.exists() else []
    shutil.rmtree(tools)
    if outcome.code and outcome.signal != signal.SIGUSR1:
        faults += [f"exit {outcome.code}", *judge.fault_of_message(outcome.stderr, outcome.code)]
    if outcome.code == 0:
        return "ended", [*faults, *after(scene, attack, stage), *finished(scene, attack, stage)]
    return "killed", [*faults, *after(scene, attack, stage), *again(scene, attack, stage)]


def _killed_often(scene: Scene, attack: Attack, stage: Path, generator: random.Random) -> tuple[str, list[str]]:
    """A run and three that resume it are killed; the next one ends it."""
    faults: list[str] = []
    for _ in range(4):
        seconds = generator.uniform(0.1, 1) * scene.seconds[attack.command]
        for argv in COMMANDS[attack.command].again:
            outcome = Child(command_line(argv), stage).wait(at=(seconds, signal.SIGKILL))
            if outcome.code != 1:
                break
        faults += after(scene, attack, stage)
    return "killed", [*faults, *again(scene, attack, stage)]


def _process(scene: Scene, attack: Attack, stage: Path) -> tuple[str, list[str]]:
    """The command as users start it, in a process of its own; ``value`` is ``SIGNAL-SECONDS``."""
    name, _, seconds = attack.value.partition("-")
    argv = [sys.executable, "-m", "sparserefine", *COMMANDS[attack.command].argv]

    def work() -> int:
        os.execv(argv[0], argv)

    import sparserefine

    paths = {"PYTHONPATH": str(Path(sparserefine.__file__).parents[1])}
    number = signal.Signals[f"SIG{name}"]
    outcome = Child(work, stage, paths).wait(at=(float(seconds), number))
    return _after_signal(scene, attack, stage, outcome, number, early=float(seconds) < _EARLY_S)
