"""Class maps: a model of other classes than the data, 19 Cityscapes classes for 11 of CamVid, say.

A map is a YAML file with a line for each class of the model, by name or number, and the class of the data that it
counts as, by name or number, or ``null`` where the data has no such class::

    road: road
    sidewalk: pavement
    truck: car
    terrain: null

The probability of a data class is the sum of those of its model classes, over the sum of all that were mapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparserefine.images.classes import Classes

NONE = -1
"""Stands in a class map for a class of the model that the data does not have."""


def read_class_map(path: str | Path, model: Classes | int | None, data: Classes | int | None) -> tuple[int, ...]:
    """For each class of the model the class of the data, or -1.

    Args:
        path: the YAML file.
        model: names of the model's classes, or their count, or ``None`` where not even that is known.
        data: likewise of the data.

    Raises:
        ValueError: not such a file; a class that is unknown, missing or given twice; a data class that nothing maps to.
    """
    path = Path(path)
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"class map {path}: not readable as YAML ({error})") from error
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
    """Raises ``ValueError`` unless every class of the data has a class of the model, and no other is named."""
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

    Logits of classes that count as one become ``log(sum(exp(.)))``, which is what summing their softmax means; scores
    are summed.
    """
    parts = []
    for target in range(max(class_map) + 1):
        rows = [index for index, value in enumerate(class_map) if value == target]
        some = outputs[:, rows]
        parts.append(some.sum(1) if kind == "scores" else some.logsumexp(1))
    return torch.stack(parts, dim=1)


class _Loader(yaml.SafeLoader):
    """Keeps lines that are given twice, of which YAML's own mapping would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, or an error that names the second one of two equal keys."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


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
