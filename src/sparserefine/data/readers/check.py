"""Looks at the labels of a split before hours are spent on them: can they be meant as they are read?"""

from __future__ import annotations

import logging
from itertools import islice

import torch

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE

FILES = 100
"""How many label files are looked at, at most."""
_log = logging.getLogger(__name__)


def check_labels(data: Dataset, split: str) -> None:
    """Tells of labels that can only be a mistake.

    Label files are read until all classes have been seen, which usually takes a few, and :data:`FILES` at most.

    Args:
        data: a split; without labels, nothing is looked at.
        split: its name in messages: ``training split``.

    Raises:
        ValueError: a label file cannot be read, or of two classes the labels hold 0 and 255 alone, and nobody said what
            255 means.
    """
    counts, seen, found = torch.zeros(IGNORE + 1, dtype=torch.int64), 0, set(range(len(data.classes)))
    for index in islice((i for i, sample in enumerate(data.samples) if sample.label is not None), FILES):
        counts += torch.bincount(data.read_label(index).flatten(), minlength=IGNORE + 1)
        seen += 1
        found = {value for value in range(IGNORE) if counts[value]}
        if len(found) == len(data.classes):
            return
    if not seen:
        return
    where = f"{split}: in {'the label file' if seen == 1 else f'the first {seen} label files'}"
    if found == {0} and counts[IGNORE] and data.labels.means_255_by_default:
        text = (
            f"{where} all values are 0 or 255, and 255 means ignored, so there is only "
            f"{printable(data.classes.names[0])}; "
        )
        if len(data.classes) == 2:
            raise ValueError(
                f"{text}if they are masks of {printable(data.classes.names[1])}, set data.black_white: true; if 255 is "
                "meant to be ignored, say so: data.ignore: [255]"
            )
        _log.warning("%sif they are masks, give classes.txt two classes, and set data.black_white: true", text)
        return
    if not found:
        _log.warning("%s every pixel is ignored; check data.labels, and what the values in the files mean", where)
        return
    never = [printable(name) for k, name in enumerate(data.classes.names) if k not in found]
    shown = ", ".join(never[:10]) + (f" and {len(never) - 10} more" if len(never) > 10 else "")
    _log.warning("%s there is no pixel of %s; check data.labels, and the order of the classes", where, shown)
