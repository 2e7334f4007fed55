"""Reads small text files that people write: lists of names, classes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line, printable


def read_lines(path: str | Path, expected: str, *, max_bytes: int) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank, without blanks around them.

    A byte-order mark and line ends of any system are understood.

    Args:
        path: the file.
        expected: what the file should be, for messages: ``a list of images``.
        max_bytes: a longer file is refused.

    Raises:
        ValueError: the file is too long, no UTF-8, holds control characters, or is no regular file.
        OSError: it is missing, or may not be read.
    """
    path = regular_file(path, expected)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes, expected {expected} of at most {max_bytes}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is no text in UTF-8 ({first_line(error)}), expected {expected}; save it as UTF-8"
        ) from error
    lines = [line.strip() for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        if any(unicodedata.category(c) == "Cc" and c != "\t" for c in line):
            raise ValueError(f"{path}: line {number} holds control characters: {printable(line[:60])}; remove them")
    return [line for line in lines if line]
