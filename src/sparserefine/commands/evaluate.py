"""``sparserefine evaluate``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_config, add_precision, add_refiner, config_of, refiner_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Configuration, refiner, precision, and the dense model to compare with."""
    add_config(parser)
    add_refiner(parser)
    add_precision(parser)
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="which part of the data to score"
    )
    parser.add_argument(
        "--dense", help="dense model to compare with: a base's name, as in base.name; it sees images at --dense_ratio"
    )
    parser.add_argument(
        "--dense_class_map", help="class map of --dense; default: base.class_map if both names are of the same kind"
    )
    parser.add_argument(
        "--dense_ratio", type=float, default=1.0, help="input size of --dense relative to the image; 1: full resolution"
    )
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each image; their median is reported")
    parser.add_argument("--json", help="also write all scores and costs to this JSON file")


def run(arguments: Namespace) -> int:
    """Prints the table of :func:`sparserefine.evaluate`."""
    from tqdm import tqdm

    from sparserefine.bases.other import other_config
    from sparserefine.files.regular import given_path
    from sparserefine.files.results import write_results
    from sparserefine.files.whole import sweep
    from sparserefine.loading import load_base
    from sparserefine.machine.device import check_precision, device_named, gpu_precision
    from sparserefine.studies.evaluate import evaluate

    results = None if arguments.json is None else given_path(arguments.json, "--json")
    if results is not None:
        if results.is_dir():
            raise ValueError(f"--json {results}: is a folder, expected the name of a file")
        sweep(results.parent)
    config, device = config_of(arguments), device_named(arguments.device)
    check_precision(arguments.precision, device)
    data = config.data.read(getattr(config.data, arguments.split))
    refiner = refiner_of(arguments, base=load_base(config.base, data.classes))
    if refiner.selector != config.selector:
        used = f"threshold {refiner.selector.threshold}, budget {refiner.selector.budget}"
        print(
            f"selector: {used} (the refiner's, not the configuration's; set them with --threshold and --budget)",
            file=sys.stderr,
        )
    dense = None
    if arguments.dense:
        its = other_config(
            config.base, arguments.dense, ratio=arguments.dense_ratio, class_map=arguments.dense_class_map or None
        )
        dense = load_base(its, data.classes, engine=arguments.engine).to(device)
    images = (data.read(index) for index in tqdm(range(len(data)), desc=arguments.split, unit="image"))
    with gpu_precision(arguments.precision, device):
        result = evaluate(refiner, images, dense=dense, boundary_px=config.boundary_px, repeats=arguments.repeats)
    print(result.table())
    if results is not None:
        write_results(results, asdict(result))
    return 0
