"""``sparserefine benchmark``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparserefine.commands.arguments import EXIT_FAILED, add_device, add_engine
from sparserefine.commands.output import print_error

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.studies.benchmark.records import Report, Settings


RENAMED = {"--plans": "--presets"}


def add_arguments(parser: ArgumentParser) -> None:
    """Fields of :class:`sparserefine.studies.benchmark.records.Settings`, and the files to write."""
    bases = (
        "base models, comma-separated: hrnet_w48, segformer_b5, ... (random weights), or any base such as unet:FILE; "
    )
    parser.add_argument("--bases", required=True, help=bases + "NAME@HxW sets the coarse size of one")
    parser.add_argument("--size", default="1024x2048", help="image size: height x width in pixels")
    parser.add_argument("--coarse", help="coarse size, HxW: the base's low-resolution input; default: half of --size")
    parser.add_argument(
        "--presets", default="paper,slim16", help="extractor presets, comma-separated: paper, slim, slim16"
    )
    parser.add_argument(
        "--densities",
        help="densities of synthetic masks, 0..1, comma-separated; default: 0.05,0.1,0.2,0.3, or none with --masks",
    )
    parser.add_argument(
        "--masks", nargs="+", default=[], help="image files of --size whose non-black pixels are refined"
    )
    parser.add_argument(
        "--runtimes", default="torch", help="libraries that run the base, comma-separated: torch, onnxruntime, openvino"
    )
    parser.add_argument("--classes", type=int, default=19, help="number of classes, for models with random weights")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, float16 or bfloat16; on a GPU of base and refiner, on a CPU of the base only",
    )
    add_device(parser)
    add_engine(parser)
    parser.add_argument("--graph", action="store_true", help="run all stages after the base as one CUDA graph")
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed runs of each measurement; their median is reported"
    )
    parser.add_argument("--json", help="also write the results to this JSON file, after each base")
    parser.add_argument("--plot", help="also draw a chart: a .png, .svg or .pdf file")


def run(arguments: Namespace) -> int:
    """Prints a table after each base, then the summary; returns 1 if something could not be measured."""
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
        if arguments.json is not None:
            write_records(arguments.json, report.records)

    report = benchmark(settings, seen=seen, tell=print_error)
    print(summary(report))
    if arguments.plot is not None and report.records:
        plot(report, arguments.plot)
    return EXIT_FAILED if report.left_out else 0


def _settings(arguments: Namespace) -> Settings:
    from sparserefine.studies.benchmark.records import Settings, parse_base, parse_density, parse_size

    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    return Settings(
        bases=tuple(map(parse_base, split(arguments.bases))),
        size=parse_size(arguments.size),
        coarse=None if arguments.coarse is None else parse_size(arguments.coarse, "coarse size"),
        presets=split(arguments.presets),
        densities=None if arguments.densities is None else tuple(map(parse_density, split(arguments.densities))),
        masks=tuple(arguments.masks),
        runtimes=split(arguments.runtimes),
        classes=arguments.classes,
        threads=arguments.threads,
        precision=arguments.precision,
        device=arguments.device,
        engine=arguments.engine,
        rounds=arguments.rounds,
        graph=arguments.graph,
    )
