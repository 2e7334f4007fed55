"""Configurations, lists and other texts that lie."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import yaml

from chaos.mutate import spoil, spoil_values

SPARED = frozenset({"steps", "val_every", "boundary_px"})
"""Numbers of steps that are no mistake, but would train for ever."""


@cache
def common() -> list[tuple[bytes, str]]:
    """What may be in the place of any text."""
    return [
        (b"", "empty"),
        (b"\0" * 1000, "zeros"),
        (b"\xff\xfe\x00\xd8", "half a pair of UTF-16"),
        (b"\xef\xbb\xbfa: b\n", "a byte order mark"),
        ("a: b\n".encode("utf-16"), "UTF-16"),
        (b"a: \xe9\n", "Latin-1"),
        (b"\x1b[31mred\x1b[0m\n", "an escape sequence"),
        (b"a" * 5_000_000, "one line of 5 MB"),
        (b"a\n" * 200_000, "200000 lines"),
        (b"\n\n\n  \n", "blank lines"),
        (b"PK\x03\x04" + bytes(100), "a zip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "an image"),
    ]


@cache
def yaml_lies() -> list[tuple[bytes, str]]:
    """YAML that is no configuration."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    texts = [
        (bomb, "aliases that make a billion"),
        ("a: &a\n  b: *a\n", "an alias of itself"),
        ("&a [*a]", "a list in itself"),
        ("data: " + "[" * 20_000 + "]" * 20_000, "lists nested 20000 deep"),
        ("data: " + "{a: " * 20_000 + "1" + "}" * 20_000, "maps nested 20000 deep"),
        ("- " * 20_000 + "a", "dashes nested 20000 deep"),
        ("data: !!python/object/apply:os.system ['echo ran']", "a call"),
        ("data: !!python/name:os.system", "a name of Python"),
        ("data: !!binary aGVsbG8=", "binary"),
        ("data: !unknown x", "an unknown tag"),
        ("out: run\nout: other\n", "a key twice"),
        ("training: {lr: 0.1, lr: 0.2}\n", "a key twice, inside"),
        ("data:\n\tname: folder\n", "a tab"),
        ("data: [1, 2\n", "an open bracket"),
        ("- a\n- b\n", "a list"),
        ("just text", "a text"),
        ("42", "a number"),
        ("null", "nothing"),
        ("--- \na: 1\n--- \nb: 2\n", "two documents"),
        ("? [a, b]\n: c\n", "a list as key"),
        ("<<: 3\n", "a merge of a number"),
        ("out: 2024-01-01\n", "a date"),
        ("training: {lr: " + "9" * 5000 + "}\n", "a number of 5000 digits"),
        ("training: {lr: 1e999}\n", "1e999"),
        ("training: {lr: 0x" + "f" * 5000 + "}\n", "a hexadecimal number of 5000 digits"),
        ("training: {lr: 1:1:1:1:1:1:1:1:1:1:1:1:1:1}\n", "a number of base 60"),
        ('out: "\\uD800"\n', "half a pair"),
        ('out: "a\\0b"\n', "a zero in a path"),
        ('out: "' + "x" * 300 + '"\n', "a name that is too long"),
    ]
    return [*common(), *((text.encode("utf-8", "surrogatepass"), what) for text, what in texts)]


def bad_yaml(number: int, generator: random.Random, values: dict[str, Any]) -> tuple[bytes, str]:
    """A configuration with lies."""
    lies = yaml_lies()
    if number < len(lies):
        return lies[number]
    if number % 5 == 0:
        return spoil(yaml.safe_dump(values).encode(), generator)
    wrong, what = spoil_values(values, generator, SPARED)
    try:
        return yaml.safe_dump(wrong).encode("utf-8", "surrogatepass"), what
    except (yaml.YAMLError, ValueError):
        return repr(wrong).encode("utf-8", "surrogatepass"), what


@cache
def json_lies() -> list[tuple[bytes, str]]:
    """JSON that is not what it should be."""
    texts = [
        ("[" * 200_000, "lists nested 200000 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "objects nested 100000 deep"),
        ("[]", "a list"),
        ("3", "a number"),
        ("null", "nothing"),
        ('"text"', "a text"),
        ("{}", "an empty object"),
        ('{"format_version": ' + "1" * 10_000 + "}", "a number of 10000 digits"),
        ('{"format_version": 1e999}', "1e999"),
        ('{"format_version": NaN}', "NaN"),
        ('{"format_version": 1', "cut short"),
        ('{"\\u001b[31m\\n": 1}', "a key with control characters"),
        ('{"a": "\\ud800"}', "half a pair"),
    ]
    return [*common(), *((text.encode(), what) for text, what in texts)]


def bad_json(number: int, generator: random.Random, values: Any) -> tuple[bytes, str]:
    """An object with lies."""
    lies = json_lies()
    if number < len(lies):
        return lies[number]
    if number % 5 == 0:
        return spoil(json.dumps(values).encode(), generator)
    wrong, what = spoil_values(values, generator)
    return json.dumps(wrong).encode(), what


def bad_class_map(number: int, generator: random.Random) -> tuple[bytes, str]:
    """A class map of two classes."""
    values: dict[Any, Any] = {"ground": "ground", "line": "line"}
    if number % 3 == 0:
        values = {0: 0, 1: 1}
    return bad_yaml(number, generator, values)


def bad_classes(number: int, generator: random.Random) -> tuple[bytes, str]:
    """A classes file."""
    texts = [
        "ground\n",
        "ground 1 2 3 4\nline\n",
        "ground 256 0 0\nline\n",
        f"ground {10**400} 0 0\nline\n",
        "ground -1 0 0\nline\n",
        "1 2 3\n4 5 6\n",
        "ground\nground\n",
        "ground\nline\x1b[31m\n",
        "ground\nline\u2028other\n",
        "\n".join(f"class {i}" for i in range(300)),
        "\n".join(f"class {i}" for i in range(100_000)),
        "ground ٣ ٣ ٣\nline\n",
        "ground" + " " * 100_000 + "x\nline\n",
        "ground" + " 1" * 50_000 + "\nline\n",
        "ground 1e3 nan inf\nline\n",
    ]
    lies = [*common(), *((text.encode(), f"lines {text[:16]!r}") for text in texts)]
    return lies[number] if number < len(lies) else spoil(b"ground\nline 255 0 0\n", generator)


def bad_list(number: int, generator: random.Random) -> tuple[bytes, str]:
    """A list of images."""
    names = ("../labels/0", "/etc/passwd", "0 0 0", "none", "0.png", "\x1b[31m", "x" * 100_000, "*", "~", "..", "0\0")
    lies = [*common(), *((name.encode(), f"names {name[:12]!r}") for name in names)]
    return lies[number] if number < len(lies) else spoil(b"0 1\n", generator)
