"""Reads JSON files that hold one object, such as the configuration next to a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparserefine.files.regular import regular_file

_MOST_BYTES = 1 << 26
"""Of a file: 64 MiB."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not readable as JSON, or holds something else than an object.
    """
    try:
        size = regular_file(path, "a JSON file").stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size} bytes, expected at most {_MOST_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError also for numbers of very many digits
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, expected an object")
    return found
