"""``sparserefine info``: what is installed, what this machine offers, which engine will run. Bug reports start here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

import sparserefine
from sparserefine.bases.load import BASE_NAMES
from sparserefine.engines.choose import engine_report

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_OPTIONAL = {  # package: the extra that brings it, and what for
    "lightning": ("train", "training"),
    "huggingface_hub": ("hub", "refiners by hub id"),
    "transformers": ("hf", "bases hf:..."),
    "onnxruntime": ("onnx", "bases onnx:..."),
    "onnxscript": ("onnxruntime", "base.runtime onnxruntime"),
    "openvino": ("openvino", "base.runtime openvino"),
    "matplotlib": ("plot", "benchmark --plot"),
}
_BRINGS_ITS_OWN = {"torchvision": "torchvision:", "timm": "timm:", "segmentation-models-pytorch": "smp:"}


def add_arguments(parser: ArgumentParser) -> None:
    """None."""


def run(arguments: Namespace) -> int:
    """Prints :func:`info_text`."""
    print(info_text())
    return 0


def info() -> dict[str, str]:
    """Versions, devices, engines and bases, in the order in which :func:`info_text` prints them.

    Optional packages are looked up, not imported.
    """
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    result = {
        "sparserefine": sparserefine.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {cuda}",
        "devices": ", ".join(_devices()),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    for package in ("numpy", "pillow", "safetensors"):
        result[package] = _version(package) or "not installed, though sparserefine needs it"
    for package, (extra, use) in _OPTIONAL.items():
        missing = f"not installed; `pip install 'sparserefine[{extra}]'` brings it, for {use}"
        result[package] = _version(package) or missing
    for package, kind in _BRINGS_ITS_OWN.items():
        result[package] = _version(package) or f"not installed; for bases {kind}..., in the version that fits torch"
    for engine, words in engine_report().items():
        result[f"engine {engine}"] = words
    result["bases"] = ", ".join(BASE_NAMES)
    return result


def info_text() -> str:
    """:func:`info`, one aligned line for each entry."""
    entries = info()
    width = max(map(len, entries))
    return "\n".join(f"{name:{width}}  {value}" for name, value in entries.items())


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
