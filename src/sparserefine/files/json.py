"""Reads JSON files that hold one object, such as the configuration next to a model's weights.

Strictly: Python's own reader would take ``NaN``, keep the last of equal keys, and follow any depth.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from sparserefine.files.regular import regular_file

MAX_BYTES = 8 << 20
MAX_DEPTH = 100


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing, no regular file, larger than :data:`MAX_BYTES` or not readable as JSON; it
            holds something else than an object, a key twice, a number that is not finite or beyond 64 bits, or more
            than :data:`MAX_DEPTH` levels.
    """
    try:
        with regular_file(path, "a JSON file").open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, expected a JSON file")
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
            parse_int=_int64,
        )
        _check_depth(found)
    except RecursionError as error:
        raise ValueError(f"{path}: not readable as JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is given twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"integer {text[:20]}... is beyond 64 bits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner for x in level if isinstance(x, dict | list) for inner in (x.values() if isinstance(x, dict) else x)
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
