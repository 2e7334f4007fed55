"""Writes results as JSON that every reader of JSON accepts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sparserefine.files.whole import written_whole


def write_results(path: str | Path, value: Any) -> None:
    """Writes a JSON file, completely or not at all. NaN and infinity, which JSON lacks, become ``null``.

    Args:
        path: the file; missing folders are made.
        value: dicts, lists, text and numbers.
    """
    with written_whole(path) as temporary:
        text = json.dumps(finite(value), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same dicts and lists, with ``None`` for numbers that are NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
