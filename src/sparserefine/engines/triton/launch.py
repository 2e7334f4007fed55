"""How kernels are launched, and where they can be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton


@triton.jit
def _nothing() -> None:
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
"""TRITON_INTERPRET=1 was set when this was imported: kernels run on the CPU, slowly, for tests."""


def runs_on(device: torch.device) -> bool:
    """Whether kernels take tensors of this device."""
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
    """Runs ``kernel`` once for each place of ``grid``; an empty grid is no launch.

    Args:
        kernel: of :mod:`sparserefine.engines.triton.kernels`.
        grid: up to three numbers; the second and third must stay under 65536.
        device: of the tensors among ``arguments``.
        arguments: of the kernel, in order.
        warps: of each program.
        stages: of loops whose loads are issued ahead.
        meta: the kernel's compile-time constants.
    """
    if 0 in grid:
        return
    if torch.version.hip:
        stages = min(stages, 2)  # AMD's GPUs have 64 KB for them
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # What Triton 3.9 takes as a default it also warns about: a product and a sum are one rounding.
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **meta)


def blocks(count: int, block: int) -> int:
    """How many blocks of that size hold ``count``."""
    return -(-count // block)


def allows_tf32() -> bool:
    """Whether the GPU has TF32 and torch's settings allow it in products of float32 matrices."""
    if torch.version.hip:
        return False
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # torch 2.9; once it has been set, the older setting may not be read
        return bool(settings.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"
