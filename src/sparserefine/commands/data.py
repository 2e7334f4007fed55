"""``sparserefine data``: ``check`` and ``preview``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import EXIT_FAILED, add_config, add_split, config_of, results_file

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.training.config import Config

ACTIONS = ("check", "preview")
"""The first argument, before the configuration."""


def add_arguments(parser: ArgumentParser) -> None:
    """Action, configuration, and what each action takes."""
    parser.add_argument("action", choices=ACTIONS, help="check: read every file; preview: draw some images")
    add_config(parser, without=("out",))
    parser.usage = (
        f"{parser.prog} check CONFIG.yaml [options] [--a.b value ...]\n"
        f"       {parser.prog} preview CONFIG.yaml [--out SHEET.png] [options] [--a.b value ...]"
    )
    parser.add_argument("--out", default="sheet.png", help="preview: where the sheet goes, a PNG file")
    add_split(parser, None, "; default: check all, preview train")
    parser.add_argument("--json", help="check: also write everything that was found to this JSON file")
    parser.add_argument("--most_images", type=int, default=6, help="preview: how many images")
    parser.add_argument("--without_base", action="store_true", help="preview: images and labels only")


def complete(parsed: Namespace) -> None:
    """Without a base, which a look at the data does not need, no input size of one is asked for."""
    if not parsed.base.name and parsed.base.size is None:
        parsed.base.ratio = 1.0


def run(arguments: Namespace) -> int:
    """Prints the report of :func:`check_data`, or writes the sheet of :func:`preview`."""
    config = config_of(arguments)
    return _check(arguments, config) if arguments.action == "check" else _preview(arguments, config)


def _check(arguments: Namespace, config: Config) -> int:
    from dataclasses import asdict

    from sparserefine.data.readers.config import ROLES
    from sparserefine.files.results import write_results
    from sparserefine.studies.data_check import check_data

    results = results_file(arguments.json)
    roles = (arguments.split,) if arguments.split else ROLES
    report = check_data(config.data, config.read, roles)
    print(report.table())
    if results is not None:
        write_results(results, asdict(report))
    return EXIT_FAILED if report.wrong else 0


def _preview(arguments: Namespace, config: Config) -> int:
    from sparserefine.files.images import write_png
    from sparserefine.files.text import printable
    from sparserefine.studies.data_preview import preview
    from sparserefine.training.loop import build_refiner

    if not config.base.name and not arguments.without_base:
        raise ValueError("base.name is empty: name a model, or add --without_base to see images and labels only")
    if not config.out.lower().endswith(".png"):
        raise ValueError(f"out = {config.out}: say where the sheet goes, such as --out sheet.png")
    data = config.read(getattr(config.data, arguments.split or "train"))
    refiner = None if arguments.without_base else build_refiner(config, data)
    write_png(config.out, preview(data, arguments.most_images, refiner))
    print(printable(config.out))
    return 0
