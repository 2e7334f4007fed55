"""Shared by the tests: tolerances, site patterns, and the dense rules that the sparse network is judged by.

What judges sparserefine stands on torch.nn.functional alone; of the package only the engines under test are looked up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparserefine.sparse import Engine

TOLERANCE = {  # (rtol, atol) for values of size about 1; the reference is computed in float64
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]

CPU_ENGINES = ("cpu-avx512", "cpu-avx2", "cpu-generic")
"""The CPU engine on every instruction set; those that this machine cannot run are skipped, see :func:`engine_of`."""
TRITON_ENGINES = ("triton", pytest.param("triton-gpu", marks=pytest.mark.gpu))
"""Kernels for GPUs, interpreted on the CPU, and on a GPU: where the tensors of a test lie, says :func:`device_of`."""
KERNEL_ENGINES = (*CPU_ENGINES, *TRITON_ENGINES)
ENGINES = ("torch", *KERNEL_ENGINES)

PATTERNS = ("none", "one", "border", "all", "random")
FEW_PATTERNS = [p if p in ("none", "random") else pytest.param(p, marks=pytest.mark.slow) for p in PATTERNS]
"""For what sees tables only, and takes its time."""
SIZES = [pytest.param(size, id="{}x{}".format(*size)) for size in ((1, 1), (1, 7), (2, 2), (3, 3), (6, 8), (9, 7))]
KERNEL = {"paper": 3, "cell": 2}
"""Width of the convolution between two levels."""


def on_each(
    small: Iterable[tuple[Any, ...]], large: Iterable[tuple[Any, ...]], late: Iterable[tuple[Any, ...]] = ()
) -> list[Any]:
    """Parameters ``(engine, *case)`` of all engines with kernels.

    Args:
        small: cases for each of them.
        large: cases for those that are compiled.
        late: more small ones, which are slow where kernels are interpreted.
    """
    small, late = list(small), list(late)
    larger = [case for case in large if case not in small]
    found = slow_if_interpreted(KERNEL_ENGINES, small + late, small)
    compiled = slow_if_interpreted([engine for engine in KERNEL_ENGINES if engine != "triton"], larger, ())
    return found + compiled


def _words(*case: Any) -> str:
    """The name of parameters; a size is ``HxW``."""
    return "-".join("x".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in case)


def slow_if_interpreted(
    engines: Iterable[Any], cases: Iterable[tuple[Any, ...]], fast: Iterable[tuple[Any, ...]]
) -> list[Any]:
    """Parameters ``(engine, *case)`` for each of both; where kernels are interpreted, those not ``fast`` are slow."""
    cases, fast, found = list(cases), set(fast), []
    assert fast <= set(cases)
    for engine in engines:
        name, marks = (engine, ()) if isinstance(engine, str) else (engine.values[0], engine.marks)
        for case in cases:
            late = [pytest.mark.slow] if name == "triton" and case not in fast else []
            found.append(pytest.param(name, *case, marks=[*marks, *late], id=_words(name, *case)))
    return found


CLASSIFIER = "decode_head.conv_seg.weight"
"""The classifier of mmsegmentation's models."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within the tolerance of ``dtype``, by default of the result's own; shapes equal, nothing NaN."""
    rtol, atol = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def mask_of(pattern: str, size: tuple[int, int], batch: int = 1) -> Tensor:
    """``bool [batch, H, W]``; of three images or more, the second one is empty."""
    height, width = size
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    if pattern == "one":
        mask[:, height // 2, width // 2] = True
    elif pattern == "border":
        mask[:, [0, -1]] = True
        mask[:, :, [0, -1]] = True
    elif pattern == "all":
        mask[:] = True
    elif pattern == "random":
        mask = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(1)) < 0.4
    if batch >= 3:
        mask[1] = False
    return mask


def on_grid(rows: Tensor, mask: Tensor) -> Tensor:
    """``[N, C]`` in row-major order of the N true pixels of ``mask`` -> ``[B, C, H, W]``, zero elsewhere."""
    b, r, c = mask.nonzero(as_tuple=True)
    image = rows.new_zeros(*mask.shape, rows.shape[1])
    return image.index_put((b, r, c), rows).permute(0, 3, 1, 2)


def at_sites(image: Tensor, mask: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[N, C]``."""
    return image.permute(0, 2, 3, 1)[mask]


def coarser_mask(mask: Tensor, down: str) -> Tensor:
    """Active cells of the next level: those with a site in their window, which is what max-pooling computes."""
    b, h, w = mask.shape
    if down == "paper":
        if min(h, w) < 3:
            return mask.new_zeros(b, max(0, (h - 3) // 2 + 1), max(0, (w - 3) // 2 + 1))
        return F.max_pool2d(mask[:, None].float(), 3, stride=2)[:, 0] > 0
    return F.max_pool2d(mask[:, None].float(), 2, stride=2, ceil_mode=True)[:, 0] > 0


def dense_around(image: Tensor, weight: Tensor) -> Tensor:
    """3x3 convolution, padding 1. ``weight [9, C_in, C_out]``, taps row-major."""
    # One pixel too much right and bottom, cut off again: images of no pixels are no special case, here and below.
    return F.conv2d(F.pad(image, (1, 2, 1, 2)), _kernel(weight))[..., : image.shape[2], : image.shape[3]]


def dense_down(image: Tensor, weight: Tensor, down: str) -> Tensor:
    """``paper``: 3x3, stride 2, no padding. ``cell``: 2x2, stride 2, zeros added right and bottom to an even size."""
    h, w = image.shape[2:]
    if down == "cell":
        return F.conv2d(F.pad(image, (0, w % 2, 0, h % 2)), _kernel(weight), stride=2)
    full = F.conv2d(F.pad(image, (0, 3, 0, 3)), _kernel(weight), stride=2)
    return full[..., : max(0, (h - 3) // 2 + 1), : max(0, (w - 3) // 2 + 1)]


def dense_up(image: Tensor, weight: Tensor, down: str, size: tuple[int, int]) -> Tensor:
    """Transposed convolution, stride 2, cut to ``size``; pixels that it does not reach are zero."""
    k = KERNEL[down]
    kernel = weight.view(k, k, *weight.shape[1:]).permute(2, 3, 0, 1).contiguous()
    return F.conv_transpose2d(F.pad(image, (0, 1, 0, 1)), kernel, stride=2)[..., : size[0], : size[1]]


def _kernel(weight: Tensor) -> Tensor:
    k = {9: 3, 4: 2}[weight.shape[0]]
    return weight.view(k, k, *weight.shape[1:]).permute(3, 2, 0, 1).contiguous()


def shared(path: str) -> Path:
    """A file or folder of the material that lies beside the project; skips the test where it is not there."""
    found = Path(__file__).resolve().parents[2] / "shared" / path
    if not found.exists():
        pytest.skip(f"needs {found}")
    return found


def of_mmsegmentation(name: str, num_classes: int = 19) -> dict[str, Tensor]:
    """mmsegmentation's state dict of a model; each tensor is one number, repeated, so that files are small."""
    with np.load(Path(__file__).parent / "data" / "parity" / f"{name}.npz") as stored:
        shapes: dict[str, list[int]] = json.loads(str(stored["shapes"]))
    shapes.pop("decode_head.hamburger.ham.bases", None)  # of SegNeXt: in the reference, but in no file
    for key in (CLASSIFIER, "decode_head.conv_seg.bias"):
        shapes[key][0] = num_classes
    return {key: torch.tensor(1 / (i + 1)).expand(shape) for i, (key, shape) in enumerate(shapes.items())}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def numbers(model: nn.Module) -> set[float]:
    """The values of the weights, each tensor of which is one number."""
    return {value.view(-1)[0].item() for value in model.parameters()}


def needs_triton(*, gpu: bool = False) -> None:
    """Skips the test where kernels for GPUs do not run: interpreted on the CPU, or on a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if gpu and (interpreted or not torch.cuda.is_available()):
        pytest.skip("no GPU" if not torch.cuda.is_available() else "kernels are interpreted; run `make test-gpu`")
    if not gpu and not interpreted:
        pytest.skip("kernels are compiled, not interpreted; run `make test`")
    if interpreted:
        _mend_interpreter()


@cache
def _mend_interpreter() -> None:
    """Triton 3.9's multiplies the bits of bfloat16 as if they were integers; and it takes twice the time it needs."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot

    # Each sum of integers is computed a second time, for an assertion that is dropped, as nothing is debugged.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    # The functions of triton.language are exchanged, and back, at every launch; nothing here wants them back.
    exchange, exchanged = interpreter._patch_lang, set()

    def exchange_once(function: Any) -> SimpleNamespace:
        found = frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)
        if found not in exchanged:
            exchanged.add(found)
            exchange(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = exchange_once


def device_of(engine: str) -> torch.device:
    """Where the tensors lie that one of :data:`ENGINES` is tested with; skips the test where there is no GPU for it."""
    if engine == "triton-gpu":
        needs_triton(gpu=True)
        return torch.device("cuda")
    return torch.device("cpu")


@cache
def engine_of(name: str) -> Engine:
    """One of :data:`ENGINES`; skips the test where this machine cannot run it."""
    from sparserefine.engines.choose import get_engine
    from sparserefine.engines.cpu.engine import CpuEngine
    from sparserefine.sparse.interface import Unavailable

    kind, _, variant = name.partition("-")
    if kind == "torch":
        return get_engine("torch")
    if kind == "triton":
        needs_triton(gpu=variant == "gpu")
        from sparserefine.engines.triton.engine import TritonEngine

        return TritonEngine()
    try:
        return CpuEngine(variant)
    except Unavailable as reason:
        pytest.skip(f"engine {name}: {reason}")
