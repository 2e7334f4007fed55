"""Bounds of the numbers in configurations: a wrong one is named before anything of its size is allocated."""

from __future__ import annotations

import math


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Raises ``ValueError`` unless ``value`` is a whole number from ``low`` to ``high``; ``name`` is its field."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r}, expected a whole number from {low} to {high}")


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number from ``low`` to ``high``; ``name`` is its field."""
    if isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high:
        return
    most = "" if high == math.inf else f" and at most {high}"
    raise ValueError(f"{name} = {value!r}, expected a finite number, at least {low}{most}")


def check_positive(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number above 0; ``name`` is its field."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value!r}, expected a finite number, more than 0")
