"""Choice of the device and of the precision a GPU computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("float32", "float16", "bfloat16")


def device_named(name: str) -> torch.device:
    """The device called ``name``.

    Args:
        name: ``auto`` (a GPU if there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...

    Raises:
        ValueError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r}: not available here ({reason}); try auto or cpu") from error
    return device


def check_precision(name: str, device: torch.device) -> None:
    """Checks that ``name`` is one of :data:`PRECISIONS`, and float32 unless ``device`` is a GPU.

    Other devices gain nothing from half precision.

    Raises:
        ValueError: the precision is unknown, or is for GPUs only.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not known; choose from {', '.join(PRECISIONS)}")
    if name != "float32" and device.type != "cuda":
        raise ValueError(f"precision {name} is for GPUs, device is {device}; use float32")


def gpu_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context with autocast to ``precision``, one of :data:`PRECISIONS`, on a GPU. float32 and the CPU: no effect."""
    if precision == "float32" or device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
