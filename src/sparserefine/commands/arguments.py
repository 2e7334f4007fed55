"""Arguments that several commands share, and what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from sparserefine.refiner import SparseRefiner
    from sparserefine.training.config import Config

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def add_config(parser: ArgumentParser) -> None:
    """``CONFIG.yaml``, and an option for each field of :class:`sparserefine.Config`."""
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    from sparserefine.training.config import Config

    parser.usage = f"{parser.prog} CONFIG.yaml [options] [--a.b value ...]"
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; also taken as the first argument")
    parser.add_class_arguments(Config)


def config_of(arguments: Namespace) -> Config:
    """What :func:`add_config` asked for."""
    from sparserefine.training.config import Config

    return Config(**{name: arguments[name] for name in Config.__dataclass_fields__})


def add_device(parser: ArgumentParser) -> None:
    """``--device``, a name for :func:`sparserefine.machine.device.device_named`."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")


def add_engine(parser: ArgumentParser) -> None:
    """``--engine``, a name for :func:`sparserefine.engines.choose.get_engine`."""
    parser.add_argument("--engine", default="auto", help="what runs the sparse network; `sparserefine info` lists them")


def add_precision(parser: ArgumentParser) -> None:
    """``--precision`` of all on a GPU."""
    parser.add_argument(
        "--precision", default="float32", help="precision on a GPU: float32, float16 or bfloat16 (autocast)"
    )


def add_refiner(parser: ArgumentParser) -> None:
    """``--refiner``, and what may be changed of it."""
    parser.add_argument("--refiner", required=True, help="folder or hub id of a refiner; demo: the embedded one")
    add_engine(parser)
    parser.add_argument(
        "--threshold", type=float, help="entropy in nats above which a pixel is refined; default: the refiner's own"
    )
    parser.add_argument(
        "--budget", type=int, help="maximum number of refined pixels per image; default: the refiner's own"
    )
    add_device(parser)


def add_base(parser: ArgumentParser) -> None:
    """For commands that load the base that the refiner names, not one from a configuration."""
    parser.add_argument("--trust_base", action="store_true", help="allow a base that runs code (python:...)")
    parser.add_argument(
        "--runtime", choices=("onnxruntime", "openvino"), help="run the base with this library on the CPU, not torch"
    )


def refiner_of(arguments: Namespace, **options: Any) -> SparseRefiner:
    """What :func:`add_refiner` asked for, on its device.

    Args:
        arguments: of the command.
        options: for :meth:`SparseRefiner.from_pretrained`.
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
