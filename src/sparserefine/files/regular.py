"""Says what a path is before it is opened as a file: opening a FIFO waits for ever, reading a device never ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def regular_file(path: str | Path, expected: str = "a file") -> Path:
    """The path, if a regular file is there that this user may read; links are followed.

    Args:
        path: the file to read.
        expected: what the file should be, for messages: ``a label image``.

    Raises:
        FileNotFoundError: nothing is there, or the path is empty.
        PermissionError: the file may not be read.
        ValueError: it is something else than a regular file.
        OSError: the path cannot be looked up.
    """
    path = Path(path)
    if path == Path():
        raise FileNotFoundError(f"the path is empty, expected {expected}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected {expected}") from None
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise ValueError(f"{path}: is {kind}, expected {expected}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: may not be read by this user; change its permissions")
    return path
