"""``sparserefine info``: installed versions, devices, and which engine will run. Asked for in bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

import sparserefine
from sparserefine.bases.load import BASE_NAMES
from sparserefine.engines.choose import engine_report
from sparserefine.files.text import printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_OPTIONAL = {  # package: (the extra that installs it, what needs it)
    "lightning": ("train", "training"),
    "huggingface_hub": ("hub", "refiners by hub id"),
    "transformers": ("hf", "bases hf:..."),
    "onnxruntime": ("onnx", "bases onnx:..."),
    "onnxscript": ("onnxruntime", "runtime onnxruntime"),
    "openvino": ("openvino", "runtime openvino"),
    "matplotlib": ("plot", "benchmark --plot"),
    "rasterio": ("raster", "images of any bands"),
}
_MODEL_LIBRARIES = {"torchvision": "torchvision:", "timm": "timm:", "segmentation-models-pytorch": "smp:"}


def add_arguments(parser: ArgumentParser) -> None:
    """This command has no arguments."""


def run(arguments: Namespace) -> int:
    """Prints :func:`info_text`."""
    print(info_text())
    return 0


def info() -> dict[str, str]:
    """Versions, devices, engines and bases, in the order of :func:`info_text`.

    Packages are looked up, not imported.
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
        result[package] = _version(package) or f"not installed, but sparserefine needs it; `pip install {package}`"
    for package, (extra, use) in _OPTIONAL.items():
        missing = f"not installed; needed for {use}: `pip install 'sparserefine[{extra}]'`"
        result[package] = _version(package) or missing
    for package, kind in _MODEL_LIBRARIES.items():
        result[package] = (
            _version(package) or f"not installed; needed for bases {kind}...: install the version that fits torch"
        )
    for engine, words in engine_report().items():
        result[f"engine {engine}"] = words
    result["bases"] = ", ".join(BASE_NAMES)
    return result


def info_text() -> str:
    """The entries of :func:`info`, one aligned line each."""
    entries = info()
    width = max(map(len, entries))
    return "\n".join(f"{name:{width}}  {printable(value)}" for name, value in entries.items())


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
