"""The fingerprint of a file's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sparserefine.files.regular import regular_file

_BLOCK = 1 << 20


def sha256_of(path: str | Path, expected: str = "a file") -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is read in blocks. Errors as in :func:`regular_file`."""
    digest = hashlib.sha256()
    with regular_file(path, expected).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
