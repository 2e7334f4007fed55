"""The attacks can fail: what they are there to find is put into their way here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sparserefine
from chaos import children, fuzz, judge
from chaos.children import Child, Outcome
from chaos.readers import Reader

TESTS = Path(__file__).parent


def outputs(folder: Path) -> Path:
    """One file of each kind that commands write."""
    folder.mkdir()
    Image.effect_noise((20, 20), 9).save(folder / "0.png")
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    torch.save({"a": torch.ones(2)}, folder / "last.ckpt")
    return folder


def test_whole_files_pass_and_each_one_cut_short_is_found(tmp_path):
    whole = outputs(tmp_path / "whole")
    assert judge.half_written(whole) == judge.leftovers(whole) == []
    for path in list(whole.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        (fault,) = judge.half_written(whole)
        assert path.name in fault
        path.write_bytes(content)


@pytest.mark.parametrize("line", ['{"step": 2, "loss": 1}', '{"step": 1, "loss": 1}', '{"step": 3, "loss": NaN}'])
def test_steps_that_repeat_or_go_back_and_nan_are_found(tmp_path, line):
    log = outputs(tmp_path / "run") / "log.jsonl"
    log.write_text(f"{log.read_text()}{line}\n")
    assert len(judge.half_written(log.parent)) == 1


def test_leftovers_are_found_and_are_no_outputs(tmp_path):
    folder = outputs(tmp_path / "run")
    (folder / ".sparserefine-0-1-2.tmp").write_text("half")
    (folder / ".sparserefine.lock").touch()
    assert len(judge.leftovers(folder)) == 2
    assert judge.half_written(folder) == []


def test_one_bit_that_differs_is_found(tmp_path):
    here, there = outputs(tmp_path / "here"), outputs(tmp_path / "there")
    Image.open(there / "0.png").save(here / "0.png")
    assert judge.differences(here, there, frozenset()) == []
    save_file({"weight": torch.tensor([1, 1, 1 + 2**-23])}, here / "model.safetensors")
    (here / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (here / "more.png").write_bytes((here / "0.png").read_bytes())
    (here / "config.json").unlink()
    faults = judge.differences(here, there, frozenset())
    assert [name in fault for name, fault in zip(("config", "more", "log", "model"), faults, strict=True)] == [True] * 4


def test_keys_that_always_differ_are_left_out(tmp_path):
    logs = []
    for name, seconds in (("one", 1.5), ("two", 1.75), ("three", 2.5)):
        logs.append(outputs(tmp_path / name))
        (logs[-1] / "0.png").unlink()
        (logs[-1] / "log.jsonl").write_text(json.dumps({"step": 1, "took": seconds}) + "\n")
    varying = judge.varying_in(*logs[:2])
    assert varying == {"log.jsonl:took"}
    assert judge.differences(logs[2], logs[0], varying) == []


@pytest.mark.parametrize(
    ("stderr", "code", "faults"),
    [
        ("sparserefine train: no", 1, 0),
        ("bar 1\rbar 2\nsparserefine train: no", 1, 0),
        ("data/images/0.png: no\ndata/images/1.png: no", 1, 0),
        ("", 0, 0),
        ("", 1, 1),
        ("sparserefine train: no\nsparserefine train: more", 1, 1),
        ("Traceback (most recent call last):\n  x\nKeyError: 1", 1, 1),
        ("Traceback (most recent call last):\n  x\nKeyError: 1", 0, 1),
    ],
)
def test_a_failure_is_one_line(stderr, code, faults):
    assert len(judge.fault_of_message(stderr, code)) == faults


def raises(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_how_children_end(tmp_path):
    assert children.run(lambda: 3, tmp_path).code == 3
    failed = children.run(raises(KeyError("x")), tmp_path)
    assert failed.code == 1
    assert "KeyError: 'x'" in failed.stderr
    assert children.run(raises(SystemExit(2)), tmp_path).code == 2
    assert children.run(lambda: os.kill(os.getpid(), signal.SIGKILL) or 0, tmp_path).signal == signal.SIGKILL
    assert Child(lambda: time.sleep(60) or 0, tmp_path).wait(at=(0.05, signal.SIGTERM)).signal == signal.SIGTERM
    assert children.run(lambda: time.sleep(60) or 0, tmp_path, 0.1).timed_out
    assert children.run(lambda: print(Path.cwd()) or 0, tmp_path).stdout.strip() == str(tmp_path)
    assert children.result_of(lambda: {"a": 1}, tmp_path) == {"a": 1}


def examined(function: Callable[[Path], object], path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(fuzz, "HANG_S", 0.3)
    outcome = children.run(lambda: fuzz._call(function, path), path.parent, fuzz.HANG_S)
    return fuzz._fault(outcome, path, Reader("bad.png", (), ()), command=False)


def fails(error: Exception) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        raise type(error)(*(str(arg).replace("FILE", str(path)) for arg in error.args))

    return read


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda path: 1, ""),
        (fails(ValueError("FILE: no image")), ""),
        (fails(FileNotFoundError("FILE: not there")), ""),
        (fails(ValueError("no image")), "does not name bad.png"),
        (fails(ValueError("FILE: no image\nreally")), "2 lines"),
        (fails(KeyError("FILE")), "undocumented exception: KeyError"),
        (fails(RuntimeError("FILE")), "undocumented exception: RuntimeError"),
        (fails(MemoryError()), "undocumented exception: MemoryError"),
        (lambda path: bytes(3 << 30), "undocumented exception: MemoryError"),
        (lambda path: time.sleep(60), "hangs"),
        (lambda path: os.kill(os.getpid(), signal.SIGSYS), "crash: signal SIGSYS"),
        (lambda path: print("this must not run"), "ran code"),
    ],
)
def test_bad_readers_are_found(function, fault, tmp_path, monkeypatch):
    found = examined(function, tmp_path / "bad.png", monkeypatch)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def test_what_commands_say_is_judged():
    def fault(stderr: str, code: int = 1) -> str:
        outcome = Outcome(code, "", stderr, 0.1, 0.0, timed_out=False)
        return fuzz._fault(outcome, Path("bad.png"), Reader("bad.png", (), ()), command=True)

    assert fault("sparserefine predict: bad.png: no") == fault("bar\rbad.png: no") == ""
    assert fault("sparserefine logits: Parser key bad.png\n  Expected int\n`sparserefine logits --help` lists", 2) == ""
    assert "control characters" in fault("sparserefine predict: bad.png: \x1b[31m")
    assert "unforeseen" in fault("sparserefine predict: KeyError: bad.png\nthis may be a defect: report it")
    assert "without a line of ours" in fault("")
    assert "exit 3" in fault("sparserefine predict: bad.png", 3)


BROKEN = """
from contextlib import contextmanager
from pathlib import Path
import sparserefine.files.whole as whole

@contextmanager
def written_in_place(path, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    yield Path(path)

whole.written_whole = written_in_place
from chaos import kills
raise SystemExit(kills.main(["--only", "predict/cut/600", "--workers", "1"]))
"""


@pytest.mark.slow
def test_a_writer_in_place_is_found(tmp_path):
    """With a writer that does not write beside the target, a kill leaves half an image."""
    paths = [str(TESTS), str(Path(sparserefine.__file__).parents[1])]
    environment = {**os.environ, **dict.fromkeys(children.ONE_THREAD, "1"), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "FAILED predict/cut/600: half written: 0_overlay.png" in done.stdout, done.stdout
