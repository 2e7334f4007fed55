"""Reads YAML files strictly: what would be dropped without a word, or grow without bound, is refused with its line.

Plain values only, no tag makes an object. A key given twice is refused (YAML's own loaders keep the last), so are an
alias that contains itself, aliases that multiply, deep nesting and huge files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_NUMBER = 100
"""Characters of a number or date. YAML 1.1 has numbers to the base of 60, which take ever longer to read: 1:1:1:1."""
MAX_VALUES = 20_000
"""Keys and values of a file, each alias counted with all that it stands for."""
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


class YamlError(ValueError):
    """The text is no YAML, or more than plain values."""


def read_yaml(path: str | Path, expected: str = "a YAML file") -> Any:
    """The value in a YAML file.

    Args:
        path: the file, in UTF-8.
        expected: what the file should be, for messages: ``a class map``.

    Raises:
        YamlError: the content is refused; the message names the file and the line.
        ValueError: the path is no regular file, or the file is too large or not UTF-8.
        OSError: the file is missing or may not be read.
    """
    return parse_yaml(read_text(path, expected), str(path))


def read_text(path: str | Path, expected: str = "a YAML file") -> str:
    """The text of a YAML file, not parsed; arguments and errors as in :func:`read_yaml`."""
    path = regular_file(path, expected)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, expected {expected}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: is not UTF-8, expected {expected} in that encoding") from error


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Args:
        text: the text.
        source: where it is from, for messages.

    Raises:
        YamlError: the text is refused.
    """
    with yaml_errors(source):
        return yaml.load(text, _StrictLoader)


def check_yaml(text: str, source: str) -> None:
    """The checks of :func:`parse_yaml` alone, for another loader of plain values; arguments and errors as there."""
    with yaml_errors(source):
        _StrictLoader(text).get_single_node()


@contextmanager
def yaml_errors(source: str) -> Iterator[None]:
    """While the block runs, errors of YAML become a :class:`YamlError` that names the source and the line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"{source}{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not allow; no date, no number
        raise YamlError(f"{source}: {first_line(error)}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, with the checks of this file made before any value is built."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # the stubs say no types here
        before = self._values
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise _refused("an alias stands for something that contains it", mark)
            self._count(self._sizes[node], mark)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels of nesting", mark)
        self._count(1, mark)
        node = super().compose_node(parent, index)
        if node is not None:
            if node.tag not in self.yaml_constructors and node.tag != _MERGE:
                raise _refused(f"tag {node.tag!r}, expected plain values without one", mark)
            if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > MAX_NUMBER:
                raise _refused(f"a number of {len(node.value)} characters, expected at most {MAX_NUMBER}", mark)
            if isinstance(node, yaml.MappingNode):
                self._refuse_equal_keys(node)
            self._sizes[node] = self._values - before
        self._depth -= 1
        return node

    def _count(self, values: int, mark: yaml.Mark) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _refused(f"more than {MAX_VALUES} values, aliases included", mark)

    def _refuse_equal_keys(self, mapping: yaml.MappingNode) -> None:
        seen = set()
        for node, _ in mapping.value:
            if not isinstance(node, yaml.ScalarNode):
                raise _refused("a key is a list or a mapping, expected a word or a number", node.start_mark)
            key = node.value if node.tag == _MERGE else self.construct_object(node)
            if key in seen:
                raise _refused(f"key {key!r} is given twice", node.start_mark)
            seen.add(key)


def _refused(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
