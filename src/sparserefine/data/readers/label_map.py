"""Maps of label values and colours, as people write them: what each means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import numpy as np

from sparserefine.files.yaml import read_yaml
from sparserefine.images.classes import IGNORE, Classes

_COLOUR = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")
Entries = dict[int | str, int | str | None]
"""A map as people write it: a value, the name of a class, or a colour -> name or number of a class, or null."""


def entries_of(given: Entries | str | None, where: str) -> Entries:
    """The entries of a map, which may be in a file."""
    entries: Any = read_yaml(given, "a label map") if isinstance(given, str) else given
    if entries is None and given is None:
        return {}
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{where}: expected lines 'value: class'")
    for entry in entries.items():
        for side, kinds in zip(entry, (int | str, int | str | None), strict=True):
            if isinstance(side, bool) or not isinstance(side, kinds):
                raise ValueError(
                    f"{where}: {short(entry[0])}: {short(entry[1])}, expected names or numbers, or null for ignored; "
                    "put names such as 'no' or 'on' in quotes"
                )
    return entries


def _class_of(given: int | str | None, classes: Classes, where: str) -> int:
    """The class that an entry names, or 255."""
    if given is None or given == IGNORE:
        return IGNORE
    if isinstance(given, str) and given in classes.names:
        return classes.names.index(given)
    number = _number(given)
    if number is None or not 0 <= number < len(classes):
        raise ValueError(
            f"{where}: {short(given)} is no class, expected 0..{len(classes) - 1}, null for ignored, or one of "
            f"{', '.join(classes.names)}"
        )
    return number


def values_of(classes: Classes, entries: Entries, where: str) -> dict[int, int]:
    """The classes by value of an index image."""
    meaning: dict[int, int] = {}
    for key, value in entries.items():
        number = classes.names.index(key) if isinstance(key, str) and key in classes.names else _number(key)
        if number is None:
            names = ", ".join(classes.names)
            raise ValueError(f"{where}: {short(key)}, expected a value of the label files, or one of {names}")
        if number in meaning:
            raise ValueError(f"{where}: {short(key)} is value {number}, which is given twice")
        meaning[number] = _class_of(value, classes, where)
    return meaning


def _number(given: int | str) -> int | None:
    return int(given) if isinstance(given, int) or re.fullmatch(r"-?\d{1,10}", given) else None


def colours_of(classes: Classes, entries: Entries, tolerance: int, where: str) -> dict[int, int]:
    """The classes by colour ``0xRRGGBB``: their own colours, and those of a map."""
    colours = [(red << 16) + (green << 8) + blue for red, green, blue in classes.palette]
    of_class = dict(zip(classes.names, colours, strict=True))
    if classes.guessed:
        name = classes.names[classes.guessed[0]]
        raise ValueError(
            f"data.labels.name = 'colour': class {name!r} has no colour; write '{name} R G B' in classes.txt"
        )
    meaning: dict[int, int] = {}
    for k, colour in enumerate(colours):
        if colour in meaning:
            names = f"{classes.names[meaning[colour]]!r} and {classes.names[k]!r}"
            raise ValueError(
                f"data.labels.name = 'colour': {names} have one colour, "
                f"{shown(classes.palette[k])}; expected a colour for each class"
            )
        meaning[colour] = k
    given: set[int] = set()
    for key, value in entries.items():
        colour_of_key = of_class.get(key, _colour(key)) if isinstance(key, str) else None
        if colour_of_key is None:
            raise ValueError(f"{where}: {short(key)}, expected a colour 'R G B' or '#rrggbb', or the name of a class")
        if colour_of_key in given:
            raise ValueError(f"{where}: {short(key)} is a colour that is given twice")
        given.add(colour_of_key)
        meaning[colour_of_key] = _class_of(value, classes, where)
    if tolerance:
        _check_tolerance(tolerance, meaning)
    return meaning


def _check_tolerance(tolerance: int, meaning: dict[int, int]) -> None:
    """Raises ``ValueError`` if a colour can be near those of two classes."""
    colours, meant = np.array(sorted(meaning)), np.array([meaning[colour] for colour in sorted(meaning)])
    channels = unpack(colours)
    for i in range(len(colours)):
        far = np.abs(channels[i + 1 :] - channels[i]).max(axis=1)
        near = np.flatnonzero((far <= 2 * tolerance) & (meant[i + 1 :] != meant[i]))
        if near.size:
            a, b = (shown(channels[j].tolist()) for j in (i, i + 1 + near[0]))
            raise ValueError(
                f"data.labels.tolerance = {tolerance}: the colours {a} and {b} are {far[near[0]]} apart, so a colour "
                f"can be near both; expected at most {(far[near[0]] - 1) // 2}"
            )


def shown(colour: Sequence[int]) -> str:
    """``(1, 2, 3)`` -> ``1 2 3``."""
    return " ".join(map(str, colour))


def _colour(text: str) -> int | None:
    """A colour as people write it -> ``0xRRGGBB``."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:], 16)
    match = _COLOUR.fullmatch(text.strip())
    channels = [int(channel) for channel in match.groups()] if match else [256]
    return (channels[0] << 16) + (channels[1] << 8) + channels[2] if max(channels) <= 255 else None


def pack(colours: np.ndarray) -> np.ndarray:
    """``uint8 [..., 3]`` -> ``0xRRGGBB``, ``int32 [...]``."""
    packed = colours[..., 0].astype(np.int32)
    for channel in (1, 2):
        packed <<= 8
        packed |= colours[..., channel]
    return packed


def unpack(packed: np.ndarray) -> np.ndarray:
    """``0xRRGGBB``, ``[n]`` -> ``int [n, 3]``."""
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=1).astype(np.int64)
