"""Any images and labels, wherever they are: a table of image, label and split."""

from __future__ import annotations

import csv
from pathlib import Path, PurePath
from reprlib import repr as short

from sparserefine.data.readers.dataset import Dataset, Sample, checked
from sparserefine.data.readers.labels import INDEX, LabelsConfig
from sparserefine.files.lines import read_lines
from sparserefine.files.regular import regular_file
from sparserefine.images.classes import read_classes

TABLE = "pairs.csv"
_COLUMNS = ("image", "label", "split")
_MAX_BYTES = 100_000_000
"""Of a table: some hundred thousand rows."""


def pairs_csv(root: str | Path, split: str = "", labels: LabelsConfig = INDEX) -> Dataset:
    """Reads a table with a row for each image, and ``classes.txt`` beside it.

    The first line names the columns: ``image,label,split``, in any order, divided by commas, semicolons or tabs; others
    are left out. ``image`` and ``label`` are paths, absolute or from the folder of the table; an empty label is none.

    Args:
        root: the table, or a folder with ``pairs.csv``.
        split: the rows to read, by their column ``split``; empty: all.
        labels: what the pixels of label files mean.

    Raises:
        ValueError: it is no such table, a path is no regular file, or two rows have one image.
        OSError: a file is missing or cannot be read.
    """
    path = Path(root) / TABLE if Path(root).is_dir() else Path(root)
    classes = read_classes(path.parent / "classes.txt", labels.ignore)
    lines = read_lines(path, "a table of image, label and split", max_bytes=_MAX_BYTES)
    divider = next((sign for sign in "\t;" if lines and sign in lines[0]), ",")
    try:
        names, *rows = list(csv.reader(lines, delimiter=divider, skipinitialspace=True)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path}: no table of {','.join(_COLUMNS)} ({error}); check quotes") from error
    header = [name.strip().lower() for name in names]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}, expected a first line {','.join(_COLUMNS)}")
    samples: dict[str, Sample] = {}
    for row in rows:
        if len(row) < len(header) or any(row[len(header) :]):
            raise ValueError(f"{path}: row {short(divider.join(row))} has {len(row)} columns, expected {len(header)}")
        image, label, of = (row[header.index(name)].strip() for name in _COLUMNS)
        if split and of != split:
            continue
        if not image.strip("./"):
            raise ValueError(f"{path}: row {short(divider.join(row))} names no image, expected its path")
        name = _name(image)
        if name in samples:
            raise ValueError(f"{path}: {samples[name].image} and {image} are two images called {name}; remove one")
        samples[name] = Sample(
            name,
            regular_file(path.parent / image, "an image"),
            regular_file(path.parent / label, "a label image") if label else None,
        )
    return checked(list(samples.values()), classes, path, split, labels)


def _name(image: str) -> str:
    """The path without suffix; it names files of results, so it leads nowhere but down."""
    path = PurePath(image)
    return "/".join(part for part in path.with_suffix("").parts if part not in (path.anchor, "..", "."))
