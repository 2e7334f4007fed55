"""Dataclasses from JSON: values are checked against the type hints of the fields."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "null"}


def from_json(cls: type[T], values: Any, where: str, key: str = "", *, optional: Collection[str] = ()) -> T:
    """Builds a dataclass, and the dataclasses inside it, from the values of a JSON file.

    Args:
        cls: its fields may be truth values, numbers, texts, ``Literal``, tuples, dataclasses, and unions of these.
        values: an object with a key for each field; lists become tuples.
        where: the file, for messages.
        key: dotted name of the object in that file; empty: the file's own object.
        optional: names of fields that may be missing, also of the dataclasses inside.

    Raises:
        ValueError: a key is missing or unknown, a value has another type than the field, or the dataclass refuses it.
            The message names the file and the key.
    """
    place = f"{where}: {key}" if key else where
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} = {shown(values)}, expected an object")
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{place}: unknown key {shown(unknown[0])}, expected {', '.join(known)}")
    missing = [name for name in known if name not in values and name not in optional]
    if missing:
        raise ValueError(f"{place}: key {missing[0]!r} is missing")
    types = get_type_hints(cls)
    prefix = f"{key}." if key else ""
    parsed = {name: _value(types[name], value, where, prefix + name, optional) for name, value in values.items()}
    try:
        return cls(**parsed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def shown(value: Any) -> str:
    """A value for a message: on one line, shortened if it is long."""
    return reprlib.repr(value)


def _value(hint: Any, value: Any, where: str, key: str, optional: Collection[str]) -> Any:
    """The value as its type hint wants it."""
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if len(choices) == 1 and is_dataclass(hint):
        return from_json(hint, value, where, key, optional=optional)  # type: ignore[arg-type]
    kinds = [choice for choice in choices if _is_kind(choice, value)]
    # Of several kinds of lists, the one with such items.
    fitting = next((kind for kind in kinds if len(kinds) == 1 or _fits(kind, value)), kinds[0] if kinds else None)
    if fitting is None:
        raise ValueError(f"{where}: {key} = {shown(value)}, expected {' or '.join(dict.fromkeys(map(_name, choices)))}")
    if is_dataclass(fitting):
        return from_json(fitting, value, where, key, optional=optional)  # type: ignore[arg-type]
    if get_origin(fitting) is not tuple:
        return value
    items = get_args(fitting)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where}: {key} = {shown(value)}, expected a list of {len(items)}")
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_value(item, one, where, f"{key}[{i}]", optional) for i, (item, one) in pairs)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value fits a hint, with what is inside a list."""
    if not _is_kind(hint, value) or get_origin(hint) is not tuple:
        return _is_kind(hint, value)
    items = get_args(hint)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    return len(items) == len(value) and all(_fits(item, one) for item, one in zip(items, value, strict=True))


def _is_kind(hint: Any, value: Any) -> bool:
    """Whether a value fits a hint, without what is inside a list."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list)
    if is_dataclass(hint):
        return isinstance(value, Mapping)
    if hint is float:  # false for NaN, infinity, and whole numbers that no float holds
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if is_dataclass(hint):
        return "an object"
    return "a list" if get_origin(hint) is tuple else _PLAIN[hint]
