"""Says what a path is before it is opened as a file: opening a FIFO waits for ever, reading a device never ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sparserefine.files.text import first_line, printable

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
        ValueError: it is something else than a regular file, or the path is none.
        OSError: the path cannot be looked up.
    """
    path = Path(path)
    if path == Path():  # Path("") and Path(".") are the same
        raise FileNotFoundError(
            f"the path is empty or the current folder, expected {expected}; is a shell variable unset?"
        )
    shown = printable(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown}: no such file, expected {expected}") from None
    except OSError as error:
        raise type(error)(f"{shown}: cannot be looked up ({error.strerror}), expected {expected}") from error
    except ValueError as error:  # a NUL, or text that no file system can encode
        raise ValueError(f"{shown}: is no path ({first_line(error)}), expected {expected}") from error
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise ValueError(f"{shown}: is {kind}, expected {expected}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{shown}: may not be read by this user; change its permissions")
    return path


def given_path(path: str | Path, what: str) -> Path:
    """The path that a user gave, unless it is empty; ``Path("")`` is the current folder and would be taken for it.

    Args:
        path: as given. Only text can be told to be empty.
        what: name of the argument, for the message.

    Raises:
        ValueError: it is empty.
    """
    if str(path) == "":
        raise ValueError(f"{what}: an empty path; is a shell variable unset? Give . for the current folder")
    return Path(path)
