"""The primitive on compiled kernels, with gradients, as ``torch.library`` operators like those of the torch engine.

In float32, or in bfloat16 with sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.engines.cpu.kernels import Kernels, kernels
from sparserefine.sparse.epilogue import Epilogue

Relation = tuple[Tensor, Tensor, list[int]]
"""Table, rows and counts of a convolution.

If counts are empty, the table is ``[N_out, T]`` and rows are unused. Otherwise it is a transposed convolution: rows are
the outputs, grouped by parity, counts are the sizes of the groups, and the table is flat, one ``[count, taps]`` per
group after the other (``Between.parities``).
"""


def parity_taps(taps: int) -> tuple[list[int], ...]:
    """The taps of a transposed convolution that reach sites of each parity.

    In order (row, column): (even, even), (even, odd), (odd, even), (odd, odd).
    """
    return ([0, 2, 6, 8], [1, 7], [3, 5], [4]) if taps == 9 else ([0], [1], [2], [3])


@torch.library.custom_op("sparserefine::cpu_conv", mutates_args=())
def cpu_conv(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    rows: Tensor,
    counts: list[int],
    back_table: Tensor,
    back_rows: Tensor,
    back_counts: list[int],
    mirrored: bool,
    instruction_set: str,
) -> Tensor:
    """``y[n] = sum_t x[table[n, t]] @ weight[t]``. ``back_*`` describe the transposed relation, for the gradients."""
    kernel, x, weight = kernels(instruction_set), x.contiguous(), weight.contiguous()
    n = len(rows) if counts else len(table)
    y = x.new_empty(n, weight.shape[2])
    if not counts:
        _convolve(kernel, x, table, weight, y, None)
        return y
    first_row = first = 0
    for count, taps in zip(counts, parity_taps(weight.shape[0]), strict=True):
        part = table[first : first + count * len(taps)].view(count, len(taps))
        _convolve(kernel, x, part, weight[taps].contiguous(), y, rows[first_row : first_row + count])
        first_row, first = first_row + count, first + count * len(taps)
    return y


def _convolve(kernel: Kernels, x: Tensor, table: Tensor, weight: Tensor, y: Tensor, rows: Tensor | None) -> None:
    """Writes the outputs ``rows``, or all, into ``y``. Processors without products of bfloat16 compute in float32."""
    if x.dtype == torch.bfloat16 and kernel.has_bf16:
        if x.shape[1] % 2:  # channels are multiplied in pairs
            x, weight = F.pad(x, (0, 1)), F.pad(weight, (0, 0, 0, 1))
        kernel.convolve_bf16(x, table, weight, y, rows=rows)
        return
    sums = y if y.dtype == torch.float32 else torch.empty(y.shape)
    kernel.convolve(x.float(), table, kernel.pack(weight.float()), Epilogue(raw=sums), len(y), rows=rows)
    if sums is not y:
        written = slice(None) if rows is None else rows.long()
        y[written] = sums[written].to(y.dtype)


@cpu_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    rows: Tensor,
    counts: list[int],
    back_table: Tensor,
    back_rows: Tensor,
    back_counts: list[int],
    mirrored: bool,
    instruction_set: str,
) -> Tensor:
    return x.new_empty((rows if counts else table).shape[0], weight.shape[2])


@torch.library.custom_op("sparserefine::cpu_conv_weight", mutates_args=())
def cpu_conv_weight(x: Tensor, grad: Tensor, table: Tensor, instruction_set: str) -> Tensor:
    """Gradient of the weight: ``dW[t] = sum_n outer(x[table[n, t]], grad[n])``, ``[T, C_in, C_out]``."""
    kernel, dtype, x, grad = kernels(instruction_set), x.dtype, x.contiguous(), grad.contiguous()
    if dtype == torch.bfloat16 and not kernel.has_bf16:
        x, grad = x.float(), grad.float()
    return kernel.weight_gradient(x, grad, table).to(dtype)


@cpu_conv_weight.register_fake
def _(x: Tensor, grad: Tensor, table: Tensor, instruction_set: str) -> Tensor:
    return x.new_empty(table.shape[1], x.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, table, rows, ctx.counts, back_table, back_rows, ctx.back_counts, ctx.mirrored, ctx.isa = inputs
    ctx.save_for_backward(x, weight, table, rows, back_table, back_rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, table, rows, back_table, back_rows = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        flipped = weight.flip(0) if ctx.mirrored else weight
        forward, transposed = (table, rows, ctx.counts), (back_table, back_rows, ctx.back_counts)
        grad_x = cpu_conv(grad, flipped.transpose(1, 2), *transposed, *forward, ctx.mirrored, ctx.isa)
    if ctx.needs_input_grad[1]:
        if ctx.counts:  # the transposed relation has all its taps
            grad_weight = cpu_conv_weight(grad, x, back_table, ctx.isa).transpose(1, 2)
        else:
            grad_weight = cpu_conv_weight(x, grad, table, ctx.isa)
    return grad_x, grad_weight, *(None,) * 8


cpu_conv.register_autograd(_backward, setup_context=_save)
