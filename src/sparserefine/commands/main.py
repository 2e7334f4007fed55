"""The command line: finds the command, parses its arguments, turns errors into one line and an exit code.

Each command is a file of this folder with the command's name. It has ``add_arguments(parser)`` and ``run(arguments) ->
exit code``, and may have ``RENAMED``, a dict of old option names to new ones, and ``HOW_TO_GO_ON``, what to do after an
interruption. A command's file is imported only when the command is used, and this file imports nothing heavy, so that
``sparserefine --help`` is quick.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparserefine import __version__
from sparserefine.commands import recipes
from sparserefine.commands.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE
from sparserefine.commands.output import discard_output, escaped_output, print_error, reader_has_left
from sparserefine.files.text import first_line, printable
from sparserefine.machine.exhausted import out_of_memory
from sparserefine.machine.signals import Terminated, sigterm_raises

if TYPE_CHECKING:
    from sparserefine.commands.parser import Parser

COMMANDS = {
    "demo": "Run the method on a photograph that comes with the package; writes pictures.",
    "predict": "Segment images with a trained refiner; writes label images.",
    "data": "Check all files of a dataset before training, or draw some of them.",
    "assess": "Predict whether refinement is worth it for a base, and which threshold, before any training.",
    "logits": "Compute and store a base's coarse logits, and a teacher's predictions, to train from them.",
    "train": "Train a refiner for a frozen base model.",
    "evaluate": "Score and time a refiner, next to its base alone and to a dense model; without labels by agreement.",
    "benchmark": "Time base models with and without refinement; needs no trained weights.",
    "recipes": "List the configurations that come with the package, or print one to start from.",
    "quantize": "Prepare a refiner for 8-bit arithmetic on the CPU; needs a few images.",
    "info": "Print versions, devices, engines and bases; paste it into bug reports.",
}
"""Each command with its line in the help."""
_RENAMED = {"calibrate": "quantize"}
_TRACEBACK = "--traceback"
_REPORT = (
    f"this may be a defect: {_TRACEBACK} shows where it is; report it to the maintainers, with that and what "
    "`sparserefine info` prints"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or an ``EXIT_`` of :mod:`sparserefine.commands.arguments`.

    An error is one line: this package's messages say what was found, what was expected and the cure. What it did not
    foresee has a second line that asks for a report. ``--traceback``, anywhere, shows the traceback of either.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with escaped_output(tracebacks=_TRACEBACK in arguments):
            return _main(arguments)
    except KeyboardInterrupt as error:  # before a command began, or after it ended
        return _interrupted(next(iter(arguments), ""), error)
    except OSError as error:  # of the output itself
        if not isinstance(error, BrokenPipeError):
            print_error(f"sparserefine: the output cannot be written ({error})")
        discard_output()
        return EXIT_FAILED


def command_named(name: str) -> Any:
    """The module of one of :data:`COMMANDS`."""
    return importlib.import_module(f"sparserefine.commands.{name}")


def parser_of(name: str) -> Parser:
    """The parser of one of :data:`COMMANDS`."""
    from sparserefine.commands.parser import Parser

    parser = Parser(prog=f"sparserefine {name}", description=COMMANDS[name])
    command_named(name).add_arguments(parser)
    parser.add_argument(_TRACEBACK, action="store_true", help="if something fails, show the traceback too, for reports")
    return parser


def _main(arguments: list[str]) -> int:
    with_traceback = _TRACEBACK in arguments
    arguments = [argument for argument in arguments if argument != _TRACEBACK]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"sparserefine {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print_error(f"sparserefine: {_unknown_command(name)}")
        return EXIT_USAGE
    try:
        with sigterm_raises():
            return _run(name, rest)
    except KeyboardInterrupt as error:
        return _interrupted(name, error)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
            return _interrupted(name, error.__context__)
        raise
    except Exception as error:
        pipe = next((one for one in _chain(error) if isinstance(one, BrokenPipeError)), None)
        if pipe is not None and reader_has_left():
            raise pipe from None
        if with_traceback:
            print_error("".join(traceback.format_exception(error)).rstrip())
        code, message = _explained(name, error)
        print_error(f"sparserefine {name}: {message}")
        return code


def _run(name: str, arguments: list[str]) -> int:
    command = command_named(name)
    for option in (argument.partition("=")[0] for argument in arguments):
        if option in getattr(command, "RENAMED", {}):
            print_error(f"sparserefine {name}: option {option} is called {command.RENAMED[option]} now")
            return EXIT_USAGE
    parser = parser_of(name)
    parsed = parser.parse_args(_config_as_option(parser, arguments))
    if hasattr(command, "complete"):
        command.complete(parsed)
    return int(command.run(parser.instantiate(parsed)))


def _explained(name: str, error: Exception) -> tuple[int, str]:
    """Exit code and message. Only an error of the arguments may have lines of its own: jsonargparse's."""
    line = printable(first_line(error))
    if isinstance(error, ArgumentError):
        quotes = "\nin a YAML file, put it in quotes" if "Expected a <class 'str'>" in str(error) else ""
        return EXIT_USAGE, f"{error}{quotes}\n`sparserefine {name} --help` lists the arguments"
    if out_of_memory(error):
        return EXIT_FAILED, f"not enough memory ({line}); smaller images, crops or batches, or a --budget, need less"
    if isinstance(error, OSError) and error.filename is not None and str(error).startswith("[Errno"):
        denied = "; it may not be read or written by this user" if isinstance(error, PermissionError) else ""
        return EXIT_FAILED, printable(f"{error.filename}: {error.strerror}{denied}")
    if isinstance(error, ValueError | OSError | ImportError | TypeError):
        return EXIT_FAILED, printable(error)
    if isinstance(error, RecursionError):
        return EXIT_FAILED, f"something is nested too deeply, a file or a model ({line})\n{_REPORT}"
    return EXIT_FAILED, f"{type(error).__name__}: {line}\n{_REPORT}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it arose from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _interrupted(name: str, error: BaseException) -> int:
    terminated = isinstance(error, Terminated)
    command = sys.modules.get(f"sparserefine.commands.{name}")
    how = getattr(command, "HOW_TO_GO_ON", "")
    print_error(f"sparserefine {name}: {'terminated' if terminated else 'interrupted'}{how and f'; {how}'}")
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED


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


def _config_as_option(parser: Parser, arguments: list[str]) -> list[str]:
    """Turns ``train CONFIG.yaml`` into ``train --config CONFIG.yaml``, for commands with a configuration.

    It may also be the name of a recipe of this package, unless there is a file of that name. An action stays before it.
    """
    takes_config = any("--config" in action.option_strings for action in parser._actions)
    actions = next((action.choices for action in parser._actions if action.dest == "action"), None) or ()
    before = arguments[: 1 if arguments and arguments[0] in actions else 0]
    after = arguments[len(before) :]
    if not takes_config or not after or after[0].startswith("-"):
        return arguments
    first, *rest = after
    if recipes.is_recipe(first) and not Path(first).exists():
        first = str(recipes.recipe(first))
    return [*before, "--config", first, *rest]
