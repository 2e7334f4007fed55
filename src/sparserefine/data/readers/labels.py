"""LabelsConfig: what the pixels of label files mean. Decodes them to class numbers, exactly or not at all."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparserefine.data.readers.label_map import Entries, colours_of, entries_of, pack, shown, unpack, values_of
from sparserefine.files.labels import LabelPixels, read_label_pixels
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE, Classes, wheel
from sparserefine.machine.bounds import check_whole

UNKNOWN = IGNORE + 1
"""Of a pixel whose value means nothing."""
_MAX_TOLERANCE = 127


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
        entries = entries_of(config.map, where)
        if config.name == "colour":
            return cls(config, classes, colours_of(classes, entries, config.tolerance, where))
        if config.black_white and count != 2:
            raise ValueError(f"black and white masks of {count} classes, expected 2")
        meaning = {IGNORE: IGNORE}
        if entries:
            meaning |= values_of(classes, entries, where)
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
                f"{printable(path)}: a colour image, expected class numbers (1 channel, or 3 equal ones); "
                "data.labels.name: colour decodes it by the colours of the classes"
            )
        else:
            values, found = pixels.values, self._by_value(pixels.values)
            if pixels.palette:
                self._check_palette(pixels.shown, np.flatnonzero(np.bincount(values.ravel())), path)
        if (unknown := found == UNKNOWN).any():
            raise ValueError(f"{printable(path)}: {self._unknown(values, unknown)}")
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
            packed = pack(pixels.colours)
            return packed, self._near(packed, self._table[packed])
        values = pixels.values
        assert values is not None
        if int(values.min(initial=0)) < 0 or int(values.max(initial=0)) >= len(pixels.shown):
            raise ValueError(
                f"{printable(path)}: values {values.min()}..{values.max()} without a colour, expected colours of "
                "the classes; if they are class numbers, set data.labels.name: index"
            )
        packed = pack(pixels.shown)
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
            far = np.abs(unpack(others) - unpack(np.array([colour]))).max(axis=1)
            table[others[far <= self.config.tolerance]] = meant
        return np.take(table, packed)

    def _check_palette(self, palette: np.ndarray, used: np.ndarray, path: Path) -> None:
        """Raises ``ValueError`` if a palette says something else than the indices; the rule is LabelsConfig's.

        Args:
            palette: its colours, ``uint8 [n, 3]``.
            used: the indices in the file.
            path: the file.
        """
        if self.config.black_white:
            for index in used[used < len(palette)].tolist():
                meant, of = self.meaning.get(index), tuple(palette[index].tolist())
                if (meant, of) in ((0, (255, 255, 255)), (1, (0, 0, 0))):
                    raise ValueError(
                        f"{printable(path)}: the palette contradicts data.labels.black_white: {index} is shown as "
                        f"{'white' if meant == 0 else 'black'}, expected {'black' if meant == 0 else 'white'}; set "
                        "data.labels.name: colour, and write the colours into classes.txt"
                    )
        own = [colour for k, colour in enumerate(self.classes.palette) if k not in self.classes.guessed]
        odd = []
        for index in used.tolist():
            meant = self.meaning.get(index, IGNORE)
            if meant == IGNORE or meant in self.classes.guessed or index >= len(palette):
                continue
            colour = tuple(palette[index].tolist())
            if colour != self.classes.palette[meant]:
                odd.append((index, colour, meant))
        if not odd:
            return
        there = [tuple(of) for of in palette.tolist()]
        usual = there in ([(k, k, k) for k in range(len(palette))], [wheel(k) for k in range(len(palette))])
        greys = [there[index] for index in used.tolist() if index < len(palette)]
        rising = all(len(set(of)) == 1 for of in greys) and greys == sorted(set(greys))
        coded = next((one for one in odd if one[1] in own), None)
        # An encoder's own palette has the colours of the picture and no more.
        if (usual and len(palette) > len(used)) or (coded is None and (usual or rising)):
            return
        index, colour, meant = coded or odd[0]
        others = [name for name, of in zip(self.classes.names, self.classes.palette, strict=True) if of == colour]
        raise ValueError(
            f"{printable(path)}: the palette contradicts the indices: {index} has colour {shown(colour)}"
            f"{f', that of {others[0]!r}' if others else ''}, expected {shown(self.classes.palette[meant])} of "
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
            red, green, blue = unpack(np.array([first]))[0].tolist()
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
            known = [value for value, meant in self.meaning.items() if (value, meant) != (IGNORE, IGNORE)]
            expected = f"a value of data.labels.map ({reprlib.repr(sorted(known))})"
        elif self.config.zero_is_void:
            expected = f"0 (ignored), 1..{count}"
        elif self.config.black_white:
            expected = f"0 or {IGNORE}"
        if self.meaning.get(IGNORE) == IGNORE:
            expected += f" or {IGNORE} (ignored)"
        text = f"{same} pixels have label {first}, expected {expected}, {place}; "
        if self.config.black_white:
            soft = "{name: colour, tolerance: 127}"
            return (
                text
                + f"if edges are soft, set data.labels: {soft}, and write 'R G B' of black and white into classes.txt"
            )
        if first < 0:
            return text + "if it means no class, add it to data.labels.ignore"
        if highest == int(strangers.min()) == count and self.config == replace(
            LabelsConfig(), ignore=self.config.ignore
        ):
            text += f"if the classes are 1..{count} and 0 is no class, set data.labels.zero_is_void; "
        return text + "add values to ignore to data.labels.ignore, or say in data.labels.map what values mean"
