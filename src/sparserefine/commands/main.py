"""The command line: finds the command, parses its arguments, turns errors into one line and an exit code.

A command is the file of its name in this folder, with ``add_arguments(parser)`` and ``run(arguments) -> exit code``; it
may have ``RENAMED``, its old options and what they are called now. It is imported when it is asked for; this file
imports nothing heavy, so that ``sparserefine --help`` is quick.
"""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparserefine import __version__
from sparserefine.commands.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {
    "demo": "Shows the method on an embedded 8-megapixel photograph.",
    "predict": "Labels images with a stored refiner.",
    "logits": "Stores the base's coarse logits for training.",
    "train": "Trains a refiner for a frozen base.",
    "evaluate": "Scores coarse, refined, oracle and dense predictions.",
    "benchmark": "Times dense, coarse and refined predictions of models.",
    "quantize": "Measures activations for 8-bit arithmetic on the CPU.",
    "info": "Versions, devices and engines.",
}
"""What the help says of each command."""
_RENAMED = {"calibrate": "quantize"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Errors that a user can mend are one line, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"sparserefine {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _refused(f"sparserefine: {_unknown(name)}")
    from jsonargparse import ArgumentParser

    command = command_named(name)
    for option in (argument.partition("=")[0] for argument in rest):
        if option in getattr(command, "RENAMED", {}):
            return _refused(f"sparserefine {name}: option {option} is called {command.RENAMED[option]} now")
    parser = ArgumentParser(prog=f"sparserefine {name}", description=COMMANDS[name], exit_on_error=False)
    command.add_arguments(parser)
    sys.path.insert(0, str(Path.cwd()))  # where `python:my_module:load` is looked for first, as `python -m` does
    try:
        parsed = parser.parse_args(_config_as_option(parser, rest))
        return int(command.run(parser.instantiate(parsed)))
    except ArgumentError as error:
        quotes = "\nin a YAML file, put it in quotes" if "Expected a <class 'str'>" in str(error) else ""
        return _refused(f"sparserefine {name}: {error}{quotes}\n`sparserefine {name} --help` lists what is known")
    except KeyboardInterrupt:
        print("sparserefine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, TypeError) as error:
        # What this package raises says what was seen, what was expected and the cure; a traceback would hide it.
        print(f"sparserefine {name}: {error}", file=sys.stderr)
        return EXIT_FAILED


def command_named(name: str) -> Any:
    """The module of one of :data:`COMMANDS`."""
    return importlib.import_module(f"sparserefine.commands.{name}")


def _refused(words: str) -> int:
    print(words, file=sys.stderr)
    return EXIT_USAGE


def _unknown(name: str) -> str:
    if name in _RENAMED:
        return f"command {name!r} is called {_RENAMED[name]!r} now; use `sparserefine {_RENAMED[name]}`"
    return f"no command {name!r}; expected one of {', '.join(COMMANDS)}"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return (
        "usage: sparserefine [--version] COMMAND ...\n\n"
        "High-resolution segmentation at low-resolution cost, for the model you already trained.\n\n"
        + "\n".join(lines)
        + "\n\n`sparserefine COMMAND --help` lists the arguments of a command."
    )


def _config_as_option(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """``train CONFIG.yaml`` is ``train --config CONFIG.yaml``, where the command has a configuration."""
    takes_config = any("--config" in action.option_strings for action in parser._actions)
    if takes_config and arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments
