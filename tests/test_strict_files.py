"""YAML and JSON are read strictly: nothing dropped without a word, no growth, only regular files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sparserefine.files import json as json_files
from sparserefine.files import yaml as yaml_files
from sparserefine.files.json import read_json
from sparserefine.files.yaml import YamlError, check_yaml, parse_yaml, read_yaml

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines that stand for half a billion values."""

REFUSED = {
    "a key twice": ("a: 1\nb: 2\n'a': 3", "f.yaml, line 3: key 'a' is given twice"),
    "a number twice": ("1: a\n0x1: b", "f.yaml, line 2: key 1 is given twice"),
    "a key twice below": ("a:\n  b: 1\n  b: 2", "f.yaml, line 3: key 'b' is given twice"),
    "a list as key": ("? [a]\n: 1", "f.yaml, line 1: a key is a list or a mapping"),
    "a bomb": (BOMB, "f.yaml, line 5: more than 20000 values, aliases included"),
    "an alias of itself": ("a: &a [1, *a]", "f.yaml, line 1: an alias stands for something that contains it"),
    "deep": ("[" * 100_000, "f.yaml, line 1: more than 50 levels of nesting"),
    "long number": ("a: 1" + ":1" * 100_000, "f.yaml, line 1: a number of 200001 characters, expected at most 100"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(60)), "line 50: more than 50 levels"),
    "long": ("- a\n" * 30_000, "line 20000: more than 20000 values"),
    "an object": ("a: 1\nb: !!python/object/apply:os.getcwd []", "line 2: tag 'tag:yaml.org,2002:python/object/apply"),
    "a foreign tag": ("a: !thing x", "line 1: tag '!thing'"),
    "an open list": ("a: [1, 2\nb: 3", "f.yaml, line 2: while parsing a flow sequence, expected"),
    "two documents": ("a: 1\n---\nb: 1", "line 2: expected a single document in the stream"),
    "a NUL": ("a: \0", "f.yaml: unacceptable character #x0000"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    for read in (parse_yaml, check_yaml):
        with pytest.raises(YamlError) as error:
            read(text, "f.yaml")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: 2024-13-45"], ids=["a date"])
def test_yaml_values_that_are_none(text: str) -> None:
    with pytest.raises(YamlError, match=r"^f\.yaml: "):
        parse_yaml(text, "f.yaml")
    check_yaml(text, "f.yaml")  # another loader may take it as text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: {b: [1, 2.5, null, yes, text]}",
        "x: &x {a: 1}\ny: {<<: *x, a: 2}\nz: {<<: *x}",
        "z: {<<: {a: 1, <<: {a: 3}}, a: 4}",
        "a: &a [1]\nb: *a\nc: *a",
        "{" * 20 + "a: 1" + "}" * 20,
    ],
)
def test_other_yaml_is_what_it_always_was(text: str) -> None:
    if text.startswith("{{"):
        text = "{a: " * 20 + "1" + "}" * 20
    assert parse_yaml(text, "f.yaml") == yaml.safe_load(text)


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes("\ufeffname: \u00e4\n".encode())
    assert read_yaml(path) == {"name": "\u00e4"}
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ValueError, match=r"f\.yaml, line 2: is not UTF-8, expected a class map in that encoding"):
        read_yaml(path, "a class map")
    path.write_bytes(b"#" * (yaml_files.MAX_BYTES + 1))
    with pytest.raises(ValueError, match=r"f\.yaml: is larger than 1 MiB"):
        read_yaml(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    with pytest.raises(ValueError, match=r"fifo: is a FIFO \(named pipe\), expected a class map"):
        read_yaml(tmp_path / "fifo", "a class map")
    with pytest.raises(ValueError, match=r"fifo: is a FIFO \(named pipe\), expected a JSON file"):
        read_json(tmp_path / "fifo")
    with pytest.raises(ValueError, match="is a folder, expected a JSON file"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match=r"none\.json: no such file, expected a JSON file"):
        read_json(tmp_path / "none.json")


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": -Infinity}', "-Infinity is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": 9223372036854775808}', "beyond 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "beyond 64 bits"),
        (nested(json_files.MAX_DEPTH), "more than 100 levels of nesting"),
        (nested(50_000), "nested too deeply"),
        ("\ufeff{}", "Unexpected UTF-8 BOM"),
        ("[]", "holds list, expected an object"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^\S*f\.json: ") as error:
        read_json(path)
    assert message in str(error.value)


def test_other_json(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": [-9223372036854775808, 1.5, null, true, {"b": "\\u00e4"}]}')
    assert read_json(path) == {"a": [-(2**63), 1.5, None, True, {"b": "\u00e4"}]}
    path.write_text(nested(json_files.MAX_DEPTH - 1))
    read_json(path)
    path.write_text(" " * json_files.MAX_BYTES + "{}")
    with pytest.raises(ValueError, match="is larger than 8 MiB"):
        read_json(path)


def test_a_key_twice_among_many_is_found_quickly(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text("{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":1}')
    with pytest.raises(ValueError, match="key '99999' is given twice"):
        read_json(path)
