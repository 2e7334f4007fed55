"""``sparserefine assess``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import (
    add_config,
    add_dense,
    add_device,
    add_engine,
    add_precision,
    add_split,
    config_of,
    dense_of,
    results_file,
)
from sparserefine.commands.output import print_error
from sparserefine.files.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonargparse import ArgumentParser, Namespace
    from torch import Tensor

    from sparserefine.bases.base import BaseConfig
    from sparserefine.data.readers.dataset import Dataset


RENAMED = {"--images": "--most_images"}
"""``images`` is a section of the configuration."""


def add_arguments(parser: ArgumentParser) -> None:
    """Configuration, dense model, images and time."""
    add_config(parser)
    add_dense(parser, "teacher")
    add_split(parser, "val", "")
    parser.add_argument("--most_images", type=int, default=10, help="look at so many images at most, 1 to 10")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="time for all of it; one image is looked at in any case"
    )
    add_engine(parser)
    add_device(parser)
    add_precision(parser)
    parser.add_argument("--json", help="also write all figures to this JSON file")


def run(arguments: Namespace) -> int:
    """Prints the table of :func:`sparserefine.assess`."""
    import shlex
    import time
    from dataclasses import asdict

    from sparserefine.data.readers.check import check_labels
    from sparserefine.engines.choose import EngineChoice
    from sparserefine.files.results import write_results
    from sparserefine.machine.bounds import check_positive, check_whole
    from sparserefine.machine.device import check_precision, device_named, gpu_precision
    from sparserefine.studies.assess import MOST_IMAGES, assess
    from sparserefine.studies.scoring import model_of
    from sparserefine.training.loop import build_refiner

    started, results = time.monotonic(), results_file(arguments.json)
    check_whole("--most_images", arguments.most_images, 1, MOST_IMAGES)
    check_positive("--minutes", arguments.minutes)
    config, device = config_of(arguments), device_named(arguments.device)
    check_precision(arguments.precision, device)
    data = config.read(getattr(config.data, arguments.split))
    check_labels(data, f"{arguments.split} split")
    refiner = build_refiner(config, data)
    refiner.engine = EngineChoice(arguments.engine)
    refiner = refiner.to(device)
    dense = dense_of(arguments, config, data.classes, device)
    with gpu_precision(arguments.precision, device):
        result = assess(
            refiner,
            _some(data, arguments.most_images),
            dense,
            minutes=arguments.minutes - (time.monotonic() - started) / 60,
            progress=print_error,
        )
    print(f"base {_described(config.base)}; dense {_described(model_of(dense).config)}")
    print(result.table())
    if result.threshold is not None and arguments.config:
        teacher = "" if data.labelled else " --training.targets teacher"
        config_file = shlex.quote(printable(arguments.config[-1]))
        print(f"sparserefine train {config_file} --selector.threshold {result.threshold:g}{teacher}")
    if results is not None:
        write_results(results, asdict(result))
    return 0


def _described(base: BaseConfig) -> str:
    return (
        f"{printable(base.name)} at {f'ratio {base.ratio:g}' if base.size is None else 'x'.join(map(str, base.size))}"
    )


def _some(data: Dataset, count: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Images of all of the data, neighbours far apart, in an order of which each beginning is a fair choice too."""
    import random

    for index in random.Random(0).sample(range(len(data)), min(count, len(data))):
        yield data.samples[index].name, *data.example(index)
