"""``sparserefine predict``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import (
    EXIT_FAILED,
    add_base,
    add_max_megapixels,
    add_precision,
    add_refiner,
    refiner_of,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HOW_TO_GO_ON = "images that were predicted are kept; repeat the command with --skip_existing to go on"
"""For the command line, after an interruption."""


def add_arguments(parser: ArgumentParser) -> None:
    """Inputs, refiner, precision, outputs, base."""
    parser.add_argument("inputs", nargs="+", help="image files, folders, or glob patterns in quotes")
    add_refiner(parser)
    add_precision(parser)
    parser.add_argument("--out", required=True, help="output folder for the label images (index PNG or TIFF)")
    parser.add_argument(
        "--format",
        choices=("auto", "png", "tif"),
        default="auto",
        help="of the label images; tif keeps the coordinates of a GeoTIFF; auto: tif for a GeoTIFF, else png",
    )
    parser.add_argument(
        "--overlay", action="store_true", help="also write NAME_overlay.png, the labels drawn over the image"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that exist; without it, such images fail"
    )
    parser.add_argument(
        "--skip_existing",
        action="store_true",
        help="keep outputs that exist and predict the other images only, such as after an interruption",
    )
    add_max_megapixels(parser)
    add_base(parser)


def run(arguments: Namespace) -> int:
    """Runs :func:`sparserefine.predict`; returns 1 if an image failed."""
    from sparserefine.inference.predict import Predicted, predict
    from sparserefine.machine.device import check_precision, device_named, gpu_precision

    device = device_named(arguments.device)
    check_precision(arguments.precision, device)
    refiner, out = refiner_of(arguments, trust_base=arguments.trust_base, runtime=arguments.runtime), arguments.out
    done: list[Predicted] = []
    try:
        with gpu_precision(arguments.precision, device):
            report = predict(
                arguments.inputs,
                refiner,
                out,
                overlay=arguments.overlay,
                overwrite=arguments.overwrite,
                skip_existing=arguments.skip_existing,
                format=arguments.format,
                max_megapixels=arguments.max_megapixels,
                seen=done.append,
            )
    except KeyboardInterrupt:
        number = f"{len(done)} image{'' if len(done) == 1 else 's'}"
        print(f"{number} predicted before the interruption", file=sys.stderr)
        raise
    for failure in report.failures:
        print(failure, file=sys.stderr)
    if report.not_tried:
        print(f"stopped: {HOW_TO_GO_ON}", file=sys.stderr)
    print(report.summary())
    return EXIT_FAILED if report.failures else 0
