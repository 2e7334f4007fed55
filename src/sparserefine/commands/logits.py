"""``sparserefine logits``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_config, add_device, config_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HOW_TO_GO_ON = "what is stored is whole; the same command computes what is missing"
"""Printed when the command is interrupted."""


def add_arguments(parser: ArgumentParser) -> None:
    """Configuration, overwrite, device."""
    add_config(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace stored files that do not fit: of another model or image, of an older version, or damaged",
    )
    add_device(parser)


def run(arguments: Namespace) -> int:
    """Runs :func:`sparserefine.training.logits.store_logits`."""
    from sparserefine.files.text import printable
    from sparserefine.machine.device import device_named
    from sparserefine.training.logits import store_logits

    config = config_of(arguments)
    for report in store_logits(config, device=device_named(arguments.device), overwrite=arguments.overwrite):
        print(f"{report.computed} stored in {printable(report.folder)}, {report.present} were there already")
    return 0
