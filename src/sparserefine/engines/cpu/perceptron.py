"""A perceptron with its gradients, compiled; :func:`sparserefine.stages.perceptron.column_perceptron` is the same."""

from __future__ import annotations

from ctypes import POINTER, c_int64
from typing import Any

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, load, pointer
from sparserefine.sparse.interface import Perceptron


def perceptron(library: Library, x: Tensor, weights: Perceptron) -> Tensor:
    """``w2 relu(w1 x + b1) + b2`` of the columns of ``x``, with gradients.

    Args:
        library: the compiled kernels.
        x: ``float32 [I, N]``.
        weights: ``float32``, of shapes that fit.

    Returns:
        ``float32 [O, N]``.

    Raises:
        ValueError: shapes do not fit.
    """
    w1, b1, w2, b2 = weights
    shapes = [tuple(tensor.shape) for tensor in (x, *weights)]
    if x.dim() != 2 or shapes[1:] != [(len(b1), len(x)), (len(b1),), (len(b2), len(b1)), (len(b2),)]:
        raise ValueError(f"x, w1, b1, w2, b2 are {shapes}, expected [I, N], [H, I], [H], [O, H], [O]")
    result: Tensor = _Perceptron.apply(library.name, x, w1, b1, w2, b2)  # type: ignore[no-untyped-call]  # as torch says
    return result


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(tensor.contiguous() for tensor in weights)
        out = x.new_empty(len(weights[2]), x.shape[1])
        _run(name, x, weights, out=out)
        ctx.name = name
        ctx.save_for_backward(x, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        sums = _run(ctx.name, x, weights, grad=grad, grad_x=grad_x)
        inputs = len(x)
        # [hidden, inputs + 1 + outputs]
        return None, grad_x, sums[:, :inputs], sums[:, inputs], sums[:, inputs + 1 :].t(), grad.sum(1)


def _run(
    name: str,
    x: Tensor,
    weights: Any,
    *,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    grad_x: Tensor | None = None,
) -> Tensor:
    """Writes the results into ``out``, or the gradient into ``grad_x`` and returns the sums."""
    library, threads = load(name), torch.get_num_threads()
    (inputs, n), (outputs, hidden) = x.shape, weights[2].shape
    run, scratch_of = (
        library.function("sr_perceptron", POINTER(c.Perceptron)),
        library.function("sr_perceptron_scratch", c_int64, c_int64),
    )
    parts, lanes = library.function("sr_perceptron_parts")(), library.function("sr_perceptron_lanes")()
    scratch = torch.empty(threads * scratch_of(inputs, outputs))
    sums = torch.zeros(parts if grad is not None else 0, hidden, inputs + 1 + outputs, lanes)
    run(
        c.Perceptron(
            pointer(x, torch.float32, "x"), n, inputs, hidden, outputs,
            *(pointer(tensor, torch.float32, "weight") for tensor in weights),
            pointer(out, torch.float32, "out"), pointer(grad, torch.float32, "grad"),
            pointer(grad_x, torch.float32, "grad_x"), sums.data_ptr(), scratch.data_ptr(), threads,
        )
    )  # fmt: skip
    return sums.sum((0, 3))
