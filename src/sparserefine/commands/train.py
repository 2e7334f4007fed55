"""``sparserefine train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_config, config_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HOW_TO_GO_ON = "the same command with --resume goes on from the last checkpoint"
"""What is said after an interruption."""


def add_arguments(parser: ArgumentParser) -> None:
    """Configuration, resume."""
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")


def run(arguments: Namespace) -> int:
    """Runs :func:`sparserefine.train`."""
    from sparserefine.training.loop import train

    print(f"best refiner: {train(config_of(arguments), resume=arguments.resume)}")
    return 0
