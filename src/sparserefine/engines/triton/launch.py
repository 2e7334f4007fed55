"""Launches kernels, and tells on which devices they run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton


@triton.jit
def _nothing() -> None:
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set at import. Kernels then run on the CPU, slowly, for tests."""


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on this device."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    warps: int = 4,
    stages: int = 2,
    **meta: Any,
) -> None:
    """Runs one program of ``kernel`` for each point of ``grid``. Does nothing if the grid is empty.

    Args:
        kernel: a kernel of :mod:`sparserefine.engines.triton.kernels`.
        grid: up to three sizes; the second and third must be below 65536.
        device: device of the tensors in ``arguments``.
        arguments: arguments of the kernel, in order.
        warps: warps per program.
        stages: pipeline stages of loops that load ahead.
        meta: the kernel's compile-time constants.
    """
    if 0 in grid:
        return
    if torch.version.hip:
        stages = min(stages, 2)  # AMD GPUs have only 64 KB of shared memory for them
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Fused multiply-add is the default, but Triton 3.9 warns if it is not set explicitly.
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **meta)


def blocks(count: int, block: int) -> int:
    """Number of blocks of size ``block`` that cover ``count`` items."""
    return -(-count // block)


def allows_tf32() -> bool:
    """Whether the GPU has TF32 and torch's settings allow it for float32 matrix products."""
    if torch.version.hip:
        return False
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # since torch 2.9; once it is set, reading the older setting fails
        return bool(settings.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"
