"""Arguments shared by several commands, and the objects made from them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.bases.base import FrozenBase
    from sparserefine.images.classes import Classes
    from sparserefine.refiner import SparseRefiner
    from sparserefine.training.config import Config
    from sparserefine.training.teacher import Teacher

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
"""What the command line ends with if not 0; documented in docs/getting_started.md."""


def add_config(parser: ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """``CONFIG.yaml``, and an option for each field of :class:`sparserefine.Config`.

    Args:
        parser: of a command.
        without: fields of which the command makes options of its own.
    """
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    from sparserefine.training.config import Config

    parser.usage = f"{parser.prog} CONFIG.yaml [options] [--a.b value ...]"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; may also be given as the first argument")
    parser.add_class_arguments(Config, skip=set(without))


def config_of(arguments: Namespace) -> Config:
    """The configuration that the arguments of :func:`add_config` describe."""
    from sparserefine.training.config import Config

    return Config(**{name: arguments[name] for name in Config.__dataclass_fields__})


def add_split(parser: ArgumentParser, default: str | None, purpose: str) -> None:
    """``--split``, the field of :class:`DataConfig` that names it."""
    from sparserefine.data.readers.config import ROLES

    parser.add_argument("--split", default=default, choices=ROLES, help=f"which part of the data{purpose}")


def add_device(parser: ArgumentParser) -> None:
    """``--device``, a name for :func:`sparserefine.machine.device.device_named`."""
    parser.add_argument(
        "--device", default="auto", help="where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )


def add_engine(parser: ArgumentParser) -> None:
    """``--engine``, a name for :func:`sparserefine.engines.choose.get_engine`."""
    parser.add_argument(
        "--engine", default="auto", help="engine that runs the sparse network; `sparserefine info` lists them"
    )


def add_precision(parser: ArgumentParser) -> None:
    """``--precision``: of base and refiner, on a GPU."""
    parser.add_argument(
        "--precision",
        default="float32",
        help="precision of the computation: float32, or on a GPU also float16 or bfloat16 (by autocast)",
    )


def add_refiner(parser: ArgumentParser) -> None:
    """``--refiner``, and options that override its stored settings."""
    parser.add_argument(
        "--refiner",
        required=True,
        help="trained refiner: a folder, a hub id, or demo (the refiner that comes with the package)",
    )
    add_engine(parser)
    parser.add_argument(
        "--threshold", type=float, help="entropy in nats above which a pixel is refined; default: the refiner's own"
    )
    parser.add_argument(
        "--budget", type=int, help="maximum number of refined pixels per image; default: the refiner's own"
    )
    add_device(parser)


def add_dense(parser: ArgumentParser, default: str) -> None:
    """``--dense``, a dense model to compare with, and its settings."""
    parser.add_argument(
        "--dense",
        help="dense model to compare with: a base's name, as in base.name, or teacher, that of the configuration: the "
        f"base at full resolution unless it says otherwise; default: {default}",
    )
    parser.add_argument(
        "--dense_class_map", help="class map of --dense; default: base.class_map if both names are of the same kind"
    )
    parser.add_argument(
        "--dense_bands",
        nargs="+",
        type=int,
        help="channels of the image that --dense sees, from 1; default: base.bands if both names are of the same kind",
    )
    parser.add_argument(
        "--dense_ratio",
        type=float,
        help="input size of --dense relative to the image; default: 1, full resolution, or the teacher's own",
    )


def dense_of(arguments: Namespace, config: Config, classes: Classes, device: torch.device) -> FrozenBase | Teacher:
    """The dense model that the arguments of :func:`add_dense` describe: the teacher, unless they name another.

    Raises:
        ValueError: ``--dense_ratio`` is out of range, or the model cannot be loaded.
    """
    from sparserefine.training.teacher import Teacher
    from sparserefine.training.teacher_config import TeacherConfig

    its = config.teacher
    if arguments.dense not in (None, "teacher"):
        its = TeacherConfig(arguments.dense, window=its.window, overlap=its.overlap)
    if arguments.dense_ratio is not None:
        if not 0 < arguments.dense_ratio <= 1:
            raise ValueError(f"--dense_ratio = {arguments.dense_ratio}, expected more than 0 and at most 1")
        its = replace(its, ratio=arguments.dense_ratio, size=None)
    if arguments.dense_class_map is not None:
        its = replace(its, class_map=arguments.dense_class_map)
    if arguments.dense_bands is not None:
        its = replace(its, bands=tuple(arguments.dense_bands))
    teacher = Teacher(its, config.base, classes, device, engine=arguments.engine)
    return teacher if its.window else teacher.model


def results_file(given: str | None) -> Path | None:
    """Where ``--json`` asks to write results; refuses what cannot be written before anything long starts.

    Raises:
        ValueError: the path is empty, or a folder.
    """
    from sparserefine.files.regular import given_path
    from sparserefine.files.whole import sweep

    if given is None:
        return None
    path = given_path(given, "--json")
    if path.is_dir():
        raise ValueError(f"--json {path}: is a folder, expected the name of a file")
    sweep(path.parent)
    return path


def add_base(parser: ArgumentParser) -> None:
    """Options for commands that load the base named in the refiner's folder, not in a configuration."""
    parser.add_argument(
        "--trust_base",
        action="store_true",
        help="let the refiner load a base by running Python code (python:...); only for refiners you trust",
    )
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "openvino"),
        help="run the base with this library instead of torch; CPU only",
    )


def add_max_megapixels(parser: ArgumentParser) -> None:
    """``--max_megapixels``, for commands without a configuration, which has ``images.max_megapixels``."""
    parser.add_argument(
        "--max_megapixels", type=float, help="the largest image that is read, in million pixels; default: 2147"
    )


def refiner_of(arguments: Namespace, **options: Any) -> SparseRefiner:
    """The refiner that the arguments of :func:`add_refiner` describe, on the chosen device.

    Args:
        arguments: the command's parsed arguments.
        options: passed to :meth:`SparseRefiner.from_pretrained`.

    Raises:
        ValueError: the base's runtime is for the CPU only and the device is another.
    """
    from sparserefine.machine.device import device_named
    from sparserefine.refiner import SparseRefiner
    from sparserefine.studies.demo import demo_refiner_folder

    folder = demo_refiner_folder() if arguments.refiner == "demo" else arguments.refiner
    refiner = SparseRefiner.from_pretrained(folder, engine=arguments.engine, **options)
    given = {"threshold": arguments.threshold, "budget": arguments.budget}
    refiner.selector = replace(refiner.selector, **{name: x for name, x in given.items() if x is not None})
    device = device_named(arguments.device)
    if refiner.base.config.runtime is not None and device.type != "cpu":
        raise ValueError(f"runtime {refiner.base.config.runtime} runs on the CPU, device is {device}; add --device cpu")
    return refiner.to(device)
