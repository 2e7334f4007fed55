"""``sparserefine evaluate``."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import (
    add_config,
    add_dense,
    add_precision,
    add_refiner,
    add_split,
    config_of,
    dense_of,
    refiner_of,
    results_file,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Configuration, refiner, precision, and the dense model to compare with."""
    add_config(parser)
    add_refiner(parser)
    add_precision(parser)
    add_split(parser, "test", " to score")
    add_dense(parser, "none; data without labels need one")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each image; their median is reported")
    parser.add_argument("--json", help="also write all scores and costs to this JSON file")


def run(arguments: Namespace) -> int:
    """Prints the table of :func:`sparserefine.evaluate`."""
    from tqdm import tqdm

    from sparserefine.data.readers.check import check_labels
    from sparserefine.files.results import write_results
    from sparserefine.files.text import printable
    from sparserefine.loading import load_base
    from sparserefine.machine.device import check_precision, device_named, gpu_precision
    from sparserefine.studies.evaluate import evaluate

    results = results_file(arguments.json)
    config, device = config_of(arguments), device_named(arguments.device)
    check_precision(arguments.precision, device)
    data = config.read(getattr(config.data, arguments.split))
    if not data.labelled and arguments.dense is None:
        raise ValueError(
            f"the {arguments.split} data in {config.data.root} have no labels to score by; name a dense model to agree "
            f"with: --dense teacher (here {printable(config.teacher.name or config.base.name)}), or --dense NAME"
        )
    check_labels(data, f"{arguments.split} split")
    refiner = refiner_of(arguments, base=load_base(config.base, data.classes))
    read_as = replace(refiner.config.images, max_megapixels=config.images.max_megapixels)
    if read_as != config.images:
        print(f"images: {read_as} (the refiner's, not the configuration's)", file=sys.stderr)
        data = replace(data, images=read_as)
    if refiner.selector != config.selector:
        used = f"threshold {refiner.selector.threshold}, budget {refiner.selector.budget}"
        print(
            f"selector: {used} (the refiner's, not the configuration's; set them with --threshold and --budget)",
            file=sys.stderr,
        )
    dense = None if arguments.dense is None else dense_of(arguments, config, data.classes, device)
    images = (data.example(index) for index in tqdm(range(len(data)), desc=arguments.split, unit="image"))
    with gpu_precision(arguments.precision, device):
        result = evaluate(refiner, images, dense=dense, boundary_px=config.boundary_px, repeats=arguments.repeats)
    print(result.table())
    if results is not None:
        write_results(results, asdict(result))
    return 0
