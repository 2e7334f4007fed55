"""Class maps: use a model whose classes differ from the data's, such as 19 Cityscapes classes for the 11 of CamVid.

A map is a YAML file with one line for each class of the model: its name or number, then the name or number of the
data's class that it counts as, or ``null`` if the data has no such class::

    road: road
    sidewalk: pavement
    truck: car
    terrain: null

The probability of a data class is the sum of the probabilities of its model classes, divided by the sum over all mapped
classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparserefine.files.yaml import read_yaml
from sparserefine.images.classes import Classes

NONE = -1
"""The entry of a class map for a class of the model that the data does not have."""


def read_class_map(path: str | Path, model: Classes | int | None, data: Classes | int | None) -> tuple[int, ...]:
    """Reads a class map: for each class of the model the class of the data, or -1.

    Args:
        path: the YAML file.
        model: names of the model's classes, or their count, or ``None`` if neither is known.
        data: the same for the data's classes.

    Raises:
        ValueError: the file is missing or is no class map; a class is unknown, missing or given twice; or a class of
            the data has no class of the model.
    """
    path = Path(path)
    try:
        entries = read_yaml(path, "a class map")
    except (OSError, ValueError) as error:
        raise ValueError(f"class map {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"class map {path}: expected a line 'class of the model: class of the data' for each class")
    count = len(entries) if model is None else _count(model)
    found: dict[int, int] = {}
    for key, value in entries.items():
        source = _index(key, model if model is not None else count, f"class map {path}: class {key!r} of the model")
        if source in found:
            raise ValueError(f"class map {path}: class {source} of the model ({key!r}) is given twice")
        found[source] = NONE if value is None else _index(value, data, f"class map {path}: class {value!r} of the data")
    missing = sorted(set(range(count)) - set(found))
    if missing:
        name = model.names[missing[0]] if isinstance(model, Classes) else missing[0]
        raise ValueError(
            f"class map {path}: {len(missing)} of {count} classes of the model have no line, the first is {name!r}; "
            f"write '{name}: null' for a class that the data does not have"
        )
    result = tuple(found[index] for index in range(count))
    check_class_map(result, data, f"class map {path}")
    return result


def check_class_map(class_map: tuple[int, ...], data: Classes | int | None, where: str) -> None:
    """Raises ``ValueError`` if a class of the data has no class of the model, or an entry is no class of the data."""
    count = max(class_map, default=NONE) + 1 if data is None else _count(data)
    outside = [index for index in class_map if not NONE <= index < count]
    if outside:
        raise ValueError(f"{where}: maps to class {outside[0]}, the data has 0..{count - 1} (-1: none)")
    unreached = sorted(set(range(count)) - set(class_map))
    if unreached:
        name = data.names[unreached[0]] if isinstance(data, Classes) else unreached[0]
        raise ValueError(
            f"{where}: no class of the model maps to class {name!r} of the data, which could then never be predicted; "
            "map the nearest one to it"
        )


def merged(outputs: Tensor, class_map: tuple[int, ...], kind: str) -> Tensor:
    """Outputs ``[B, K of the model, h, w]`` -> ``[B, K of the data, h, w]``: probabilities are summed.

    Logits of classes that count as one become ``log(sum(exp(.)))``, which sums their softmax; scores are summed.
    """
    parts = []
    for target in range(max(class_map) + 1):
        rows = [index for index, value in enumerate(class_map) if value == target]
        same = outputs[:, rows]
        parts.append(same.sum(1) if kind == "scores" else same.logsumexp(1))
    return torch.stack(parts, dim=1)


def _count(classes: Classes | int) -> int:
    return classes if isinstance(classes, int) else len(classes)


def _index(value: Any, classes: Classes | int | None, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if classes is None or 0 <= value < _count(classes):
            return value
        raise ValueError(f"{where}: expected 0..{_count(classes) - 1}")
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a name or a number; put names such as 'no' or 'on' in quotes")
    if not isinstance(classes, Classes):
        raise ValueError(f"{where}: its class names are not known; use numbers")
    if value not in classes.names:
        raise ValueError(f"{where}: unknown, expected one of {', '.join(classes.names)}")
    return classes.names.index(value)
