"""The command line: finds the command, parses its arguments, turns errors into one line and an exit code.

Each command is a file of this folder with the command's name. It has ``add_arguments(parser)`` and ``run(arguments) ->
exit code``, and may have ``RENAMED``, a dict of old option names to new ones. A command's file is imported only when
the command is used, and this file imports nothing heavy, so that ``sparserefine --help`` is quick.
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
    "demo": "Run the method on a photograph that comes with the package; writes pictures.",
    "predict": "Segment images with a trained refiner; writes label images.",
    "logits": "Compute and store a base's coarse logits, to train from them later.",
    "train": "Train a refiner for a frozen base model.",
    "evaluate": "Score and time a refiner on labelled images, next to its base alone.",
    "benchmark": "Time base models with and without refinement; needs no trained weights.",
    "quantize": "Prepare a refiner for 8-bit arithmetic on the CPU; needs a few images.",
    "info": "Print versions, devices, engines and bases; paste it into bug reports.",
}
"""Each command with its line in the help."""
_RENAMED = {"calibrate": "quantize"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Errors that a user can fix are one line, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"sparserefine {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _usage_error(f"sparserefine: {_unknown_command(name)}")
    from jsonargparse import ArgumentParser

    command = command_named(name)
    for option in (argument.partition("=")[0] for argument in rest):
        if option in getattr(command, "RENAMED", {}):
            return _usage_error(f"sparserefine {name}: option {option} is called {command.RENAMED[option]} now")
    parser = ArgumentParser(prog=f"sparserefine {name}", description=COMMANDS[name], exit_on_error=False)
    command.add_arguments(parser)
    sys.path.insert(0, str(Path.cwd()))  # so that `python:my_module:load` finds modules here, as under `python -m`
    try:
        parsed = parser.parse_args(_config_as_option(parser, rest))
        return int(command.run(parser.instantiate(parsed)))
    except ArgumentError as error:
        quotes = "\nin a YAML file, put it in quotes" if "Expected a <class 'str'>" in str(error) else ""
        return _usage_error(f"sparserefine {name}: {error}{quotes}\n`sparserefine {name} --help` lists the arguments")
    except KeyboardInterrupt:
        print("sparserefine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, TypeError) as error:
        # This package's messages say what was found, what was expected and the cure; a traceback would hide them.
        print(f"sparserefine {name}: {error}", file=sys.stderr)
        return EXIT_FAILED


def command_named(name: str) -> Any:
    """The module of one of :data:`COMMANDS`."""
    return importlib.import_module(f"sparserefine.commands.{name}")


def _usage_error(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_USAGE


def _unknown_command(name: str) -> str:
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
    """Turns ``train CONFIG.yaml`` into ``train --config CONFIG.yaml``, for commands with a configuration."""
    takes_config = any("--config" in action.option_strings for action in parser._actions)
    if takes_config and arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments
