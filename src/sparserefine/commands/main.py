"""The command line: each command is the Python function of the same name."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparserefine import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.refiner import SparseRefiner
    from sparserefine.training.config import Config

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Command:
    """A command: what help says of it, its arguments, and what runs it (returns the exit code)."""

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[ArgumentParser, Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Errors that a user can mend are one line, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"sparserefine {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"sparserefine: no command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    from jsonargparse import ArgumentParser

    command = COMMANDS[name]
    parser = ArgumentParser(prog=f"sparserefine {name}", description=command.summary, exit_on_error=False)
    command.add_arguments(parser)
    sys.path.insert(0, str(Path.cwd()))  # where `python:my_module:load` is looked for first, as `python -m` does
    try:
        return command.run(parser, parser.parse_args(_config_as_option(parser, rest)))
    except ArgumentError as error:
        quotes = "\nin a YAML file, put it in quotes" if "Expected a <class 'str'>" in str(error) else ""
        print(
            f"sparserefine {name}: {error}{quotes}\n`sparserefine {name} --help` lists what is known", file=sys.stderr
        )
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("sparserefine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError, TypeError) as error:
        # What this package raises says what was seen, what was expected and the cure; a traceback would hide it.
        print(f"sparserefine {name}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: sparserefine [--version] COMMAND ...\n\n"
        "High-resolution segmentation at low-resolution cost, for the model you already trained.\n\n"
        + "\n".join(lines)
        + "\n\n`sparserefine COMMAND --help` tells the arguments of a command."
    )


def _config_as_option(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """``train CONFIG.yaml`` is ``train --config CONFIG.yaml``, where the command has a configuration."""
    takes_config = any("--config" in action.option_strings for action in parser._actions)
    if takes_config and arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments


def _add_config(parser: ArgumentParser) -> None:
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    from sparserefine.training.config import Config

    parser.usage = f"{parser.prog} CONFIG.yaml [options] [--a.b value ...]"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; also taken as the first argument")
    parser.add_class_arguments(Config)


def _config(parser: ArgumentParser, arguments: Namespace) -> Config:
    from sparserefine.training.config import Config

    values = parser.instantiate(arguments)
    return Config(**{name: values[name] for name in Config.__dataclass_fields__})


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")


def _add_refiner(parser: ArgumentParser) -> None:
    parser.add_argument("--refiner", required=True, help="folder or hub id of a refiner, or demo: the embedded one")
    parser.add_argument("--engine", default="auto", help="what executes the sparse network; see `sparserefine info`")
    parser.add_argument(
        "--threshold", type=float, help="entropy in nats above which a pixel is refined, not the stored"
    )
    parser.add_argument("--budget", type=int, help="most sites of an image, not the stored")
    _add_device(parser)


def _add_precision(parser: ArgumentParser) -> None:
    parser.add_argument("--precision", default="float32", help="of a GPU: float32, float16, bfloat16 (autocast)")


def _refiner(arguments: Namespace, **options: Any) -> SparseRefiner:
    from sparserefine.machine.device import device_named
    from sparserefine.refiner import SparseRefiner
    from sparserefine.stages.selector import Selector
    from sparserefine.studies.demo import demo_refiner_folder

    folder = demo_refiner_folder() if arguments.refiner == "demo" else arguments.refiner
    refiner = SparseRefiner.from_pretrained(folder, engine=arguments.engine, **options)
    if arguments.threshold is not None or arguments.budget is not None:
        stored = refiner.selector
        refiner.selector = Selector(
            stored.threshold if arguments.threshold is None else arguments.threshold,
            stored.budget if arguments.budget is None else arguments.budget,
        )
        refiner.selector.check(len(refiner.classes))
    device = device_named(arguments.device)
    if refiner.base.config.runtime is not None and device.type != "cpu":
        raise ValueError(f"runtime {refiner.base.config.runtime} runs on the CPU, device is {device}; add --device cpu")
    return refiner.to(device)


def _add_base(parser: ArgumentParser) -> None:
    """For commands that take the base as the refiner names it, not from a configuration."""
    parser.add_argument("--trust_base", action="store_true", help="allow a base that runs code (python:...)")
    parser.add_argument(
        "--runtime", choices=("onnxruntime", "openvino"), help="what runs the base on the CPU, not torch"
    )


def _add_logits(parser: ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace stored logits of another base")
    _add_device(parser)


def _run_logits(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.machine.device import device_named
    from sparserefine.training.logits import store_logits

    config = _config(parser, arguments)
    report = store_logits(config, device=device_named(arguments.device), overwrite=arguments.overwrite)
    print(f"{report.computed} stored in {config.logits.folder}, {report.present} were there")
    return 0


def _add_train(parser: ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from last.ckpt in --out")


def _run_train(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.training.loop import train

    print(f"best refiner: {train(_config(parser, arguments), resume=arguments.resume)}")
    return 0


def _add_evaluate(parser: ArgumentParser) -> None:
    _add_config(parser)
    _add_refiner(parser)
    _add_precision(parser)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="which split of the data")
    parser.add_argument("--dense", help="another base to compare with, by name, at --dense_ratio of the size")
    parser.add_argument("--dense_class_map", help="its class map; a base of the same kind has the configuration's")
    parser.add_argument("--dense_ratio", type=float, default=1.0, help="input size of --dense relative to the image")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each image; times are medians")
    parser.add_argument("--json", help="also write the figures to this file")


def _run_evaluate(parser: ArgumentParser, arguments: Namespace) -> int:
    from dataclasses import asdict, replace

    from tqdm import tqdm

    from sparserefine.bases.load import load_base
    from sparserefine.files.whole import written_whole
    from sparserefine.machine.device import check_precision, device_named, on_gpu_in
    from sparserefine.studies.evaluate import evaluate

    config, device = _config(parser, arguments), device_named(arguments.device)
    check_precision(arguments.precision, device)
    data = config.data.read(getattr(config.data, arguments.split))
    refiner = _refiner(arguments, base=load_base(config.base, data.classes))
    if refiner.selector != config.selector:
        used = f"threshold {refiner.selector.threshold}, budget {refiner.selector.budget}"
        print(f"selector: {used} (not the configuration's; --threshold and --budget choose)", file=sys.stderr)
    dense = None
    if arguments.dense:
        dense_config = replace(config.base, name=arguments.dense, ratio=arguments.dense_ratio, size=None)
        if arguments.dense.partition(":")[0] != config.base.name.partition(":")[0]:  # what its files say is right
            dense_config = replace(dense_config, mean=None, std=None, outputs=None, class_map=None)
        if arguments.dense_class_map:
            dense_config = replace(dense_config, class_map=arguments.dense_class_map)
        dense = load_base(dense_config, data.classes).to(device)
    images = (data.read(index) for index in tqdm(range(len(data)), desc=arguments.split, unit="image"))
    with on_gpu_in(arguments.precision, device):
        result = evaluate(refiner, images, dense=dense, boundary_px=config.boundary_px, repeats=arguments.repeats)
    print(result.table())
    if arguments.json:
        with written_whole(arguments.json) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0


def _add_benchmark(parser: ArgumentParser) -> None:
    bases = "comma-separated: hrnet_w48, segformer_b5, ... with random weights, or any base as unet:FILE; NAME@HxW "
    parser.add_argument("--bases", required=True, help=bases + "gives one its own coarse size")
    parser.add_argument("--size", default="1024x2048", help="height x width of the image in pixels")
    parser.add_argument("--coarse", help="size of the base's low-resolution input; by default half of --size")
    parser.add_argument("--plans", default="paper,slim16", help="extractors: paper, slim, slim16")
    parser.add_argument("--densities", help="of synthetic masks; without --masks 0.05,0.1,0.2,0.3; 1: all pixels")
    parser.add_argument("--masks", nargs="+", default=[], help="image files; what is not black is a site")
    parser.add_argument("--runtimes", default="torch", help="of the base: torch, onnxruntime, openvino")
    parser.add_argument("--classes", type=int, default=19, help="of models with random weights")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as torch uses")
    parser.add_argument(
        "--precision", default="float32", help="of the base, on a GPU of all: float32, float16, bfloat16"
    )
    _add_device(parser)
    parser.add_argument("--engine", default="auto", help="what executes the sparse network; see `sparserefine info`")
    parser.add_argument("--graph", action="store_true", help="all after the base as one CUDA graph")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of everything; times are medians")
    parser.add_argument("--json", help="also write the records to this file, after each base")
    parser.add_argument("--plot", help="also draw them: a .png, .svg or .pdf file")


def _run_benchmark(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.studies.benchmark.measure import benchmark
    from sparserefine.studies.benchmark.records import Report, Settings, parse_base, parse_density, parse_size
    from sparserefine.studies.benchmark.report import check_outputs, header, model_table, plot, summary, write_records

    def parts(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    settings = Settings(
        bases=tuple(map(parse_base, parts(arguments.bases))),
        size=parse_size(arguments.size),
        coarse=None if arguments.coarse is None else parse_size(arguments.coarse, "coarse size"),
        plans=parts(arguments.plans),
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


def _add_predict(parser: ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="image files, folders, or glob patterns in quotes")
    _add_refiner(parser)
    _add_precision(parser)
    parser.add_argument("--out", required=True, help="folder of the label images (index PNG)")
    parser.add_argument("--overlay", action="store_true", help="also write the labels drawn over the image")
    parser.add_argument("--overwrite", action="store_true", help="replace label images that are there already")
    _add_base(parser)


def _run_predict(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.inference.predict import predict
    from sparserefine.machine.device import check_precision, device_named, on_gpu_in

    device = device_named(arguments.device)
    check_precision(arguments.precision, device)
    refiner, out = _refiner(arguments, trust_base=arguments.trust_base, runtime=arguments.runtime), arguments.out
    with on_gpu_in(arguments.precision, device):
        report = predict(arguments.inputs, refiner, out, overlay=arguments.overlay, overwrite=arguments.overwrite)
    for failure in report.failures:
        print(f"{failure.name}: {failure.reason}", file=sys.stderr)
    print(report.summary())
    return EXIT_FAILED if report.failures else 0


def _add_calibrate(parser: ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="a few typical image files, or folders of them")
    _add_refiner(parser)
    parser.add_argument("--out", required=True, help="folder of the calibrated refiner; not the one of --refiner")
    _add_base(parser)


def _run_calibrate(parser: ArgumentParser, arguments: Namespace) -> int:
    from tqdm import tqdm

    from sparserefine.files.images import IMAGE_SUFFIXES, read_image

    refiner, out = _refiner(arguments, trust_base=arguments.trust_base, runtime=arguments.runtime), Path(arguments.out)
    if out.resolve() == Path(arguments.refiner).resolve():
        raise ValueError(f"--out {out} is the folder of --refiner; give another one, the refiner stays as it is")
    files: list[Path] = []
    for given in map(Path, arguments.inputs):
        inside = sorted(f for f in given.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES) if given.is_dir() else [given]
        files += inside
    if not files:
        raise ValueError(
            f"no image in {', '.join(arguments.inputs)}; expected {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    device = next(refiner.extractor.parameters()).device
    count = refiner.quantize(read_image(file).to(device) for file in tqdm(files, desc="calibrate", unit="image"))
    refiner.save_pretrained(out)
    print(f"calibrated on {count} images, stored in {out}; --engine cpu-int8 runs it in 8 bits")
    return 0


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the pictures and demo.json")
    _add_device(parser)


def _run_demo(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.machine.device import device_named
    from sparserefine.studies.demo import demo

    print(demo(arguments.out, device=device_named(arguments.device)))
    return 0


def _run_info(parser: ArgumentParser, arguments: Namespace) -> int:
    from sparserefine.commands.info import info_text

    print(info_text())
    return 0


COMMANDS = {
    "demo": Command("Shows the method on an embedded 8-megapixel photograph.", _add_demo, _run_demo),
    "predict": Command("Labels images with a stored refiner.", _add_predict, _run_predict),
    "logits": Command("Stores the base's coarse logits for training.", _add_logits, _run_logits),
    "train": Command("Trains a refiner for a frozen base.", _add_train, _run_train),
    "evaluate": Command("Scores coarse, refined, oracle and dense predictions.", _add_evaluate, _run_evaluate),
    "benchmark": Command("Times dense, coarse and refined predictions of models.", _add_benchmark, _run_benchmark),
    "calibrate": Command("Measures activations for 8-bit arithmetic on the CPU.", _add_calibrate, _run_calibrate),
    "info": Command("Versions, devices and engines.", lambda parser: None, _run_info),
}
