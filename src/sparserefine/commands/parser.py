"""The parser of a command: jsonargparse's, strict with files, and no value in them imports anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jsonargparse
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from sparserefine.files.regular import regular_file
from sparserefine.files.yaml import check_yaml, read_text, yaml_errors

_MODE, _CONFIGURATION = "sparserefine", "a configuration in YAML"


def _load(text: str) -> Any:
    check_yaml(text, "YAML")
    with yaml_errors("YAML"):
        return get_loader("yaml")(text)


set_loader(_MODE, _load, (ValueError,))
# Else `data: some.module` in a configuration would run that module. Our own classes are looked up in the same way.
_OURS = ["sparserefine.training.config", "sparserefine.files.image_config"]
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=_OURS)


class Parser(jsonargparse.ArgumentParser):
    """Parses the arguments of a command; errors are raised, as ``argparse.ArgumentError``.

    A configuration is one regular file in strict YAML (:mod:`sparserefine.files.yaml`); its entries do not lead to
    other files. No argument is empty: an unset shell variable gives that, and as a path it would be the current folder.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"exit_on_error": False, "parser_mode": _MODE, "allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str], **options: Any) -> Namespace:  # type: ignore[override]  # args are given
        """The arguments, checked."""
        try:
            for option, value in _options(args):
                if option == "--config" and not value:
                    self.error("--config is empty; is a shell variable unset?")
                if option == "--config" and not value.startswith(("{", "-")):
                    regular_file(
                        Path(value).absolute(), f"{_CONFIGURATION} or a name that `sparserefine recipes` lists"
                    )
                if option.removeprefix("--") in self._groups() and not value.startswith("{"):
                    self.error(f"{option} {value}: expected entries, '{{name: value}}'; --config takes a file")
            parsed = super().parse_args(args, **options)
        except (OSError, ValueError, OverflowError) as error:  # of the check above, a refused import, a huge number
            self.error(str(error), error)
        for action in self._actions:
            given = None if "." in action.dest else parsed.get(action.dest)
            if given == "" or (isinstance(given, list) and "" in given):
                self.error(f"{(*action.option_strings, action.dest)[0]} is empty; is a shell variable unset?")
        return parsed

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Namespace:
        """The values in a configuration file."""
        if str(path) == "-":  # standard input
            return cast("Namespace", super().parse_path(path, *args, **options))
        try:
            text = read_text(Path(path), _CONFIGURATION)
            check_yaml(text, str(path))
        except (OSError, ValueError) as error:
            raise TypeError(str(error)) from error  # which jsonargparse makes an error of the arguments
        values = _load(text)
        if not isinstance(values, dict):
            raise TypeError(f"{path}: holds no 'name: value', expected {_CONFIGURATION}")
        for group in sorted(self._groups() & values.keys()):
            if not isinstance(values[group], dict):
                raise TypeError(f"{path}: {group} is {values[group]!r}, expected its entries, {group}: {{name: value}}")
        return cast("Namespace", self.parse_string(text, Path(path).name, *args, **options))

    def _groups(self) -> set[str]:
        """Names of the arguments that have entries: ``data`` of ``data.name``."""
        return {action.dest.partition(".")[0] for action in self._actions if "." in action.dest}


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their first values, ``--a x`` and ``--a=x``."""
    for argument, following in zip(args, [*args, ""][1:], strict=True):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            yield option, value if equals else following
