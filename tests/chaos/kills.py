"""Kills commands at every rename and at random moments, fills their disk, starts two at once, and judges what is left.

    PYTHONPATH=tests python -m chaos.kills --seconds 60     or   make chaos SECONDS=60
    PYTHONPATH=tests python -m chaos.kills --seconds 0      every place once: about a quarter of an hour
    PYTHONPATH=tests python -m chaos.kills --only train/rename/7

After each attack every file under its final name is whole, a former good refiner loads, and the command, started again,
ends with what an undisturbed run leaves, to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos import attacks, children, scenes
from chaos.scenes import COMMANDS, Attack, Scene

RANDOM = 12
"""Random moments of each command and signal when every place is tried."""


AT_A_MOMENT = ("KILL", "TERM", "INT", "process")
"""Kinds of attacks that come at a moment of time; the others come at an event and are the same each time."""
REPEATS = 3


@dataclass(frozen=True)
class Result:
    """What an attack found."""

    attack: str
    outcome: str
    faults: tuple[str, ...]
    seconds: float
    unsteady: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs attacks; 1 if one found a fault."""
    parser = argparse.ArgumentParser(prog="chaos.kills")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for attacks; 0: every place once")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, and of the order")
    parser.add_argument("--only", default="", help="attacks whose name starts so: train/rename/7, predict, train/KILL")
    parser.add_argument("--workers", type=int, default=2, help="attacks at once")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    print(f"chaos: seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        scene = scenes.prepare(Path(folder))
        chosen = _chosen(_attacks(scene, random.Random(given.seed)), given.only)
        ready = time.monotonic() - started
        deadline = started + ready + given.seconds if given.seconds and not given.only else None
        print(f"chaos: {len(chosen)} attacks on {', '.join(scene.expected)}; ready after {ready:.0f} s", flush=True)
        results = [
            Result("undisturbed", "ended", scene.faults, 0.0),
            *_attacked(scene, chosen, deadline, given.workers),
        ]
    return _report(results, len(chosen), time.monotonic() - started, given.seed)


def _chosen(planned: list[Attack], only: str) -> list[Attack]:
    """Those whose name starts with ``only``; a whole name is an attack also if it is not planned."""
    if only.count("/") == 2:
        return [Attack(*only.split("/"))]
    return [attack for attack in planned if not only or f"{attack}/".startswith(f"{only.rstrip('/')}/")]


def _attacks(scene: Scene, generator: random.Random) -> list[Attack]:
    """All attacks, of each command and kind a few early in the list, so that a short run sees each of them."""
    queues: dict[str, list[Attack]] = {}
    for command in COMMANDS:
        events = scene.events[command]
        values: dict[str, list[str]] = {
            "rename": [str(n) for n in range(events["rename"])],
            "open": [str(n) for n in range(events["open"])],
            **{name: [f"{generator.uniform(0.02, 1):.3f}" for _ in range(RANDOM)] for name in ("KILL", "TERM", "INT")},
            "cut": [str(n) for n in _sizes(scene, command, generator)],
            "limit": [str(n) for n in _sizes(scene, command, generator)],
            "full": [str(n) for n in _sizes(scene, command, generator)] if scene.mounts else [],
            "readonly": ["0"],
            "two": ["stopped", "at-once"] if command != "quantize" else [],
            "slurm": ["variables", "usr1", "checkpoint"] if command in ("train", "predict") else [],
            "again": [str(generator.randrange(10**6)) for _ in range(RANDOM // 2)] if command == "train" else [],
            "process": [f"{name}-{generator.uniform(0.5, 4.5):.2f}" for name in ("KILL", "TERM", "INT")],
        }
        for kind, chosen in values.items():
            generator.shuffle(chosen)
            queues[f"{command}/{kind}"] = [Attack(command, kind, value) for value in chosen]
    found, waiting = [], [queue for queue in queues.values() if queue]
    while waiting:
        found += [queue.pop(0) for queue in waiting]
        waiting = [queue for queue in waiting if queue]
    return found


def _sizes(scene: Scene, command: str, generator: random.Random) -> list[int]:
    """Bytes at which a disk is full: from none to what the command writes."""
    most = max(4096, scenes.written_by(scene, command))
    return sorted({0, *(int(most * generator.random() ** 2) for _ in range(RANDOM))})


def _attacked(scene: Scene, chosen: list[Attack], deadline: float | None, workers: int) -> list[Result]:
    """The results of worker processes, each with its share of the attacks, until the deadline."""
    files = [scene.folder / f"results-{worker}" for worker in range(workers)]

    def work(worker: int) -> int:
        with files[worker].open("w") as file:
            for attack in chosen[worker::workers]:
                if deadline is not None and time.monotonic() > deadline:
                    break
                file.write(json.dumps(asdict(_one(scene, attack))) + "\n")
                file.flush()
        return 0

    running = [children.Child(_bound(work, worker), scene.folder) for worker in range(workers)]
    problems = [child.wait(timeout=3600) for child in running]
    for problem in problems:
        if problem.code:
            raise RuntimeError(f"a worker ended with {problem.code}: {problem.stderr[-2000:]}")
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [
        Result(v["attack"], v["outcome"], tuple(v["faults"]), v["seconds"], tuple(v["unsteady"]))
        for v in map(json.loads, lines)
    ]


def _bound(work: Callable[[int], int], worker: int) -> Callable[[], int]:
    return lambda: work(worker)


def _one(scene: Scene, attack: Attack) -> Result:
    """Attacks. A fault at a moment of time counts if it comes again: a machine that stands still looks like a hang.

    What does not come again is told, but is no failure.
    """
    result = _once(scene, attack)
    if not result.faults or attack.kind not in AT_A_MOMENT:
        return result
    for _ in range(REPEATS):
        again = _once(scene, attack)
        if again.faults:
            return again
    return Result(result.attack, result.outcome, (), result.seconds, result.faults)


def _once(scene: Scene, attack: Attack) -> Result:
    started = time.monotonic()
    with _stage(scene, attack) as stage:
        try:
            outcome, faults = attacks.carry_out(scene, attack, stage)
        except Exception as error:
            outcome, faults = "failed", [f"the attack itself failed: {type(error).__name__}: {error}"[:500]]
    return Result(str(attack), outcome, tuple(faults), time.monotonic() - started)


@contextlib.contextmanager
def _stage(scene: Scene, attack: Attack) -> Iterator[Path]:
    """A copy of the project for one attack."""
    stage = scene.folder / f"stage-{os.getpid()}-{str(attack).replace('/', '-')}"
    shutil.copytree(scene.template, stage)
    try:
        yield stage
    finally:
        scenes.unmount_below(stage)
        shutil.rmtree(stage, ignore_errors=True)


def _report(results: list[Result], planned: int, seconds: float, seed: int) -> int:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for result in results[1:]:
        command, kind, _ = result.attack.split("/")
        counts.setdefault((kind, command), Counter()).update([result.outcome, "faulty" if result.faults else "held"])
    outcomes = sorted({o for count in counts.values() for o in count} - {"faulty", "held"})
    print(f"\n{'attack':<10}{'command':<10}" + "".join(f"{o:>11}" for o in (*outcomes, "held", "faulty")))
    for (kind, command), count in sorted(counts.items()):
        print(f"{kind:<10}{command:<10}" + "".join(f"{count[o]:>11}" for o in (*outcomes, "held", "faulty")))
    failed = [result for result in results if result.faults]
    for result in (result for result in results if result.unsteady):
        print(f"\nonce, and not in {REPEATS} repeats, {result.attack}: " + "\n    ".join(result.unsteady[:6]))
    for result in failed:
        print(f"\nFAILED {result.attack}: " + "\n    ".join(result.faults[:6]))
        print(f"    repeat: PYTHONPATH=tests {sys.executable} -m chaos.kills --seed {seed} --only {result.attack}")
    kills = sum(count["killed"] for count in counts.values())
    done = len(results) - 1
    print(
        f"\nchaos: {done} attacks of {planned}, {kills} of them kills, {len(failed)} with faults, "
        f"in {seconds:.0f} s (seed {seed})"
    )
    if len(results) < 2:
        print("chaos: nothing was attacked: no attack of that name, or no time for one")
    return 1 if failed or len(results) < 2 else 0


if __name__ == "__main__":
    children.with_one_thread()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
