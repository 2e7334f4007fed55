"""The records of a run: strict JSON, one row a step, whatever was killed before."""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparserefine.files.images import read_image
from sparserefine.training.record import RunRecord


@pytest.fixture(autouse=True)
def _without_tensorboard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run the same with and without the package, but for those of TensorBoard itself."""
    if "board" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def lines(out: Path) -> list[dict[str, Any]]:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (out / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refused) for line in text.splitlines()]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "pictures").iterdir())


PIXELS = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)


def test_a_row_is_on_the_disk_at_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    for step, loss in ((10, 0.5), (20, 0.25)):
        record.scores(step, {"loss": loss, "val_refined": 1})
        assert lines(tmp_path / "run")[-1] == {"step": step, "loss": loss, "val_refined": 1}
        assert table(tmp_path / "run")[-1] == {"step": str(step), "loss": str(loss), "val_refined": "1"}
    assert len(lines(tmp_path / "run")) == len(table(tmp_path / "run")) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_null(value: float | None, tmp_path: Path) -> None:
    RunRecord(tmp_path).scores(1, {"loss": value, "val_density": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "val_density": 0.5}]
    assert table(tmp_path) == [{"step": "1", "loss": "", "val_density": "0.5"}]


def test_new_columns_join_the_table(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.scores(1, {"loss": 1})
    record.scores(2, {"loss": 2, "speed": 3})
    record.scores(3, {"speed": 4})
    assert table(tmp_path) == [
        {"step": "1", "loss": "1", "speed": ""},
        {"step": "2", "loss": "2", "speed": "3"},
        {"step": "3", "loss": "", "speed": "4"},
    ]


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    killed = RunRecord(tmp_path)
    for step in (10, 20, 30):
        killed.scores(step, {"loss": step})
        killed.picture(step, "a", PIXELS)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    resumed = RunRecord(tmp_path, resumed_at=20)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]
    assert pictures(tmp_path) == ["a_step0000010.png", "a_step0000020.png"]
    resumed.scores(30, {"loss": 3})
    assert lines(tmp_path) == [{"step": 10, "loss": 10}, {"step": 20, "loss": 20}, {"step": 30, "loss": 3}]
    assert [row["step"] for row in table(tmp_path)] == ["10", "20", "30"]


def test_a_step_that_is_scored_again_replaces_its_row(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for step, loss in ((10, 1), (20, 2), (20, 3), (10, 4)):
        record.scores(step, {"loss": loss})
    assert lines(tmp_path) == [{"step": 10, "loss": 4}]
    assert table(tmp_path) == [{"step": "10", "loss": "4"}]


def test_a_log_with_nan_and_repeated_steps_is_mended(tmp_path: Path) -> None:
    """As runs of version 0.1 could leave it."""
    (tmp_path / "log.jsonl").write_text(
        '{"step": 10, "loss": NaN}\n{"step": 20, "loss": 1}\n{"step": 20, "loss": 2}\n[]\n\n'
    )
    RunRecord(tmp_path, resumed_at=20)
    assert lines(tmp_path) == [{"step": 10, "loss": None}, {"step": 20, "loss": 2}]


def test_a_new_run_removes_the_records_of_a_former_one_and_nothing_else(tmp_path: Path) -> None:
    former = RunRecord(tmp_path)
    former.scores(10, {"loss": 1})
    former.picture(10, "a", PIXELS)
    mine = tmp_path / "pictures" / "holiday_2024.png"
    mine.write_bytes(b"mine")
    RunRecord(tmp_path).scores(5, {"loss": 2})
    assert lines(tmp_path) == [{"step": 5, "loss": 2}]
    assert table(tmp_path) == [{"step": "5", "loss": "2"}]
    assert pictures(tmp_path) == [mine.name]


@pytest.mark.parametrize("name", ["a", "city/a.left", "../../a", "é\n\x1b[31m", ".hidden", "x" * 300, "", "/etc/a"])
def test_a_picture_of_any_name_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    record.picture(7, name, PIXELS)
    (path,) = (tmp_path / "run" / "pictures").iterdir()
    assert torch.equal(read_image(path), PIXELS)
    assert path.name.isascii()
    assert path.name.isprintable()
    assert not path.name.startswith(".")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_pictures_of_other_names_are_other_files(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    names = ("a_b", "a/b", "a b", "x" * 300, "x" * 301)
    for name in names:
        record.picture(7, name, PIXELS)
    assert len(pictures(tmp_path)) == len(names)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"log\.jsonl: cannot be written \(No space left.*\); free space, then --resume"):
        record.scores(1, {"loss": 1})


def test_without_tensorboard_it_is_said_once_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparserefine"):
        record = RunRecord(tmp_path)
        record.scores(1, {"loss": 1})
        record.picture(1, "a", PIXELS)
        record.close()
    assert [entry.levelname for entry in caplog.records if "tensorboard" in entry.message] == ["INFO"]
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture
def board() -> Any:
    """Reads what TensorBoard shows: by tag, the steps and values of scalars, and the steps of images."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )

    def shown(out: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[int]]]:
        events = accumulator.EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return scalars, {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}

    return shown


def test_tensorboard_shows_the_rows_and_pictures(board: Any, tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.scores(10, {"loss": 0.5, "val_refined": None, "val_coarse": math.nan})
    record.picture(10, "city/a", PIXELS)
    record.close()
    assert board(tmp_path) == ({"loss": [(10, 0.5)]}, {"city/a": [10]})


def test_tensorboard_of_a_resumed_run_repeats_no_step(board: Any, tmp_path: Path) -> None:
    killed = RunRecord(tmp_path)
    for step in (10, 20, 30):
        killed.scores(step, {"loss": step})
    resumed = RunRecord(tmp_path, resumed_at=20)
    resumed.scores(30, {"loss": 3})
    resumed.close()
    assert board(tmp_path)[0] == {"loss": [(10, 10), (20, 20), (30, 3)]}


def test_tensorboard_of_a_new_run_forgets_the_former_one(board: Any, tmp_path: Path) -> None:
    former = RunRecord(tmp_path)
    former.scores(10, {"loss": 1})
    former.close()
    record = RunRecord(tmp_path)
    record.scores(5, {"loss": 2})
    record.close()
    assert board(tmp_path)[0] == {"loss": [(5, 2)]}


def test_a_full_disk_under_tensorboard_names_its_folder_and_nothing_else_is_said(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record = RunRecord(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match=r"tensorboard: cannot be written \(No space.*--resume") as caught:  # noqa: PT012
        for step in range(3):  # in a thread of its own: one call later at most
            record.scores(step, {"loss": 1.0})
            time.sleep(0.2)
    assert caught.value.errno == errno.ENOSPC
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("failing", [True, False])
def test_an_error_of_a_run_is_not_replaced_by_one_of_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: bool
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "board: no space")

    monkeypatch.setattr(RunRecord, "close", full)
    with pytest.raises(RuntimeError if failing else OSError), RunRecord(tmp_path):  # noqa: PT012
        if failing:
            raise RuntimeError("diverged")
    assert ("board: no space" in caplog.text) == failing


def test_tensorboard_leaves_no_hook_behind(board: Any, tmp_path: Path) -> None:
    before = threading.excepthook
    with RunRecord(tmp_path):
        assert threading.excepthook != before
    assert threading.excepthook == before
