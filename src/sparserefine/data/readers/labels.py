"""LabelsConfig: what the pixels of label files mean. Decodes them to class numbers, exactly or not at all."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparserefine.files.labels import LabelPixels, read_label_pixels
from sparserefine.files.yaml import read_yaml
from sparserefine.images.classes import IGNORE, Classes, wheel
from sparserefine.machine.bounds import check_whole

UNKNOWN = IGNORE + 1
"""Of a pixel whose value means nothing."""
_MAX_TOLERANCE = 127
_COLOUR = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")

Entries = dict[int | str, int | str | None]
"""A map as people write it: a value, the name of a class, or a colour -> name or number of a class, or null."""


@dataclass(frozen=True)
class LabelsConfig:
    """What the pixels of label files mean.

    255 means "ignored", unless ``map`` or ``zero_is_void`` makes it a class.

    **Palettes.** With ``index`` the palette of a file is compared with the colours that the data set gives its classes.
    A file is an index image if, for all classes in it, both agree; if the palette rises from dark to light greys, or is
    that of PASCAL VOC, which many programs use for any classes; or if the classes have no colours of their own. Any
    other file is refused, because its indices may be an encoder's own numbers, and so is one whose few greys are
    colours of other classes: ``colour`` decodes it, and if its indices are right, the data set should give its classes
    the file's colours, or none. So nothing is guessed from a palette.

    Attributes:
        name: ``index``: pixel values are class numbers. ``colour``: the colour that a viewer shows is that of a class.
        map: what values mean that are not the classes' own numbers, inline or as a YAML file: ``value: class``, both
            names or numbers, ``null`` for ignored. For ``index`` all other values are then refused; for ``colour`` keys
            are colours ``"R G B"`` or ``"#rrggbb"``, beside those of the classes.
        zero_is_void: 0 means "ignored", and 1..K are the classes (``index`` only).
        black_white: labels are masks of 0 and 255, as image editors write them. 255 means class 1; no pixel is ignored
            (``index`` only).
        ignore: values to ignore, besides 255 (``index`` only).
        tolerance: largest difference of a colour from that of a class, in each channel (``colour`` only). 0: none.
    """

    name: Literal["index", "colour"] = "index"
    map: Entries | str | None = None
    zero_is_void: bool = False
    black_white: bool = False
    ignore: tuple[int, ...] = ()
    tolerance: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("index", "colour"):
            raise ValueError(f"data.labels.name = {self.name!r}, expected 'index' or 'colour'")
        check_whole("data.labels.tolerance", self.tolerance, 0, _MAX_TOLERANCE)
        for value in self.ignore:
            check_whole("data.labels.ignore", value, -(2**31), 2**32 - 1)
        if self.map is not None and not self.map:
            raise ValueError("data.labels.map is empty, expected entries 'value: class', or a YAML file with them")
        given = [name for name in ("map", "zero_is_void", "black_white") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"data.labels: {' and '.join(given)} are given, expected one of them; a map can say it all"
            )
        wrong = [name for name in ("zero_is_void", "black_white", "ignore") if getattr(self, name)]
        if self.name == "colour" and wrong:
            cure = "ignore a colour with data.labels.map: {'R G B': null}"
            raise ValueError(f"data.labels: {wrong[0]} is for name: index, and name is 'colour'; {cure}")
        if self.black_white and IGNORE in self.ignore:
            raise ValueError("data.labels: black_white makes 255 class 1, and ignore lists 255; leave one of them out")
        if self.name == "index" and self.tolerance:
            raise ValueError("data.labels.tolerance is for name: colour, and name is 'index'; leave it out")

    @property
    def means_255_by_default(self) -> bool:
        """Whether 255 is ignored, and nobody said so."""
        given = self.map is not None or self.zero_is_void or self.black_white or IGNORE in self.ignore
        return self.name == "index" and not given

    def also(self, ignore: tuple[int, ...], black_white: bool) -> LabelsConfig:
        """These settings with those of ``data.ignore`` and ``data.black_white``, which mean the same."""
        if ignore and self.ignore and set(ignore) != set(self.ignore):
            raise ValueError(
                f"data.ignore = {list(ignore)} and data.labels.ignore = {list(self.ignore)}: give only one of them"
            )
        return replace(self, ignore=self.ignore or ignore, black_white=self.black_white or black_white)


INDEX = LabelsConfig()
"""Pixel values are class numbers."""


@dataclass(frozen=True)
class LabelCode:
    """What pixels mean for given classes; see :class:`LabelsConfig`.

    Attributes:
        config: the settings.
        classes: names and colours.
        meaning: value -> class or 255; for colours the value is ``0xRRGGBB``.
    """

    config: LabelsConfig
    classes: Classes
    meaning: Mapping[int, int]

    @classmethod
    def of(cls, config: LabelsConfig, classes: Classes) -> LabelCode:
        """Works out what values mean.

        Raises:
            ValueError: the map is no such, names a class that there is not, or a colour cannot be told from another.
            OSError: the file of the map is missing or cannot be read.
        """
        count = len(classes)
        where = f"label map {config.map}" if isinstance(config.map, str) else "data.labels.map"
        entries = _entries(config.map, where)
        if config.name == "colour":
            return cls(config, classes, _colours(classes, entries, config.tolerance, where))
        if config.black_white and count != 2:
            raise ValueError(f"black and white masks of {count} classes, expected 2")
        meaning = {IGNORE: IGNORE}
        if entries:
            meaning |= {_value(key, classes, where): _class(value, classes, where) for key, value in entries.items()}
        elif config.zero_is_void:
            meaning |= {0: IGNORE} | {value: value - 1 for value in range(1, count + 1)}
        else:
            meaning |= {value: value for value in range(count)}
            if config.black_white:
                meaning[255] = 1
        meaning |= dict.fromkeys((*config.ignore, *classes.ignore), IGNORE)
        return cls(config, classes, meaning)

    def read(self, path: Path, turn: int | None = None) -> Tensor:
        """Reads a label file: ``uint8 [H, W]``, 255 where ignored.

        Args:
            path: the file.
            turn: as for :func:`sparserefine.files.labels.read_label_pixels`.

        Raises:
            ImageError: the file cannot be read.
            ValueError: a pixel means nothing, or the palette contradicts the indices.
        """
        pixels = read_label_pixels(path, turn)
        if self.config.name == "colour":
            values, found = self._by_colour(pixels, path)
        elif pixels.values is None:
            raise ValueError(
                f"{path}: a colour image, expected class numbers (1 channel, or 3 equal ones); data.labels.name: "
                "colour decodes it by the colours of the classes"
            )
        else:
            values, found = pixels.values, self._by_value(pixels.values)
            if pixels.palette:
                self._check_palette(pixels.shown, np.flatnonzero(np.bincount(values.ravel())), path)
        if (unknown := found == UNKNOWN).any():
            raise ValueError(f"{path}: {self._unknown(values, unknown)}")
        return torch.from_numpy(found.astype(np.uint8))

    @cached_property
    def _table(self) -> np.ndarray:
        """Classes by value, for all values of 16 bits or all colours: ``uint16 [2**16]`` or ``[2**24]``."""
        table = np.full(2**24 if self.config.name == "colour" else 2**16, UNKNOWN, np.uint16)
        inside = {value: found for value, found in self.meaning.items() if 0 <= value < len(table)}
        table[list(inside)] = list(inside.values())
        return table

    def _by_value(self, values: np.ndarray) -> np.ndarray:
        """Integers ``[H, W]`` -> classes ``uint16 [H, W]``."""
        if values.dtype in (np.uint8, np.uint16):
            return np.take(self._table, values)
        outside = (values < 0) | (values >= len(self._table))
        found: np.ndarray = self._table[np.where(outside, 0, values)]
        found[outside] = UNKNOWN
        for value, meant in self.meaning.items():
            if not 0 <= value < len(self._table):
                found[values == value] = meant
        return found

    def _by_colour(self, pixels: LabelPixels, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Colours ``0xRRGGBB`` and classes ``[H, W]``."""
        if pixels.colours is not None:
            packed = _packed(pixels.colours)
            return packed, self._near(packed, self._table[packed])
        values = pixels.values
        assert values is not None
        if int(values.min(initial=0)) < 0 or int(values.max(initial=0)) >= len(pixels.shown):
            raise ValueError(
                f"{path}: values {values.min()}..{values.max()} without a colour, expected colours of the classes; "
                "if they are class numbers, set data.labels.name: index"
            )
        packed = _packed(pixels.shown)
        return packed[values], self._near(packed, self._table[packed])[values]

    def _near(self, packed: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Classes of colours, those within the tolerance included."""
        if not self.config.tolerance or not (unknown := found == UNKNOWN).any():
            return found
        there = np.zeros(2**24, np.bool_)
        there[packed[unknown]] = True
        others = np.flatnonzero(there)
        table = self._table.copy()
        for colour, meant in self.meaning.items():
            far = np.abs(_channels(others) - _channels(np.array([colour]))).max(axis=1)
            table[others[far <= self.config.tolerance]] = meant
        return np.take(table, packed)

    def _check_palette(self, shown: np.ndarray, used: np.ndarray, path: Path) -> None:
        """Raises ``ValueError`` if a palette says something else than the indices; the rule is LabelsConfig's.

        Args:
            shown: the palette, ``uint8 [n, 3]``.
            used: the indices in the file.
            path: the file.
        """
        own = [colour for k, colour in enumerate(self.classes.palette) if k not in self.classes.guessed]
        odd = []
        for index in used.tolist():
            meant = self.meaning.get(index, IGNORE)
            if meant == IGNORE or meant in self.classes.guessed or index >= len(shown):
                continue
            colour = tuple(shown[index].tolist())
            if colour != self.classes.palette[meant]:
                odd.append((index, colour, meant))
        if not odd:
            return
        there = [tuple(of) for of in shown.tolist()]
        usual = there in ([(k, k, k) for k in range(len(shown))], [wheel(k) for k in range(len(shown))])
        greys = [there[index] for index in used.tolist() if index < len(shown)]
        rising = all(len(set(of)) == 1 for of in greys) and greys == sorted(set(greys))
        coded = next((one for one in odd if one[1] in own), None)
        # An encoder's own palette has the colours of the picture and no more.
        if (usual and len(shown) > len(used)) or (coded is None and (usual or rising)):
            return
        index, colour, meant = coded or odd[0]
        others = [name for name, of in zip(self.classes.names, self.classes.palette, strict=True) if of == colour]
        raise ValueError(
            f"{path}: the palette contradicts the indices: {index} has colour {_shown(colour)}"
            f"{f', that of {others[0]!r}' if others else ''}, expected {_shown(self.classes.palette[meant])} of "
            f"{self.classes.names[meant]!r}; set data.labels.name: colour to decode such files by their colours, or if "
            "the indices are right, give the classes these colours in the data set, or none"
        )

    def _unknown(self, values: np.ndarray, unknown: np.ndarray) -> str:
        """What to say of pixels that mean nothing."""
        row, column = divmod(int(unknown.argmax()), unknown.shape[1])
        first, strangers = values[row, column], values[unknown]
        same = int((strangers == first).sum())
        place = f"the first at row {row}, column {column}"
        if same < len(strangers):
            place += f" (and {len(strangers) - same} pixels with others)"
        if self.config.name == "colour":
            red, green, blue = _channels(np.array([first]))[0].tolist()
            hint = f"say what it is in data.labels.map, such as '{red} {green} {blue}': null for ignored"
            if red == green == blue and red < len(self.classes):
                hint += "; or if it is a class number, set data.labels.name: index"
            return (
                f"{same} pixels have colour {red} {green} {blue}, {place}; expected a colour of the classes; {hint}; "
                "data.labels.tolerance takes near colours for those of the classes"
            )
        count, highest = len(self.classes), int(strangers.max())
        expected = f"0..{count - 1}"
        if self.config.map is not None:
            expected = f"a value of data.labels.map ({reprlib.repr(sorted(self.meaning))})"
        elif self.config.zero_is_void:
            expected = f"0 (ignored), 1..{count}"
        text = f"{same} pixels have label {first}, expected {expected} or {IGNORE} (ignored), {place}; "
        if first < 0:
            return text + "if it means no class, add it to data.labels.ignore"
        if highest == int(strangers.min()) == count and self.config == replace(
            LabelsConfig(), ignore=self.config.ignore
        ):
            text += f"if the classes are 1..{count} and 0 is no class, set data.labels.zero_is_void; "
        return text + "add values to ignore to data.labels.ignore, or say in data.labels.map what values mean"


def _entries(given: Entries | str | None, where: str) -> Entries:
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
                    f"{where}: {entry[0]!r}: {entry[1]!r}, expected names or numbers, or null for ignored; put names "
                    "such as 'no' or 'on' in quotes"
                )
    return entries


def _class(given: int | str | None, classes: Classes, where: str) -> int:
    """The class that an entry names, or 255."""
    if given is None or given == IGNORE:
        return IGNORE
    if isinstance(given, str) and given in classes.names:
        return classes.names.index(given)
    number = _number(given)
    if number is None or not 0 <= number < len(classes):
        raise ValueError(
            f"{where}: {given!r} is no class, expected 0..{len(classes) - 1}, null for ignored, or one of "
            f"{', '.join(classes.names)}"
        )
    return number


def _value(given: int | str, classes: Classes, where: str) -> int:
    """The value of an index image that an entry is about."""
    if isinstance(given, str) and given in classes.names:
        return classes.names.index(given)
    number = _number(given)
    if number is None:
        raise ValueError(
            f"{where}: {given!r}, expected a value of the label files, or one of {', '.join(classes.names)}"
        )
    return number


def _number(given: int | str) -> int | None:
    return int(given) if isinstance(given, int) or re.fullmatch(r"-?\d{1,10}", given) else None


def _colours(classes: Classes, entries: Entries, tolerance: int, where: str) -> dict[int, int]:
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
                f"{_shown(classes.palette[k])}; expected a colour for each class"
            )
        meaning[colour] = k
    for key, value in entries.items():
        colour_of_key = of_class.get(key, _colour(key)) if isinstance(key, str) else None
        if colour_of_key is None:
            raise ValueError(f"{where}: {key!r}, expected a colour 'R G B' or '#rrggbb', or the name of a class")
        meaning[colour_of_key] = _class(value, classes, where)
    packed = sorted(meaning)
    channels = _channels(np.array(packed))
    for i in range(len(packed) if tolerance else 0):
        far = np.abs(channels[i + 1 :] - channels[i]).max(axis=1, initial=0)
        if (near := np.flatnonzero(far <= 2 * tolerance)).size:
            a, b = (channels[j].tolist() for j in (i, i + 1 + near[0]))
            raise ValueError(
                f"data.labels.tolerance = {tolerance}: the colours {_shown(a)} and {_shown(b)} are {far[near[0]]} "
                f"apart, so a colour can be near both; expected at most {(far[near[0]] - 1) // 2}"
            )
    return meaning


def _colour(text: str) -> int | None:
    """A colour as people write it -> ``0xRRGGBB``."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:], 16)
    match = _COLOUR.fullmatch(text.strip())
    channels = [int(channel) for channel in match.groups()] if match else [256]
    return (channels[0] << 16) + (channels[1] << 8) + channels[2] if max(channels) <= 255 else None


def _packed(colours: np.ndarray) -> np.ndarray:
    """``uint8 [..., 3]`` -> ``0xRRGGBB``, ``int32 [...]``."""
    packed = colours[..., 0].astype(np.int32)
    for channel in (1, 2):
        packed <<= 8
        packed |= colours[..., channel]
    return packed


def _channels(packed: np.ndarray) -> np.ndarray:
    """``0xRRGGBB``, ``[n]`` -> ``int [n, 3]``."""
    return np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], axis=1).astype(np.int64)


def _shown(colour: Any) -> str:
    return " ".join(map(str, colour))
