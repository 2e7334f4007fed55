"""Gives bad files to whatever reads them. Each is refused in one line that names it, or read; nothing else may happen.

    PYTHONPATH=tests python -m chaos.fuzz --seconds 60          or   make fuzz SECONDS=60
    PYTHONPATH=tests python -m chaos.fuzz --only image/17       one case again
    PYTHONPATH=tests python -m chaos.fuzz --only image --seconds 600

A case fails if the process crashes, hangs, wants more than 2 GB, raises an exception that is not documented, says more
or less than one line, takes a lie for the truth, or leaves half a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chaos import bad_images, children, judge, project
from chaos.children import Outcome
from chaos.readers import Corpus, Reader, readers

HANG_S = 10.0
MUST_REFUSE = ("image", "label", "picture", "weights", "logits")
"""Kinds of which no lie that is called a claim may be believed."""
MEMORY = 2 << 30
LONGEST = 10_000
"""Characters of a line; a path alone may have 4096."""
LEAST = 700
"""Cases of a run that has time enough; more follow while there is time."""


@dataclass(frozen=True)
class Result:
    """What came of a case; ``fault`` is empty if that is allowed."""

    case: str
    what: str
    outcome: str
    fault: str


def _call(function: Callable[[Path], object], path: Path) -> int:
    """0: read; 1: refused as documented, the message on standard error; 3: another exception, with its traceback."""
    children.limit_memory(MEMORY)
    try:
        function(path)
    except (ValueError, OSError) as error:
        print(f"sparserefine: {error}", file=sys.stderr)
        return 1
    return 0


def _command(argv: tuple[str, ...]) -> int:
    from sparserefine.commands.main import main

    children.limit_memory(MEMORY)
    return main(list(argv))


def examine(corpus: Corpus, kind: str, number: int, stage: Path) -> Result:
    """Makes one case in ``stage`` and has it read."""
    reader = corpus.readers[kind]
    path, what = corpus.make(kind, number, reader, stage)
    ways: list[Any] = [*reader.calls, *reader.commands]
    way = ways[(number // 2) % len(ways)]
    before = _inputs(stage, path)
    if callable(way):
        outcome = children.run(lambda: _call(way, path), stage, HANG_S)
    else:
        argv = tuple(path.name if part == "FILE" else part for part in way)
        outcome = children.run(lambda: _command(argv), stage, HANG_S)
    fault = _fault(outcome, path, reader, command=not callable(way))
    if not fault and outcome.code == 0 and what.startswith("claim") and kind in MUST_REFUSE:
        fault = "was read as if it were what it claims to be"
    if not fault and _inputs(stage, path) != before:
        fault = "changed files that it only reads"
    if not fault and not callable(way):
        fault = next(iter(_half(stage)), "")
    names = {0: "read", 1: "refused", 2: "refused"}
    outcome_name = "failed" if fault else names.get(outcome.code, "failed")
    return Result(f"{kind}/{number}", what if callable(way) else f"{what} ({way[0]})", outcome_name, fault)


def _half(stage: Path) -> Iterator[str]:
    for name in ("out", "new"):
        if (stage / name).is_dir():
            yield from children.result_of(lambda name=name: judge.half_written(stage / name), stage)  # type: ignore[misc]
            yield from (fault for fault in judge.leftovers(stage / name) if not fault.endswith(".lock"))


def _inputs(stage: Path, bad: Path) -> dict[str, int]:
    """Sizes of the files that no command writes."""
    files = [p for name in ("data", "refiner", "base.safetensors") for p in [stage / name, *(stage / name).rglob("*")]]
    return {str(p): p.stat().st_size for p in files if p != bad and p.is_file()}


def _fault(outcome: Outcome, path: Path, reader: Reader, *, command: bool) -> str:
    """What is wrong about how a case ended; empty if nothing is."""
    if outcome.timed_out:
        return f"hangs: no end after {HANG_S:g} s"
    if outcome.signal:
        return f"crash: signal {signal.Signals(outcome.signal).name}: {outcome.stderr.strip()[-200:]}"
    if outcome.peak_mb - _own_mb() > MEMORY / 2**20:
        return f"took {outcome.peak_mb - _own_mb():.0f} MB"
    if "Traceback (most recent call last)" in outcome.stderr:
        lines = [line for line in outcome.stderr.splitlines() if line and line[0] not in " \t"]
        return f"undocumented exception: {lines[-1][:200]}"
    if "this must not run" in outcome.stdout + outcome.stderr:
        return "ran code out of the file"
    if outcome.code == 0:
        return ""
    if outcome.code not in ((1, 2) if command else (1,)):
        return f"exit {outcome.code}: {outcome.stderr.strip()[-200:]}"
    return _fault_of_lines(outcome, path, reader, command=command)


def _fault_of_lines(outcome: Outcome, path: Path, reader: Reader, *, command: bool) -> str:
    """A refusal is one line. That of arguments, exit 2, may list what each of several types would have expected."""
    lines = [line.rpartition("\r")[2] for line in outcome.stderr.split("\n") if line.strip()]
    ours = [line for line in lines if line.startswith(("sparserefine", path.name, "data/images"))]
    if not ours:
        return f"exit {outcome.code} without a line of ours: {outcome.stderr.strip()[-200:]!r}"
    if "this may be a defect" in outcome.stderr:
        return f"unforeseen exception: {ours[0][:200]}"
    more = [line for line in lines[lines.index(ours[0]) :] if not line.startswith("`sparserefine")]
    if len(more) > (1 if outcome.code == 1 else 10):
        return f"{len(more)} lines, expected one: {outcome.stderr.strip()[:300]!r}"
    if command and not all(line.isprintable() for line in more):
        return f"control characters: {outcome.stderr.strip()[:200]!r}"
    if command and max(map(len, more)) > LONGEST:
        return f"a line of {max(map(len, more))} characters: {ours[0][:100]!r}"
    if reader.named and not any(name in ours[0] for name in (path.name, path.stem, path.parent.name, *reader.instead)):
        return f"does not name {path.name}: {ours[0][:200]!r}"
    return ""


def _own_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def prepare(template: Path) -> None:
    """A project with a trained refiner, a finished run and stored logits; and what readers import is imported."""
    torch.set_num_threads(1)
    project.make(template)
    from sparserefine.commands.main import main

    def each() -> None:
        for argv in (
            ["train", "config.yaml"],
            ["logits", "config.yaml"],
            ["predict", "data/images/0.png", "--refiner", "run/best", "--out", "warm"],
        ):
            if main(argv):
                raise RuntimeError(f"{argv} failed")
        readers()
        bad_images.liars()

    children.preload(each, template)
    shutil.copytree(template / "run" / "best", template / "refiner")
    shutil.rmtree(template / "warm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs cases; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="chaos.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all of it; 0: the least number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a kind, or one case: image, image/17")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", default="", help="folder for failing cases; default: in the temporary folder")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    print(f"fuzz: seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        template = Path(folder, "template")
        prepare(template)
        known = readers()
        corpus = Corpus(template, given.seed, known)
        if corpus.onnx is None:
            print("fuzz: no ONNX files, since onnx is not installed")
            known.pop("onnx")
        print(f"fuzz: ready after {time.monotonic() - started:.0f} s", flush=True)
        run = _Run(Path(folder), template, corpus, known, given)
        results = run.all(started)
    return _report(results, time.monotonic() - started, given)


def _cases(readers: dict[str, Reader], only: str) -> Iterator[tuple[str, int]]:
    """Kinds and numbers without end, each kind with its share."""
    kind, _, number = only.partition("/")
    if number:
        yield kind, int(number)
        return
    chosen = [name for name in readers if not kind or name == kind]
    counts = Counter[str]()
    while chosen:
        for name in chosen:
            for _ in range(readers[name].weight):
                yield name, counts[name]
                counts[name] += 1


@dataclass(frozen=True)
class _Run:
    folder: Path
    template: Path
    corpus: Corpus
    known: dict[str, Reader]
    given: argparse.Namespace

    def all(self, started: float) -> list[Result]:
        """The results of the workers."""
        files = [self.folder / f"results-{worker}" for worker in range(self.given.workers)]

        def work(worker: int) -> int:
            with files[worker].open("w") as file:
                for index, (kind, number) in enumerate(_cases(self.known, self.given.only)):
                    late = time.monotonic() - started > self.given.seconds
                    if (late and self.given.seconds) or (not self.given.seconds and index >= LEAST):
                        break
                    if index % self.given.workers == worker:
                        file.write(json.dumps(asdict(self._one(kind, number))) + "\n")
                        file.flush()
            return 0

        running = [children.Child(lambda w=w: work(w), self.folder) for w in range(self.given.workers)]  # type: ignore[misc]
        for child in running:
            outcome = child.wait(timeout=7200)
            if outcome.code:
                raise RuntimeError(f"a worker ended with {outcome.code}: {outcome.stderr[-2000:]}")
        return [Result(**json.loads(line)) for file in files for line in file.read_text().splitlines()]

    def _one(self, kind: str, number: int) -> Result:
        stage = self.folder / f"stage-{kind}-{number}"
        shutil.copytree(self.template, stage)
        try:
            result = examine(self.corpus, kind, number, stage)
        except Exception as error:
            result = Result(
                f"{kind}/{number}", "", "failed", f"the case itself failed: {type(error).__name__}: {error}"
            )
        if result.fault:
            _save(stage, result, self.given)
        shutil.rmtree(stage, ignore_errors=True)
        return result


def _saved(case: str, given: argparse.Namespace) -> Path:
    root = Path(given.save or Path(tempfile.gettempdir(), "sparserefine-fuzz"))
    return root / f"{given.seed}-{case.replace('/', '-')}"


def _save(stage: Path, result: Result, given: argparse.Namespace) -> None:
    """Keeps the files of a failing case, to look at; FIFOs and the like stay behind."""
    target = _saved(result.case, given)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in stage.rglob("*"):
        if path.is_file() and not path.is_symlink():
            copy = target / path.relative_to(stage)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    (target / "FAULT.txt").write_text(f"{result.case}: {result.what}\n{result.fault}\n", errors="backslashreplace")


def _report(results: list[Result], seconds: float, given: argparse.Namespace) -> int:
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.case.partition("/")[0], Counter()).update([result.outcome])
    print(f"\n{'kind':<12}{'cases':>8}{'read':>9}{'refused':>9}{'failed':>9}")
    for kind, count in counts.items():
        print(f"{kind:<12}{count.total():>8}{count['read']:>9}{count['refused']:>9}{count['failed']:>9}")
    failed = [result for result in results if result.fault]
    for result in failed:
        print(f"\nFAILED {result.case}, {result.what}: {result.fault}")
        print(f"    kept in {_saved(result.case, given)}; repeat: PYTHONPATH=tests {sys.executable} -m chaos.fuzz "
              f"--seed {given.seed} --only {result.case}")  # fmt: skip
    print(f"\nfuzz: {len(results)} cases, {len(failed)} failed, in {seconds:.0f} s (seed {given.seed})")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    children.with_one_thread()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
