"""``sparserefine evaluate``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_config, add_precision, add_refiner, config_of, refiner_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.bases.base import BaseConfig


def add_arguments(parser: ArgumentParser) -> None:
    """A configuration, a refiner, and what to compare it with."""
    add_config(parser)
    add_refiner(parser)
    add_precision(parser)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="split of the data to score")
    parser.add_argument("--dense", help="another base to compare with, by name, at --dense_ratio of the size")
    parser.add_argument(
        "--dense_class_map", help="class map of --dense; a base of the same kind has the configuration's"
    )
    parser.add_argument("--dense_ratio", type=float, default=1.0, help="input size of --dense relative to the image")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each image; times are medians")
    parser.add_argument("--json", help="also write the figures to this file")


def run(arguments: Namespace) -> int:
    """Prints the table of :func:`sparserefine.evaluate`."""
    from tqdm import tqdm

    from sparserefine.bases.load import load_base
    from sparserefine.files.whole import written_whole
    from sparserefine.machine.device import check_precision, device_named, on_gpu_in
    from sparserefine.studies.evaluate import evaluate

    config, device = config_of(arguments), device_named(arguments.device)
    check_precision(arguments.precision, device)
    data = config.data.read(getattr(config.data, arguments.split))
    refiner = refiner_of(arguments, base=load_base(config.base, data.classes))
    if refiner.selector != config.selector:
        used = f"threshold {refiner.selector.threshold}, budget {refiner.selector.budget}"
        print(f"selector: {used} (not the configuration's; --threshold and --budget choose)", file=sys.stderr)
    dense = load_base(_dense_config(arguments, config.base), data.classes).to(device) if arguments.dense else None
    images = (data.read(index) for index in tqdm(range(len(data)), desc=arguments.split, unit="image"))
    with on_gpu_in(arguments.precision, device):
        result = evaluate(refiner, images, dense=dense, boundary_px=config.boundary_px, repeats=arguments.repeats)
    print(result.table())
    if arguments.json:
        with written_whole(arguments.json) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0


def _dense_config(arguments: Namespace, base: BaseConfig) -> BaseConfig:
    """Of ``--dense``: as the configuration's base where it is of the same kind, else as its own files say."""
    config = replace(base, name=arguments.dense, ratio=arguments.dense_ratio, size=None)
    if arguments.dense.partition(":")[0] != base.name.partition(":")[0]:
        config = replace(config, mean=None, std=None, outputs=None, class_map=None)
    if arguments.dense_class_map:
        config = replace(config, class_map=arguments.dense_class_map)
    return config
