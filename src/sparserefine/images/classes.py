"""The classes of a task: names, colours, and ignored labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparserefine.files.lines import read_lines

IGNORE = 255
"""Label of ignored pixels. They count neither in losses nor in scores."""
_MAX_BYTES = 1_000_000
"""Of a classes file."""
_MAX_LINE = 200
"""Characters of a line in it: a name and a colour."""


@dataclass(frozen=True)
class Classes:
    """Names and colours of the K classes, and further label values to ignore besides 255.

    Attributes:
        names: a name for each.
        palette: a colour for each.
        ignore: values that are ignored.
        guessed: classes whose colour nobody gave: no label is read by it.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore: tuple[int, ...] = ()
    guessed: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(
                f"{len(self.names)} class names, {len(self.palette)} colours; expected one colour per class"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def numbered(cls, count: int) -> Classes:
        """Classes named "class 0", "class 1", ..., with colours of :func:`wheel`.

        >>> Classes.numbered(2).names
        ('class 0', 'class 1')
        """
        names, palette = tuple(f"class {k}" for k in range(count)), tuple(wheel(k) for k in range(count))
        return cls(names, palette, guessed=tuple(range(count)))


def read_classes(path: Path, ignore: Sequence[int] = ()) -> Classes:
    """Reads ``classes.txt``: one class per line, ``name R G B`` or ``name``, which gets a colour of :func:`wheel`.

    Raises:
        ValueError: there is no such file, it is no text of that form, or it has fewer than two classes.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder, expected one with {path.name}; check data.root")
    if not path.exists():
        raise ValueError(f"{path}: no classes file; write one class per line, such as 'road' or 'road 128 64 128'")
    names: list[str] = []
    palette: list[tuple[int, int, int]] = []
    guessed: list[int] = []
    for line in read_lines(path, "a list of classes", max_bytes=_MAX_BYTES):
        short = len(line) <= _MAX_LINE  # a long line of blanks takes the pattern minutes
        match = re.fullmatch(r"([^\t]+?)(?:\s+(\d+)\s+(\d+)\s+(\d+))?", line) if short else None
        if match is None:
            raise ValueError(
                f"{path}: the line {line[:60]!r} ({len(line)} characters) is no class; "
                f"expected a name or 'name R G B', of at most {_MAX_LINE} characters and without tabs in the name"
            )
        r, g, b = (int(c) for c in match.groups()[1:]) if match[2] else wheel(len(names))
        if max(r, g, b) > 255:
            raise ValueError(f"{path}: colour {r} {g} {b} of class {match[1]!r} is outside 0..255")
        if match[2] is None:
            guessed.append(len(names))
        names.append(match[1])
        palette.append((r, g, b))
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} classes, expected at least 2")
    return Classes(tuple(names), tuple(palette), tuple(ignore), tuple(guessed))


def wheel(index: int) -> tuple[int, int, int]:
    """Colour of class ``index``, as in PASCAL VOC: the bits of the index are spread over the three channels.

    >>> wheel(0), wheel(1), wheel(2)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= ((index >> bit) & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


CITYSCAPES = Classes(
    (
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
        *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    ),
    (
        *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)),
        *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)),
        *((255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ),
)
"""The 19 classes of Cityscapes (Cordts et al. 2016) that are scored, in the order of their training ids."""
