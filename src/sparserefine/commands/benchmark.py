"""``sparserefine benchmark``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import EXIT_FAILED, add_device, add_engine

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.studies.benchmark.records import Report, Settings


RENAMED = {"--plans": "--presets"}


def add_arguments(parser: ArgumentParser) -> None:
    """What to measure, see :class:`sparserefine.studies.benchmark.records.Settings`, and where to write it."""
    bases = "comma-separated: hrnet_w48, segformer_b5, ... with random weights, or any base as unet:FILE; NAME@HxW "
    parser.add_argument("--bases", required=True, help=bases + "gives one its own coarse size")
    parser.add_argument("--size", default="1024x2048", help="height x width of the image in pixels")
    parser.add_argument("--coarse", help="size of the base's low-resolution input; default: half of --size")
    parser.add_argument("--presets", default="paper,slim16", help="extractors, comma-separated: paper, slim, slim16")
    parser.add_argument(
        "--densities",
        help="densities of synthetic masks, comma-separated, 1: all pixels; default without --masks: 0.05,0.1,0.2,0.3",
    )
    parser.add_argument("--masks", nargs="+", default=[], help="image files; pixels that are not black are refined")
    parser.add_argument(
        "--runtimes", default="torch", help="what runs the base, comma-separated: torch, onnxruntime, openvino"
    )
    parser.add_argument("--classes", type=int, default=19, help="number of classes of models with random weights")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: as many as torch uses")
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, float16 or bfloat16: of the base on a CPU, of base and refiner on a GPU",
    )
    add_device(parser)
    add_engine(parser)
    parser.add_argument("--graph", action="store_true", help="run all stages after the base as one CUDA graph")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of everything; times are medians")
    parser.add_argument("--json", help="also write the records to this file, after each base")
    parser.add_argument("--plot", help="also draw them: a .png, .svg or .pdf file")


def run(arguments: Namespace) -> int:
    """Prints a table for each base as it is measured, then the summary; fails where a base could not be measured."""
    from sparserefine.studies.benchmark.measure import benchmark
    from sparserefine.studies.benchmark.report import check_outputs, header, model_table, plot, summary, write_records

    settings = _settings(arguments)
    check_outputs(arguments.json, arguments.plot)
    shown = 0

    def seen(report: Report) -> None:
        nonlocal shown
        new, first = report.records[shown:], shown == 0
        shown = len(report.records)
        if new:
            print(f"{header(report)}\n\n{model_table(new)}\n" if first else f"{model_table(new)}\n", flush=True)
        if arguments.json:
            write_records(arguments.json, report.records)

    report = benchmark(settings, seen=seen, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(summary(report))
    if arguments.plot and report.records:
        plot(report, arguments.plot)
    return EXIT_FAILED if report.left_out else 0


def _settings(arguments: Namespace) -> Settings:
    from sparserefine.studies.benchmark.records import Settings, parse_base, parse_density, parse_size

    def parts(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    return Settings(
        bases=tuple(map(parse_base, parts(arguments.bases))),
        size=parse_size(arguments.size),
        coarse=None if arguments.coarse is None else parse_size(arguments.coarse, "coarse size"),
        presets=parts(arguments.presets),
        densities=None if arguments.densities is None else tuple(map(parse_density, parts(arguments.densities))),
        masks=tuple(arguments.masks),
        runtimes=parts(arguments.runtimes),
        classes=arguments.classes,
        threads=arguments.threads,
        precision=arguments.precision,
        device=arguments.device,
        engine=arguments.engine,
        rounds=arguments.rounds,
        graph=arguments.graph,
    )
