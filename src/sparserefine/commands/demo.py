"""``sparserefine demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_device

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Output folder, device."""
    parser.add_argument("--out", default="demo", help="output folder for the pictures and demo.json")
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Prints the table of :func:`sparserefine.studies.demo.demo`."""
    from sparserefine.machine.device import device_named
    from sparserefine.studies.demo import demo

    print(demo(arguments.out, device=device_named(arguments.device)))
    return 0
