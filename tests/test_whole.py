"""Files, folders and locks that survive kills, full disks and other runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from sparserefine.files import whole
from sparserefine.files.lock import NAME, Holder, LockedError, locked
from sparserefine.files.text import printable
from sparserefine.files.whole import NEXT, folder_written_whole, sweep, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written_whole(path) as temporary:
        assert temporary.parent == path.parent  # a rename inside one file system
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


def write_from(path: Path, source: Path) -> None:
    with written_whole(path) as temporary:
        temporary.write_text("half")
        temporary.write_text(source.read_text())


def fail_to_write(path: Path, error: OSError) -> None:
    with written_whole(path):
        raise error


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError, match="missing"):
        write_from(path, tmp_path / "missing")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_former_file_can_be_kept(tmp_path):
    for text in ("1", "2", "3"):
        with written_whole(tmp_path / "a", keep=tmp_path / "before") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "a").read_text() == "3"
    assert (tmp_path / "before").read_text() == "2"


def test_the_longest_name_of_a_file_system_works(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    with written_whole(path) as temporary:
        temporary.write_text("1")
    assert path.read_text() == "1"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_names_the_final_file_and_the_cure(tmp_path, number):
    with pytest.raises(OSError, match=r"a\.txt: cannot be written \(.*\); free space") as caught:
        fail_to_write(tmp_path / "a.txt", OSError(number, os.strerror(number)))
    assert caught.value.errno == number
    assert ".tmp" not in str(caught.value)
    assert names(tmp_path) == []


def test_errors_about_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="other") as caught:
        write_from(tmp_path / "a.txt", tmp_path / "other")
    assert "cannot be written" not in str(caught.value)


def write_pair(folder: Path, text: str) -> None:
    with folder_written_whole(folder, "last") as staged:
        for name in ("first", "second", "last"):
            (staged / name).write_text(text)


def read_pair(folder: Path) -> set[str]:
    """What a reader finds, as the docstring of ``folder_written_whole`` describes."""
    staged = folder / NEXT
    found = [staged / name if (staged / name).exists() else folder / name for name in ("first", "second", "last")]
    return {path.read_text() for path in found}


def test_a_folder_is_replaced_as_one_and_other_files_stay(tmp_path):
    write_pair(tmp_path, "1")
    (tmp_path / "README.md").write_text("mine")
    write_pair(tmp_path, "2")
    assert read_pair(tmp_path) == {"2"}
    assert names(tmp_path) == ["README.md", "first", "last", "second"]


def test_a_reader_never_sees_a_mixture_whichever_rename_was_the_last(tmp_path, monkeypatch):
    renames = Path.replace
    for allowed in range(6):
        folder = tmp_path / str(allowed)
        write_pair(folder, "old")
        left = [allowed]

        def replace(path, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return renames(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        done = True
        try:
            write_pair(folder, "new")
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(Path, "replace", renames)
        assert done == (allowed >= 4), "four renames: the folder and three files"
        assert read_pair(folder) == ({"new"} if allowed else {"old"})
        write_pair(folder, "newer")  # finishes what was interrupted
        assert read_pair(folder) == {"newer"}
        assert names(folder) == ["first", "last", "second"]


def test_leftovers_of_ended_processes_are_swept_and_those_of_running_ones_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = whole._host()
    left = tmp_path / f".sparserefine-{host}-{ended.pid}-00000000.tmp"
    folder = tmp_path / f".sparserefine-{host}-{ended.pid}-00000001.tmp"
    mine = tmp_path / f".sparserefine-{host}-{os.getpid()}-00000002.tmp"
    elsewhere = tmp_path / f".sparserefine-{'0' * 8}-{ended.pid}-00000003.tmp"
    old = tmp_path / f".sparserefine-{'0' * 8}-{ended.pid}-00000004.tmp"
    other = tmp_path / ".sparserefine-notes.txt"
    for path in (left, mine, elsewhere, old, other):
        path.write_text("x")
    folder.mkdir()
    (folder / "a").write_text("x")
    os.utime(old, (0, 0))
    sweep(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in (mine, elsewhere, other))


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    with locked(tmp_path / "out", "train"):
        holder = rf"train \(process {os.getpid()} on .*, started .*\) writes there"
        with pytest.raises(LockedError, match=holder), locked(tmp_path / "out", "predict"):
            pass
        assert (tmp_path / "out" / NAME).exists()
    assert names(tmp_path) == []  # the folder was made for the lock


@pytest.mark.parametrize("change", ["ended", "other process of that number", "cut short"])
def test_a_stale_lock_is_taken_over(tmp_path, change):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = Holder.this_process("train")
    if change == "ended":
        holder = replace(holder, process=ended.pid)
    elif change == "other process of that number":
        holder = replace(holder, birth=holder.birth + "1")
    text = json.dumps(asdict(holder))
    path = tmp_path / NAME
    path.write_text(text[:20] if change == "cut short" else text)
    os.utime(path, (0, 0))
    with locked(tmp_path, "predict"):
        assert json.loads(path.read_text())["what"] == "predict"
    assert names(tmp_path) == []


def test_a_lock_of_another_machine_is_respected_with_the_cure(tmp_path):
    path = tmp_path / NAME
    elsewhere = replace(Holder.this_process("train"), host="elsewhere", machine="elsewhere", process=1)
    path.write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(LockedError, match=f"on elsewhere.*delete {path}"), locked(tmp_path, "train"):
        pass
    assert path.exists()


def test_printable_escapes_what_changes_a_terminal_or_fakes_a_line():
    assert printable("é 日本 \u202f.png") == "é 日本 \u202f.png"
    assert printable("a\x1b[2J\nb\r\u202e\udc80\x9b\u2028") == r"a\x1b[2J\nb\r\u202e\udc80\x9b\u2028"


def test_a_lock_that_cannot_be_written_is_explained_and_not_left(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space.*free space"), locked(tmp_path, "train"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["FIFO", "folder", "device", "link to nothing"])
def test_what_is_no_lock_is_named(tmp_path, place):
    path = tmp_path / NAME
    match place:
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to("nothing")
    with pytest.raises(ValueError, match="is no lock of a run; delete it"), locked(tmp_path, "train"):
        pass


@pytest.mark.parametrize(
    "text",
    [
        *("", "[" * 5000, '{"host": 1}', "\0" * 100),
        *(f'{{"host": "h", "process": {n}, "started": {s}, "what": "x"}}' for n, s in (("1e999", 1), (1, "1e30"))),
        json.dumps({"host": Holder.this_process("").host, "process": -1, "started": 1, "what": "x"}),
        json.dumps({"host": Holder.this_process("").host, "process": 10**30, "started": 1, "what": "x"}),
    ],
)
def test_an_old_lock_of_nonsense_is_taken_over(tmp_path, text):
    path = tmp_path / NAME
    path.write_text(text)
    os.utime(path, (0, 0))
    with locked(tmp_path, "train"):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert names(tmp_path) == []


def test_a_lock_is_whole_from_its_first_moment_on(tmp_path, monkeypatch):
    seen = []

    def look(source: Path, target: Path) -> None:
        seen.append(json.loads(Path(source).read_text()))
        assert not Path(target).exists()
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", look)
    with locked(tmp_path, "train"):
        assert names(tmp_path) == [NAME]
    assert [holder["what"] for holder in seen] == ["train"]


def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    with locked(tmp_path, "train"), pytest.raises(LockedError), locked(tmp_path, "predict"):
        pass
    assert names(tmp_path) == []


def test_the_output_folder_must_not_be_a_file(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="a: is a file, expected a folder"), locked(tmp_path / "a", "train"):
        pass
    assert (tmp_path / "a").read_text() == "mine"


RACE = """
import sys, time
from sparserefine.files.lock import LockedError, locked
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with locked(sys.argv[1], "train"):
        time.sleep(1)
except LockedError:
    sys.exit(3)
"""


def test_of_runs_that_find_a_stale_lock_at_once_one_takes_it(tmp_path):
    (tmp_path / NAME).write_text(json.dumps(asdict(replace(Holder.this_process("train"), birth="another"))))
    start = str(time.time() + 1.5)
    runs = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), start]) for _ in range(4)]
    assert sorted(run.wait() for run in runs) == [0, 3, 3, 3]
    assert names(tmp_path) == []


def test_setting_the_clock_ends_no_lock(tmp_path, monkeypatch):
    with locked(tmp_path, "train"):
        boot = psutil.boot_time()
        monkeypatch.setattr(psutil, "boot_time", lambda: boot + 100)
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 100)
        with pytest.raises(LockedError), locked(tmp_path, "predict"):
            pass


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOSYS, errno.ENOLCK])
def test_a_stale_lock_is_taken_over_where_files_cannot_be_locked(tmp_path, monkeypatch, number):
    """As on some network file systems."""

    def unlocked(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unlocked)
    (tmp_path / NAME).write_text(json.dumps(asdict(replace(Holder.this_process("train"), birth="another"))))
    with locked(tmp_path, "train"):
        pass
    assert names(tmp_path) == []


def test_without_hard_links_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def refused(*_: object) -> str:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    with locked(tmp_path, "train"):
        assert names(tmp_path) == [NAME]
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: refused() if self.suffix == ".tmp" else read(self, **how)
    )
    with pytest.raises(OSError, match="cannot be written"), locked(tmp_path, "train"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_lock_file_is_no_reason_to_wait(tmp_path, kind):
    os.mkfifo(tmp_path / NAME) if kind == "fifo" else (tmp_path / NAME).mkdir()
    with pytest.raises(ValueError, match="is no lock of a run; delete it"), locked(tmp_path, "train"):
        pass
