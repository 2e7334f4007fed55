"""Spoils bytes, texts and values: what all formats have in common."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1)

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 255, 10**9, 10**30, -(10**30), 10**400, 1e-300, 1e308, float("nan"), float("inf")),
    *(
        float("-inf"),
        "",
        " ",
        "0",
        "nan",
        "none",
        "\x1b[31mred\n",
        "a\x00b",
        "\u202eabc",
        "\ud800",
        "x" * 100_000,
        "..",
        "~",
    ),
    *([], {}, [[]], [None], [1e9], [10**9, 10**9], [0, 0], [-1, -1], [1] * 1000, [float("nan")], {"a": 1}, [{}], ["x"]),
    *([1.5, "a", None], {"": ""}, {"name": None}, {"name": {"name": []}}),
    *("hf:", "onnx:", "unet:", "python:os:getcwd", "unet:data", "unet:/dev/zero", "onnx:/dev/zero", "hf:/proc/self"),
)
"""Values that no field expects."""


def spoil(data: bytes, generator: random.Random) -> tuple[bytes, str]:
    """One of the mutations below, and what it did."""
    mutation = generator.choice(_MUTATIONS)
    spoilt = mutation(data, generator)
    return spoilt, mutation.__name__.strip("_").replace("_", " ")


def _truncate(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))] if data else b""


def _flip_bits(data: bytes, generator: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(generator.choice((1, 2, 8, 64))):
        spoilt[_place(data, generator)] ^= 1 << generator.randrange(8)
    return bytes(spoilt)


def _number_in_place(data: bytes, generator: random.Random) -> bytes:
    width = generator.choice((1, 2, 4, 8))
    value = generator.choice(EXTREMES) & (256**width - 1)
    at = _place(data, generator)
    return data[:at] + value.to_bytes(width, generator.choice(("little", "big"))) + data[at + width :]


def _zeros(data: bytes, generator: random.Random) -> bytes:
    at = _place(data, generator)
    length = generator.choice((4, 64, 4096))
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


def _cut_out(data: bytes, generator: random.Random) -> bytes:
    at = _place(data, generator)
    return data[:at] + data[at + generator.choice((1, 16, 512)) :]


def _repeat(data: bytes, generator: random.Random) -> bytes:
    at = _place(data, generator)
    part = data[at : at + generator.choice((1, 16, 512))]
    return data[:at] + part * generator.choice((2, 100)) + data[at:]


def _noise(data: bytes, generator: random.Random) -> bytes:
    at = _place(data, generator)
    part = generator.randbytes(generator.choice((4, 64)))
    return data[:at] + part + data[at + len(part) :]


def _append(data: bytes, generator: random.Random) -> bytes:
    return data + generator.randbytes(generator.choice((1, 1000)))


def _only_noise(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.choice((0, 4, 8))] + generator.randbytes(generator.choice((0, 1, 100, 5000)))


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_truncate, _truncate, _flip_bits, _flip_bits, _number_in_place, _number_in_place, _number_in_place),
    *(_zeros, _cut_out, _repeat, _noise, _append, _only_noise),
)


def _place(data: bytes, generator: random.Random) -> int:
    """More often in the header than behind it."""
    near = min(len(data), generator.choice((32, 256, 1 << 30)))
    return generator.randrange(near) if near else 0


def spoil_values(values: Any, generator: random.Random, spared: frozenset[str] = frozenset()) -> tuple[Any, str]:
    """A copy with one or more entries exchanged for nasty values, removed, renamed or moved; and what was done.

    Args:
        values: objects and lists, as JSON or YAML hold them.
        spared: keys that stay as they are.
    """
    spoilt, done = copy.deepcopy(values), []
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        holder, key = generator.choice(_entries(spoilt, spared) or [({}, "")])
        where = f"{key!r}"
        match generator.choice(("set", "set", "set", "set", "remove", "rename", "nest", "number")):
            case "set":
                holder[key] = copy.deepcopy(generator.choice(NASTY))
                done.append(f"{where} = {holder[key]!r}"[:60])
            case "remove":
                holder.pop(key, None) if isinstance(holder, dict) else holder.clear()
                done.append(f"no {where}")
            case "rename" if isinstance(holder, dict):
                holder[f"{key}_"] = holder.pop(key, None)
                done.append(f"{where} renamed")
            case "nest":
                holder[key] = _deep(holder.get(key) if isinstance(holder, dict) else holder[key], generator)
                done.append(f"{where} nested")
            case _:
                holder[key] = generator.choice((-1, 1)) * generator.choice(EXTREMES)
                done.append(f"{where} = {holder[key]}")
    return spoilt, ", ".join(done)


def _deep(value: Any, generator: random.Random) -> Any:
    for _ in range(generator.choice((1, 2, 50))):
        value = [value] if generator.random() < 0.5 else {"a": value}
    return value


def _entries(values: Any, spared: frozenset[str]) -> list[tuple[Any, Any]]:
    """Each place of an entry, as holder and key, at any depth."""
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    found = []
    for key in keys:
        if key not in spared:
            found.append((values, key))
            found += _entries(values[key], spared)
    return found
