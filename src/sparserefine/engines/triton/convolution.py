"""The primitive on the GPU: the launch with a fused epilogue, and ``torch.library`` operators with gradients."""

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
"""Dtypes of features and weights; the kernels accumulate in float32."""

_OWN_ROW, _TABLE, _PARITY_2X2, _PARITY_3X3, _ONE_BLOCK = range(5)  # READ of the kernel
_FEW_INPUTS = 64  # most taps times channels that fit one block
_MULTIPROCESSORS = 132  # of an H100 or H200; with other numbers, the number of shares is slightly off the best
_SHORTEST_SUM, _MOST_SHARES = 512, 8  # least taps times channels of a share; most programs per sum
_FINISHED_ROWS, _FINISHED_COLUMNS = 16, 128  # block of a program that adds up shares
_GRADIENT_PROGRAMS = 512  # of one weight gradient; fixed, so that the result has the same bits on every GPU


@dataclass(frozen=True)
class Order:
    """The outputs of an up-sampling, grouped by the parity of their image row and column, which decides their taps.

    Attributes:
        rows: ``int32 [N]``: output rows of parity (even, even), then (even, odd), (odd, even), (odd, odd); ascending in
            each group.
        counts: ``int32 [4]`` on the device: size of each group.
    """

    rows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Tiling:
    """How one convolution is divided into programs.

    Attributes:
        rows: output rows per program.
        columns: output channels per program.
        depth: input channels multiplied at once.
        warps: warps per program.
        ahead: blocks of inputs and weights loaded before they are multiplied.
        shares: programs among which the taps and channels of one sum are divided; a second kernel adds up their
            results.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    ahead: int
    shares: int = 1

    def stages(self, read: int) -> int:
        """Triton's ``num_stages``: 1 + one per block loaded ahead, or + two if its address must be loaded first."""
        return 1 + self.ahead * (1 if read == _OWN_ROW else 2)


def tiling(rows: int, c_in: int, c_out: int, dtype: torch.dtype, precision: str, taps: int = 0) -> Tiling:
    """The tiling for a class of shapes. Choices are fixed, so few kernels are compiled and no call is spent on tuning.

    Larger blocks read inputs and weights less often. If they were too few to fill the GPU, blocks are halved or their
    sums are divided among programs. Only sums over a table are divided; ``taps`` is the number of its taps, or 0 for
    all other convolutions, whose sums are short.
    """
    columns = min(128, _power_of_two(c_out))
    if dtype == torch.float32 and precision == "ieee":  # no matrix units: one register per element
        return Tiling(64, min(64, columns), min(32, _power_of_two(c_in)), 4, 2)
    depth = min(128 // dtype.itemsize, _power_of_two(c_in))  # 128 bytes: one cache line
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
    """The tiling in half precision for few blocks with long sums, as in the deep levels; ``None`` if it does not apply.

    The second-level cache is the bottleneck there. Blocks are therefore as large as possible, and each sum is divided
    so that the programs just fill an H100 (per multiprocessor one program of 256 columns, or two of 128).
    """
    wide = c_out >= 256
    programs, fit = blocks(rows, 128) * blocks(c_out, 256 if wide else 128), _MULTIPROCESSORS * (1 if wide else 2)
    # Round up from 0.75: a few programs too many cost less than many idle multiprocessors.
    shares = min(_MOST_SHARES, taps * c_in // _SHORTEST_SUM, int(fit / max(1, programs) + 0.25))
    return Tiling(128, 256 if wide else 128, 64, 8, 2, shares) if programs and shares > 1 else None


def _power_of_two(count: int) -> int:
    """The next power of two, at least 16, the minimum of matrix units."""
    return max(16, 1 << max(0, count - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """``tf32`` or ``ieee``, following torch's setting for float32 matrix products."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def laid_out(weight: Tensor) -> Tensor:
    """``[T, C_in, C_out]`` in the layout that loads fastest. For TF32, input channels must be contiguous."""
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
    """Computes ``v[n] = sum_t x[table[n, t]] @ weight[t]`` and stores it through ``epilogue``.

    Args:
        x: ``[N_in, C_in]``, columns contiguous.
        weight: ``[T, C_in, C_out]`` of the same dtype, see :func:`laid_out`.
        epilogue: what to add to the results and where to store them.
        n_out: N, number of output rows.
        table: ``int32 [N, T]``; ``None``: row n reads row n.
        order: outputs grouped by parity, for up-sampling; ``None``: every output may use every tap.
        count: ``int32 [1]`` on the device, number of outputs in use; ``None``: all.
    """
    taps, c_in, c_out = weight.shape
    precision = precision_of(x.dtype)
    read = _OWN_ROW
    if order is not None:
        read = _PARITY_3X3 if taps == 9 else _PARITY_2X2
    elif table is not None:
        read = _ONE_BLOCK if taps * c_in <= _FEW_INPUTS else _TABLE
    tiles = tiling(n_out, c_in, c_out, x.dtype, precision, taps if read == _TABLE else 0)
    depth = _power_of_two(taps * c_in) if read == _ONE_BLOCK else tiles.depth
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
    """The epilogue's tensors as kernel arguments.

    Unused pointers get a placeholder of the usual dtype, because another dtype would compile another kernel.
    """
    first, second = (*epilogue.activated, None, None)[:2]
    unused = _placeholder(x.device)
    return (
        _or_placeholder(epilogue.residual, x),
        _or_placeholder(epilogue.bias, unused),
        _or_placeholder(epilogue.raw, x),
        *(first or (x, unused, unused)),
        *(second or (x, unused, unused)),
    )


def _in_use(epilogue: Epilogue) -> int:
    """Bit mask of the optional operands in use."""
    operands = (epilogue.residual, epilogue.bias, epilogue.raw, *(*epilogue.activated, None, None)[:2])
    return sum(1 << bit for bit, operand in enumerate(operands) if operand is not None)


def _row_strides(epilogue: Epilogue) -> Iterator[int]:
    for tensor in (epilogue.residual, epilogue.raw):
        yield 0 if tensor is None else tensor.stride(0)
    for activation in (*epilogue.activated, None, None)[:2]:
        yield 0 if activation is None else activation.out.stride(0)


def _or_placeholder(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


@cache
def _placeholder(device: torch.device) -> Tensor:
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
    """``y[n] = sum_t x[table[n, t]] @ weight[t]``. ``back_*`` describe the transposed relation, for the gradients.

    ``order`` and ``parities`` are the rows and counts of an :class:`Order`, or empty.
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
    forward, transposed = (table, order, parities), (back_table, back_order, back_parities)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        flipped = weight.flip(0) if ctx.mirrored else weight
        grad_x = triton_conv(grad, flipped.transpose(1, 2), *transposed, *forward, ctx.mirrored)
    if ctx.needs_input_grad[1]:
        if parities.numel():  # the transposed relation has all its taps
            grad_weight = triton_conv_weight(grad, x, back_table).transpose(1, 2)
        else:
            grad_weight = triton_conv_weight(x, grad, table)
    return grad_x, grad_weight, *(None,) * 7


triton_conv.register_autograd(_backward, setup_context=_save)
