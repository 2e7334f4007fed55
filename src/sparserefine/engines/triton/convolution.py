"""The primitive on the GPU: its launch with a fused epilogue, and operators of ``torch.library`` with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import convolution as kernels
from sparserefine.engines.triton.launch import allows_tf32, blocks, launch
from sparserefine.sparse.epilogue import Epilogue

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute in; sums are float32."""

_OWN, _TABLE, _OF_FOUR, _OF_NINE, _FEW = range(5)  # READ of the kernel
_FEW_INPUTS = 64  # taps times channels that make one block
_MULTIPROCESSORS = 132  # of an H100 or H200; where there are others, sums are shared out a little too much or little
_SHORTEST_SUM, _MOST_SHARES = 512, 8  # taps times channels of a share, at least; programs of one sum, at most
_FINISHED_ROWS, _FINISHED_COLUMNS = 16, 128  # of a program that adds up shares
_GRADIENT_PROGRAMS = 512  # that the gradient of a weight is spread over: fixed, for bits must not depend on the GPU


@dataclass(frozen=True)
class Order:
    """Outputs of an up-sampling by the parity of their row and column, which tells the taps that each can have.

    Attributes:
        rows: ``int32 [N]``: the rows of parity (even, even) first, then (even, odd), (odd, even), (odd, odd); ascending
            within each.
        counts: ``int32 [4]`` on the device: how many of each.
    """

    rows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Tiling:
    """How one convolution is cut into programs.

    Attributes:
        rows: of the output, a program.
        columns: likewise.
        depth: inputs that are multiplied at once.
        warps: of a program.
        ahead: blocks of inputs and weights that are loaded before they are multiplied.
        shares: programs that each add a part of the taps and channels of the same outputs; a second kernel adds theirs.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    ahead: int
    shares: int = 1

    def stages(self, read: int) -> int:
        """Triton's ``num_stages``: a load whose address is loaded before it takes two stages for each block ahead."""
        return 1 + self.ahead * (1 if read == _OWN else 2)


def tiling(rows: int, c_in: int, c_out: int, dtype: torch.dtype, precision: str, taps: int = 0) -> Tiling:
    """The one for this class of shapes: a fixed table, so that few kernels are ever compiled and no call measures.

    Larger blocks read inputs and weights less often; where too few of them would be left for the GPU, they are halved,
    or share their sums out: those of ``taps`` taps that a table lists. 0: of any other kind, which are short.
    """
    columns = min(128, _power_of_two(c_out))
    if dtype == torch.float32 and precision == "ieee":  # on the ordinary units, which need a register for each element
        return Tiling(64, min(64, columns), min(32, _power_of_two(c_in)), 4, 2)
    depth = min(128 // dtype.itemsize, _power_of_two(c_in))  # 128 bytes: a line of the cache
    if dtype != torch.float32 and columns == 128:
        found = _shared(rows, c_in, c_out, taps)
        if found is not None:
            return found
    if columns == 128 and blocks(rows, 128) * blocks(c_out, 128) >= 512:
        return Tiling(128, 128, depth, 8, 3)
    if columns == 128 or dtype == torch.float32:
        return Tiling(64, columns, depth, 4, 2)
    return Tiling(128, columns, depth, 4, 2)


def _shared(rows: int, c_in: int, c_out: int, taps: int) -> Tiling | None:
    """The tiling of half precision where blocks are few and sums are long: the deep levels of a network.

    There the second-level cache bounds the time, so blocks are as large as they can be, and as many programs as an H100
    runs at once (one of 256 columns, two of 128 on each multiprocessor) share the sums out.
    """
    wide = c_out >= 256
    programs, fit = blocks(rows, 128) * blocks(c_out, 256 if wide else 128), _MULTIPROCESSORS * (1 if wide else 2)
    # Rounded up from three quarters on: a few programs too many cost less than many multiprocessors idle.
    shares = min(_MOST_SHARES, taps * c_in // _SHORTEST_SUM, int(fit / max(1, programs) + 0.25))
    return Tiling(128, 256 if wide else 128, 64, 8, 2, shares) if programs and shares > 1 else None


def _power_of_two(count: int) -> int:
    """The next one; 16 at least, which matrix units need."""
    return max(16, 1 << max(0, count - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """``tf32`` or ``ieee``, as torch's settings have it for products of float32 matrices."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def laid_out(weight: Tensor) -> Tensor:
    """``[T, C_in, C_out]`` in the memory layout that loads fastest: matrix units want TF32 along the inputs."""
    if precision_of(weight.dtype) == "tf32":
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight if 1 in (weight.stride(1), weight.stride(2)) else weight.contiguous()


def convolve(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    n_out: int,
    *,
    table: Tensor | None = None,
    order: Order | None = None,
    count: Tensor | None = None,
) -> None:
    """``v[n] = sum_t x[table[n, t]] @ weight[t]``, stored as ``epilogue`` says.

    Args:
        x: ``[N_in, C_in]``, columns contiguous.
        weight: ``[T, C_in, C_out]`` of the same dtype, see :func:`laid_out`.
        epilogue: where results go.
        n_out: N, rows of the results.
        table: ``int32 [N, T]``; ``None``: row n reads row n.
        order: of the outputs, where their parity says which taps reach them.
        count: ``int32 [1]``, outputs in use; ``None``: all.
    """
    taps, c_in, c_out = weight.shape
    precision = precision_of(x.dtype)
    read = _OWN
    if order is not None:
        read = _OF_NINE if taps == 9 else _OF_FOUR
    elif table is not None:
        read = _FEW if taps * c_in <= _FEW_INPUTS else _TABLE
    tiles = tiling(n_out, c_in, c_out, x.dtype, precision, taps if read == _TABLE else 0)
    depth = _power_of_two(taps * c_in) if read == _FEW else tiles.depth
    row_blocks = blocks(n_out, tiles.rows) + (3 if order is not None else 0)
    shares = tiles.shares
    partial = torch.empty(shares, n_out, c_out, dtype=torch.float32, device=x.device) if shares > 1 else None
    direct = epilogue if partial is None else Epilogue(raw=partial[0])
    launch(
        kernels.convolve,
        (row_blocks * blocks(c_out, tiles.columns) if n_out else 0, shares),
        x.device,
        x,
        weight,
        x if table is None else table,
        x if order is None else order.rows,
        x if order is None else order.counts,
        x if count is None else count,
        *_tensors_of(direct, x),
        n_out,
        x.shape[0],
        c_in,
        c_out,
        taps,
        _in_use(direct),
        x.stride(0),
        *weight.stride(),
        *((0, 0) if table is None else table.stride()),
        *_row_strides(direct),
        n_out * c_out,
        warps=tiles.warps,
        stages=tiles.stages(read),
        READ=read,
        PADDED=count is not None,
        SHARED=partial is not None,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=depth,
        PRECISION=precision,
    )
    if partial is not None:
        columns = min(_FINISHED_COLUMNS, _power_of_two(c_out))
        launch(
            kernels.finish,
            (blocks(n_out, _FINISHED_ROWS), blocks(c_out, columns)),
            x.device,
            partial,
            x if count is None else count,
            *_tensors_of(epilogue, x),
            n_out,
            c_out,
            shares,
            _in_use(epilogue),
            n_out * c_out,
            *_row_strides(epilogue),
            PADDED=count is not None,
            ROWS=_FINISHED_ROWS,
            COLUMNS=columns,
        )


def _tensors_of(epilogue: Epilogue, x: Tensor) -> tuple[Tensor, ...]:
    """The epilogue's tensors as kernels take them.

    A pointer must point somewhere, used or not; to another dtype it would make another kernel.
    """
    first, second = (*epilogue.activated, None, None)[:2]
    unused = _unused(x.device)
    return (
        _or(epilogue.residual, x),
        _or(epilogue.bias, unused),
        _or(epilogue.raw, x),
        *(first or (x, unused, unused)),
        *(second or (x, unused, unused)),
    )


def _in_use(epilogue: Epilogue) -> int:
    """The bit mask of the operands that there are."""
    operands = (epilogue.residual, epilogue.bias, epilogue.raw, *(*epilogue.activated, None, None)[:2])
    return sum(1 << bit for bit, operand in enumerate(operands) if operand is not None)


def _row_strides(epilogue: Epilogue) -> Iterator[int]:
    for tensor in (epilogue.residual, epilogue.raw):
        yield 0 if tensor is None else tensor.stride(0)
    for activation in (*epilogue.activated, None, None)[:2]:
        yield 0 if activation is None else activation.out.stride(0)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


@cache
def _unused(device: torch.device) -> Tensor:
    return torch.empty(16, device=device)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("sparserefine::triton_conv", mutates_args=())
def triton_conv(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    parities: Tensor,
    back_table: Tensor,
    back_order: Tensor,
    back_parities: Tensor,
    mirrored: bool,
) -> Tensor:
    """``y[n] = sum_t x[table[n, t]] @ weight[t]``; ``back_*`` is the transposed relation, for the gradients.

    ``order`` and ``parities`` are those of :class:`Order`, or empty.
    """
    y = x.new_empty(table.shape[0], weight.shape[2])
    by_parity = Order(order, parities) if parities.numel() else None
    convolve(_rows_contiguous(x), laid_out(weight), Epilogue(raw=y), len(y), table=table, order=by_parity)
    return y


@triton_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    order: Tensor,
    parities: Tensor,
    back_table: Tensor,
    back_order: Tensor,
    back_parities: Tensor,
    mirrored: bool,
) -> Tensor:
    return x.new_empty(table.shape[0], weight.shape[2])


@torch.library.custom_op("sparserefine::triton_conv_weight", mutates_args=())
def triton_conv_weight(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """Gradient of the weight: ``dW[t] = sum_n outer(x[table[n, t]], grad[n])``, ``[T, C_in, C_out]``."""
    x, grad = _rows_contiguous(x), _rows_contiguous(grad)
    (n_out, taps), c_in, c_out = table.shape, x.shape[1], grad.shape[1]
    rows, columns = min(64, _power_of_two(c_in)), min(64, _power_of_two(c_out))
    depth = 64 if x.dtype != torch.float32 else 32
    tiles = blocks(c_in, rows) * blocks(c_out, columns)
    parts = max(1, min(blocks(_GRADIENT_PROGRAMS, tiles * taps), blocks(n_out, depth)))
    chunk = blocks(blocks(n_out, parts), depth) * depth
    partial = torch.empty(parts, taps, c_in, c_out, dtype=torch.float32, device=x.device)
    launch(
        kernels.weight_gradient,
        (tiles, taps, parts),
        x.device,
        x,
        grad,
        table,
        partial,
        n_out,
        x.shape[0],
        c_in,
        c_out,
        taps,
        chunk,
        x.stride(0),
        grad.stride(0),
        *table.stride(),
        stages=5,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        PRECISION=precision_of(x.dtype),
    )
    return partial.sum(0).to(x.dtype)


@triton_conv_weight.register_fake
def _(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(table.shape[1], x.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mirrored = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, table, order, parities, back_table, back_order, back_parities = ctx.saved_tensors
    forth, back = (table, order, parities), (back_table, back_order, back_parities)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        flipped = weight.flip(0) if ctx.mirrored else weight
        grad_x = triton_conv(grad, flipped.transpose(1, 2), *back, *forth, ctx.mirrored)
    if ctx.needs_input_grad[1]:
        if parities.numel():  # seen from the inputs, which have all taps, it is the gradient of the transposed weight
            grad_weight = triton_conv_weight(grad, x, back_table).transpose(1, 2)
        else:
            grad_weight = triton_conv_weight(x, grad, table)
    return grad_x, grad_weight, *(None,) * 7


triton_conv.register_autograd(_backward, setup_context=_save)
