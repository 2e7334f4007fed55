"""What a path is, before it is opened."""

from __future__ import annotations

import os
import socket

import pytest

from sparserefine.files.regular import regular_file


def test_a_file_and_a_link_to_one_pass(tmp_path):
    file, link = tmp_path / "a", tmp_path / "b"
    file.write_text("x")
    link.symlink_to(file)
    assert (regular_file(file), regular_file(str(link))) == (file, link)


def test_everything_else_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        short = os.path.relpath(tmp_path / "s")  # the name of a socket may have 108 bytes
        listening.bind(short if len(short) < 100 else "\0sparserefine-test")
        for path, kind in ((tmp_path, "a folder"), (tmp_path / "fifo", "FIFO"), ("/dev/zero", "character device")):
            with pytest.raises(ValueError, match=f"is .*{kind}.*, expected a label image"):
                regular_file(path, "a label image")
        if (tmp_path / "s").exists():
            with pytest.raises(ValueError, match="is a socket"):
                regular_file(tmp_path / "s")


@pytest.mark.parametrize("path", ["", "."])
def test_an_empty_path_is_no_file(path):
    with pytest.raises(FileNotFoundError, match="the path is empty"):
        regular_file(path)


def test_missing_and_forbidden_files_are_told_apart(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="a: no such file"):
        regular_file(tmp_path / "a")
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="a: may not be read"):
        regular_file(tmp_path / "a")
