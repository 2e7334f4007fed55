"""A perceptron with one hidden layer on a few numbers at very many sites, for training on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_COLUMNS = 4096
"""Sites at once: hidden values of 1 MiB, which stay in the second-level cache."""


def column_perceptron(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``w2 relu(w1 x + b1) + b2`` of the columns of ``x [I, N]``: ``[O, N]``, in the dtype of ``w1``, autocast or not.

    Columns, because products with a few long rows are several times faster than those with many short ones. Hidden
    values are computed again for the gradients, chunk by chunk, and never written to memory as a whole.

    Args:
        x: ``[I, N]``.
        w1: ``[H, I]``.
        b1: ``[H]``.
        w2: ``[O, H]``.
        b2: ``[O]``.
    """
    with torch.autocast("cpu", enabled=False):
        x = x.to(w1.dtype)
        result: Tensor = _Columns.apply(x, w1, b1, w2, b2)  # type: ignore[no-untyped-call]  # as torch declares it
    return result


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        result = x.new_empty(len(w2), x.shape[1])
        for part, out in zip(_chunks(x), _chunks(result), strict=True):
            out.copy_(torch.addmm(b2[:, None], w2, _hidden(part, w1, b1)))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        grad = grads[0].contiguous()  # the same bits, whatever the layout of the losses
        grad_w1, grad_b1, grad_w2 = (torch.zeros_like(tensor) for tensor in (w1, b1, w2))
        grads_x = []
        with torch.autocast("cpu", enabled=False):
            for part, g in zip(_chunks(x), _chunks(grad), strict=True):
                hidden = _hidden(part, w1, b1)
                grad_w2.addmm_(g, hidden.t())
                # The gradient passes where the hidden value is above 0.
                g_hidden = torch.ops.aten.threshold_backward(w2.t() @ g, hidden, 0)
                grad_w1.addmm_(g_hidden, part.t())
                grad_b1 += g_hidden.sum(1)
                grads_x.append(w1.t() @ g_hidden)  # not written into one tensor: gradients may have gradients
        return torch.cat(grads_x, 1), grad_w1, grad_b1, grad_w2, grad.sum(1)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, _CHUNK_COLUMNS, 1)


def _hidden(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return torch.addmm(b1[:, None], w1, x).relu_()
