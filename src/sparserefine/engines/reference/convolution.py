"""The reference convolution: a chunked gather-GEMM in plain torch, on any device, and its gradients.

The primitive is registered with ``torch.library``, so torch.compile and torch.export see one opaque operator instead of
a Python loop over chunks. Its gradients are computed by the same primitive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparserefine.sparse.plan import Stencil

_CHUNK_BYTES = {"cpu": 2 << 20, "other": 64 << 20}  # CPU: the gathered rows fit the second-level cache


def _chunks(table: Tensor, channels: int, itemsize: int) -> list[tuple[int, int]]:
    n, taps = table.shape
    budget = _CHUNK_BYTES.get(table.device.type, _CHUNK_BYTES["other"])
    rows = max(512, budget // max(1, taps * channels * itemsize))
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def _with_zero_row(x: Tensor) -> Tensor:
    """Appends a zero row, which missing neighbours (table entry N) read. This avoids a branch."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


@torch.library.custom_op("sparserefine::gather_gemm", mutates_args=())
def gather_gemm(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    reverse: Tensor,
    mirrored: bool,
    reverse_single: Tensor | None = None,
) -> Tensor:
    """``y[n] = sum_t x[table[n, t]] @ weight[t]``. Arguments after ``table`` are for the gradient only, see Stencil."""
    taps, c_in, c_out = weight.shape
    y = x.new_empty(table.shape[0], c_out)
    padded, matrix, flat = _with_zero_row(x), weight.reshape(taps * c_in, c_out), table.reshape(-1)
    chunks = _chunks(table, c_in, x.element_size())
    gathered = x.new_empty(max((e - s for s, e in chunks), default=0) * taps, c_in)
    for start, end in chunks:
        rows = gathered[: (end - start) * taps]
        torch.index_select(padded, 0, flat[start * taps : end * taps], out=rows)
        torch.mm(rows.view(end - start, taps * c_in), matrix, out=y[start:end])
    return y


@gather_gemm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    reverse: Tensor,
    mirrored: bool,
    reverse_single: Tensor | None = None,
) -> Tensor:
    return x.new_empty(table.shape[0], weight.shape[2])


@torch.library.custom_op("sparserefine::gather_gemm_weight", mutates_args=())
def gather_gemm_weight(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Gradient of the weight: ``dW[t] = sum_n outer(x[table[n, t]], grad[n])``, ``[T, C_in, C_out]``."""
    taps, c_in, c_out = table.shape[1], x.shape[1], grad.shape[1]
    # A sum over all sites in half precision would lose small terms.
    total = torch.zeros(taps * c_in, c_out, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    padded, flat = _with_zero_row(x), table.reshape(-1)
    for start, end in _chunks(table, c_in, x.element_size()):
        rows = padded.index_select(0, flat[start * taps : end * taps])
        partial = rows.view(end - start, taps * c_in).t()
        if total.dtype == x.dtype:
            total.addmm_(partial, grad[start:end])
        else:
            total += partial @ grad[start:end]
    return total.view(taps, c_in, c_out).to(x.dtype)


@gather_gemm_weight.register_fake
def _(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(table.shape[1], x.shape[1], grad.shape[1])


@torch.library.custom_op("sparserefine::gemm_gather", mutates_args=())
def gemm_gather(x: Tensor, weight: Tensor, single: Tensor, table: Tensor, reverse: Tensor) -> Tensor:
    """:func:`gather_gemm` for outputs that read one input each: computes T products per input, selects one per output.

    Gathering first would multiply T - 1 zero rows per output. ``table`` and ``reverse`` are for the gradient only, see
    Stencil.
    """
    taps, c_in, c_out = weight.shape
    products = x @ weight.transpose(0, 1).reshape(c_in, taps * c_out)
    return products.view(-1, c_out).index_select(0, single)


@gemm_gather.register_fake
def _(x: Tensor, weight: Tensor, single: Tensor, table: Tensor, reverse: Tensor) -> Tensor:
    return x.new_empty(single.shape[0], weight.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool, Tensor | None], output: Tensor) -> None:
    x, weight, table, reverse, mirrored, reverse_single = inputs
    ctx.save_for_backward(x, weight, table, reverse, reverse_single)
    ctx.mirrored = mirrored


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    x, weight, table, reverse, reverse_single = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        flipped = weight.flip(0) if ctx.mirrored else weight
        transposed = flipped.transpose(1, 2).contiguous()
        if reverse_single is not None:
            grad_x = gemm_gather(grad, transposed, reverse_single, reverse, table)
        else:
            grad_x = gather_gemm(grad, transposed, reverse, table, ctx.mirrored)
    if ctx.needs_input_grad[1]:
        grad_weight = gather_gemm_weight(x, grad, table)
    return grad_x, grad_weight, None, None, None, None


def _save_single(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_single(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x, weight, single, table, reverse = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = gather_gemm(grad, weight.transpose(1, 2).contiguous(), reverse, table, False, single)
    if ctx.needs_input_grad[1]:
        # The transposed relation has all its taps, so compute the gradient of the transposed weight and transpose it.
        grad_weight = gather_gemm_weight(grad, x, reverse).transpose(1, 2)
    return grad_x, grad_weight, None, None, None


gather_gemm.register_autograd(_backward, setup_context=_save)
gemm_gather.register_autograd(_backward_single, setup_context=_save_single)


def convolve(x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
    """The reference for :meth:`Stencil.conv`. Needs only the tables, so it works with the stencils of every engine."""
    y: Tensor
    if stencil.single is not None:
        y = gemm_gather(x, weight, stencil.single, stencil.table, stencil.reverse)
    else:
        y = gather_gemm(x, weight, stencil.table, stencil.reverse, stencil.mirrored, stencil.reverse_single)
    return y
