"""Devices by name, and the precision that a GPU computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("float32", "float16", "bfloat16")


def device_named(name: str) -> torch.device:
    """``auto`` (a GPU if there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...

    Raises:
        ValueError: no such device here.
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
    """Refuses what is not one of :data:`PRECISIONS`, and half precision on other devices than GPUs, which gain nothing.

    Raises:
        ValueError: see above.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not known; choose from {', '.join(PRECISIONS)}")
    if name != "float32" and device.type != "cuda":
        raise ValueError(f"precision {name} is for GPUs, device is {device}; leave it at float32")


def on_gpu_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to one of :data:`PRECISIONS` on a GPU; on other devices, and for float32, nothing changes."""
    if precision == "float32" or device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
