"""The compiled kernels as Python methods, which check their arguments before each call."""

from __future__ import annotations

from ctypes import POINTER, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, load, pointer
from sparserefine.sparse.epilogue import Epilogue


@dataclass(frozen=True)
class Tiles:
    """Tiles of a Winograd convolution.

    Attributes:
        table: ``int32 [tiles, 36]``: rows of the 6x6 cells of each tile.
        quarters: ``int32``, ``4 tile + quarter`` of each non-empty quarter; ``None`` if not requested.
    """

    table: Tensor
    quarters: Tensor | None


@dataclass(frozen=True)
class Packed:
    """Weights in the layout of a kernel.

    Attributes:
        data: ``float32``, in the kernel's own order.
        taps: T; 9 for a Winograd convolution.
        c_in: input channels.
        c_out: output channels.
        tile: 4 or 2 for Winograd's F(4x4) or F(2x2), 0 for the indirect GEMM.
        instruction_set: name of the instruction set that the layout is for.
    """

    data: Tensor
    taps: int
    c_in: int
    c_out: int
    tile: int
    instruction_set: str


@dataclass(frozen=True)
class Int8Packed:
    """8-bit weights in the layout of the kernel.

    Attributes:
        data: ``int8``, in the kernel's own order.
        scale: ``float32 [C_out]``: factor from integer sums to outputs.
        taps: T.
        c_in: input channels.
        c_out: output channels.
    """

    data: Tensor
    scale: Tensor
    taps: int
    c_in: int
    c_out: int


class Kernels:
    """The entry points of one loaded object."""

    def __init__(self, library: Library) -> None:
        self.library, i, p = library, c_int64, c_void_p
        function = library.function
        self._packed_floats = function("sr_packed_floats", i, i, i)
        self._pack = function("sr_pack", p, i, i, i, p)
        self._convolution_scratch = function("sr_convolution_scratch", i)
        self._convolve = function("sr_convolve", POINTER(c.Convolution))
        self._packed_winograd_floats = function("sr_packed_winograd_floats", i, i, i)
        self._pack_winograd = function("sr_pack_winograd", p, i, i, i, p, i)
        self._winograd_scratch = function("sr_winograd_scratch", i, i, i, i, i)
        self._winograd = function("sr_winograd", POINTER(c.Winograd))
        self._gradient_scratch = function("sr_weight_gradient_scratch", i)
        self._gradient = function("sr_weight_gradient", POINTER(c.WeightGradient))
        self.has_int8 = library.lanes == 16 and bool(function("sr_int8_runs")())
        if self.has_int8:
            self._packed_int8_bytes = function("sr_packed_int8_bytes", i, i, i)
            self._pack_int8 = function("sr_pack_int8", p, i, i, i, p)
            self._convolve_int8 = function("sr_convolve_int8", POINTER(c.Int8Convolution))
        self.has_bf16 = bool(function("sr_bf16_runs")())
        if self.has_bf16:
            self._packed_bf16 = function("sr_packed_bf16", i, i, i)
            self._pack_bf16 = function("sr_pack_bf16", p, i, i, i, p)
            self._convolve_bf16 = function("sr_convolve_bf16", POINTER(c.Bf16Convolution))
            self._bf16_gradient_scratch = function("sr_bf16_gradient_scratch", i, i)
            self._gradient_bf16 = function("sr_weight_gradient_bf16", POINTER(c.Bf16Gradient))
        g = POINTER(c.Grid)
        self.grid_words = function("sr_grid_words", i, i, i)
        self.grid_from_sites = function("sr_grid_from_sites", g, p, i)
        self.grid_coarser = function("sr_grid_coarser", g, g, i, i)
        self.grid_sites = function("sr_grid_sites", g, p, i)
        self.grid_around = function("sr_grid_around", g, i, p, i)
        self.grid_children = function("sr_grid_children", g, g, i, i, p, i)
        self.grid_parents = function("sr_grid_parents", g, g, i, i, p, i)
        self.grid_parities = function("sr_grid_parities", g, g, i, i, p, p, p, p, i)
        self.grid_tiles = function("sr_grid_tiles", g, i, p, p, p, p, i)

    def pack(self, weight: Tensor, tile: int = 0) -> Packed:
        """Packs ``float32 [T, C_in, C_out]`` for :meth:`convolve`, or with ``tile`` 4 or 2 for :meth:`winograd`.

        Raises:
            ValueError: the weight has another shape, dtype or device, or the tile is not 0, 2 or 4.
        """
        if weight.dim() != 3 or min(weight.shape) < 1 or (tile and weight.shape[0] != 9) or tile not in (0, 2, 4):
            raise ValueError(
                f"weight is {tuple(weight.shape)}, tile {tile}; expected [T, C_in, C_out], T = 9 for tile 4 or 2"
            )
        taps, c_in, c_out = weight.shape
        source = pointer(weight, torch.float32, "weight")
        if tile:
            data = torch.empty(self._packed_winograd_floats(tile, c_in, c_out))
            self._pack_winograd(source, tile, c_in, c_out, data.data_ptr(), torch.get_num_threads())
        else:
            data = torch.empty(self._packed_floats(taps, c_in, c_out))
            self._pack(source, taps, c_in, c_out, data.data_ptr())
        return Packed(data, taps, c_in, c_out, tile, self.library.name)

    def scratch_floats(self, packed: Packed, count: int) -> int:
        """Scratch memory [floats] of a convolution over ``count`` rows, tiles or quarters."""
        threads = torch.get_num_threads()
        if packed.tile:
            return threads * int(self._winograd_scratch(packed.tile, count, packed.c_in, packed.c_out, threads))
        return threads * int(self._convolution_scratch(packed.taps))

    def convolve(
        self,
        x: Tensor,
        table: Tensor | None,
        packed: Packed,
        epilogue: Epilogue,
        num_outputs: int,
        *,
        rows: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> None:
        """Indirect GEMM: ``v[n] = sum_t x[table[n, t]] @ W[t]``, finished by ``epilogue``.

        Args:
            x: ``float32 [N_in, C_in]``, with any row stride.
            table: ``int32 [n, T]``, ``N_in`` where there is no neighbour; ``None``: row n reads row n.
            packed: weights from :meth:`pack` with ``tile`` 0.
            epilogue: what to add to the results and where to store them.
            num_outputs: number of rows of the output tensors.
            rows: ``int32 [n]``, output row of each result; ``None``: row n.
            scratch: at least :meth:`scratch_floats`; ``None``: allocated.

        Raises:
            IndexError: ``table`` or ``rows`` has entries out of range.
        """
        n = len(x) if table is None else table.shape[0]
        if table is not None and tuple(table.shape) != (n, packed.taps):
            raise ValueError(f"table is {tuple(table.shape)}, expected [n, {packed.taps}] for these weights")
        if packed.tile or (table is None and packed.taps != 1):
            raise ValueError(
                f"weights of {packed.taps} taps packed for tile {packed.tile}; expected tile 0, and 1 tap without table"
            )
        if (rows is None and n != num_outputs) or (rows is not None and tuple(rows.shape) != (n,)):
            raise ValueError(
                f"rows are {None if rows is None else tuple(rows.shape)}, {num_outputs} outputs; expected [{n}]"
            )
        threads = torch.get_num_threads()
        zeros, scratch = self._check(x, packed, epilogue, num_outputs, self.scratch_floats(packed, n), scratch)
        call = c.Convolution(
            x.data_ptr(), x.stride(0), len(x), packed.c_in, pointer(table, torch.int32, "table"), n, packed.taps,
            packed.data.data_ptr(), packed.c_out, pointer(rows, torch.int32, "rows"), num_outputs, _bind(epilogue),
            zeros.data_ptr(), scratch.data_ptr(), threads,
        )  # fmt: skip
        _raise_on_error(self._convolve(call), "table")

    def winograd(
        self, x: Tensor, tiles: Tiles, packed: Packed, epilogue: Epilogue, *, scratch: Tensor | None = None
    ) -> None:
        """Submanifold 3x3 convolution on tiles: F(4x4, 3x3), or F(2x2, 3x3) on their quarters if ``packed.tile`` is 2.

        Raises:
            IndexError: a table has entries out of range.
        """
        if tiles.table.dim() != 2 or tiles.table.shape[1] != 36:
            raise ValueError(f"tiles are {tuple(tiles.table.shape)}, expected [tiles, 36]")
        if packed.tile not in (2, 4) or (packed.tile == 2 and tiles.quarters is None):
            raise ValueError(f"weights packed for tile {packed.tile}; expected 4, or 2 with quarters")
        quarters = tiles.quarters if packed.tile == 2 else None
        count = len(tiles.table) if quarters is None else len(quarters)
        threads = torch.get_num_threads()
        zeros, scratch = self._check(x, packed, epilogue, len(x), self.scratch_floats(packed, count), scratch)
        call = c.Winograd(
            x.data_ptr(), x.stride(0), len(x), packed.c_in, pointer(tiles.table, torch.int32, "tiles"),
            pointer(quarters, torch.int32, "quarters"), len(tiles.table), count, packed.tile, packed.data.data_ptr(),
            packed.c_out, _bind(epilogue), zeros.data_ptr(), scratch.data_ptr(), threads,
        )  # fmt: skip
        _raise_on_error(self._winograd(call), "tiles")

    def pack_int8(self, weight: Tensor, scale: Tensor) -> Int8Packed:
        """Packs ``int8 [T, C_in, C_out]`` and the outputs' scale ``float32 [C_out]`` for :meth:`convolve_int8`.

        Raises:
            ValueError: shapes do not fit, or this processor lacks the instructions.
        """
        if not self.has_int8:
            raise ValueError(f"{self.library.name} on this processor has no 8-bit products (AVX-512 VNNI)")
        if weight.dim() != 3 or not 1 <= weight.shape[0] <= 9 or min(weight.shape) < 1:
            raise ValueError(f"weight is {tuple(weight.shape)}, expected [T, C_in, C_out] with T from 1 to 9")
        taps, c_in, c_out = weight.shape
        if scale.shape != (c_out,):
            raise ValueError(f"scale is {tuple(scale.shape)}, expected [{c_out}]")
        pointer(scale, torch.float32, "scale")
        data = torch.empty(self._packed_int8_bytes(taps, c_in, c_out), dtype=torch.int8)
        self._pack_int8(pointer(weight, torch.int8, "weight"), taps, c_in, c_out, data.data_ptr())
        return Int8Packed(data, scale, taps, c_in, c_out)

    def convolve_int8(
        self,
        x: Tensor,
        table: Tensor,
        packed: Int8Packed,
        epilogue: Epilogue,
        num_outputs: int,
        *,
        rows: Tensor | None = None,
    ) -> None:
        """:meth:`convolve` in 8 bits: ``v[n] = scale * sum_t x[table[n, t]] @ W[t]``.

        Args:
            x: ``uint8 [N_in + 1, C_in]``, rows padded to a multiple of 4 bytes; the last row must be zero.
            table: ``int32 [n, T]``, ``N_in`` where there is no neighbour.
            packed: weights from :meth:`pack_int8`.
            epilogue: what to add to the results and where to store them.
            num_outputs: number of rows of the output tensors.
            rows: ``int32 [n]``, output row of each result; ``None``: row n.

        Raises:
            IndexError: ``table`` or ``rows`` has entries out of range.
        """
        n = len(table)
        if x.dim() != 2 or x.dtype != torch.uint8 or x.shape[1] != packed.c_in or not len(x) or x.device.type != "cpu":
            raise ValueError(
                f"features are {x.dtype} {tuple(x.shape)}, expected uint8 [N + 1, {packed.c_in}] on the CPU"
            )
        padded = -(-packed.c_in // 4) * 4
        if (x.stride(1) != 1 and packed.c_in > 1) or x.stride(0) < padded or len(x) * x.stride(0) >= 1 << 32:
            raise ValueError(
                f"features have strides {x.stride()}, expected rows of at least {padded} bytes, contiguous channels, "
                "and less than 4 GiB in total; refine fewer pixels at a time (set a budget), or use engine 'cpu'"
            )
        if x.untyped_storage().nbytes() < x.storage_offset() + (len(x) - 1) * x.stride(0) + padded:
            raise ValueError(
                f"the last row of the features is shorter than {padded} bytes; expected rows padded to a multiple of 4"
            )
        if tuple(table.shape) != (n, packed.taps):
            raise ValueError(f"table is {tuple(table.shape)}, expected [n, {packed.taps}] for these weights")
        if (rows is None and n != num_outputs) or (rows is not None and tuple(rows.shape) != (n,)):
            raise ValueError(
                f"rows are {None if rows is None else tuple(rows.shape)}, {num_outputs} outputs; expected [{n}]"
            )
        _check_epilogue(epilogue, num_outputs, packed.c_out)
        call = c.Int8Convolution(
            x.data_ptr(), x.stride(0), len(x) - 1, packed.c_in, pointer(table, torch.int32, "table"), n, packed.taps,
            packed.data.data_ptr(), packed.c_out, pointer(rows, torch.int32, "rows"), num_outputs,
            packed.scale.data_ptr(), _bind(epilogue), torch.get_num_threads(),
        )  # fmt: skip
        _raise_on_error(self._convolve_int8(call), "table")

    def convolve_bf16(
        self, x: Tensor, table: Tensor, weight: Tensor, out: Tensor, *, rows: Tensor | None = None
    ) -> None:
        """:meth:`convolve` in bfloat16, summed in float32, without epilogue: ``out[n] = sum_t x[table[n, t]] @ W[t]``.

        Args:
            x: ``bfloat16 [N_in, C_in]``, C_in even.
            table: ``int32 [n, T]``, ``N_in`` where there is no neighbour.
            weight: ``bfloat16 [T, C_in, C_out]``, T at most 9.
            out: ``bfloat16 [N_out, C_out]``.
            rows: ``int32 [n]``, output row of each result; ``None``: row n.

        Raises:
            IndexError: ``table`` or ``rows`` has entries out of range.
        """
        taps, c_in, c_out = weight.shape
        shapes = [tuple(tensor.shape) for tensor in (x, table, weight, out)]
        fits = x.dim() == out.dim() == table.dim() == 2 and x.shape[1] == c_in and table.shape[1] == taps
        if not self.has_bf16 or not fits or c_in % 2 or not 1 <= taps <= 9 or out.shape[1] != c_out:
            raise ValueError(
                f"x, table, weight, out are {shapes}; expected [N_in, C_in], [n, T], [T, C_in, C_out], [N_out, C_out] "
                "with C_in even and T from 1 to 9, on a processor with AVX512-BF16"
            )
        n = len(table)
        if (rows is None and n != len(out)) or (rows is not None and tuple(rows.shape) != (n,)):
            raise ValueError(
                f"rows are {None if rows is None else tuple(rows.shape)}, {len(out)} outputs; expected [{n}]"
            )
        half = torch.bfloat16
        packed = torch.empty(self._packed_bf16(taps, c_in, c_out), dtype=half)
        self._pack_bf16(pointer(weight, half, "weight"), taps, c_in, c_out, packed.data_ptr())
        zeros = torch.zeros(c_in, dtype=half)
        call = c.Bf16Convolution(
            pointer(x, half, "x"), c_in, len(x), c_in, pointer(table, torch.int32, "table"), n, taps,
            packed.data_ptr(), c_out, pointer(rows, torch.int32, "rows"), len(out), pointer(out, half, "out"),
            zeros.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _raise_on_error(self._convolve_bf16(call), "table")

    def weight_gradient(self, x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
        """``dW[t] = sum_n outer(x[table[n, t]], grad[n])``: ``float32 [T, C_in, C_out]``.

        ``x`` and ``grad`` are both float32, or both bfloat16 where :attr:`has_bf16`.

        Raises:
            IndexError: the table has entries out of range.
        """
        if x.dim() != 2 or grad.dim() != 2 or table.dim() != 2 or len(grad) != len(table):
            shapes = [tuple(t.shape) for t in (x, grad, table)]
            raise ValueError(f"x, grad, table are {shapes}; expected [N_in, C_in], [n, C_out], [n, T]")
        result = torch.empty(table.shape[1], x.shape[1], grad.shape[1])
        threads, half = torch.get_num_threads(), self.has_bf16 and x.dtype == torch.bfloat16
        dtype = torch.bfloat16 if half else torch.float32
        floats = self._bf16_gradient_scratch(*result.shape[1:]) if half else self._gradient_scratch(grad.shape[1])
        scratch = torch.empty(threads * floats)
        call = (c.Bf16Gradient if half else c.WeightGradient)(
            pointer(x, dtype, "x"), len(x), x.shape[1], pointer(grad, dtype, "grad"), grad.shape[1],
            pointer(table, torch.int32, "table"), len(table), table.shape[1], result.data_ptr(), scratch.data_ptr(),
            threads,
        )  # fmt: skip
        _raise_on_error((self._gradient_bf16 if half else self._gradient)(call), "table")
        return result

    def _check(
        self, x: Tensor, packed: Packed, epilogue: Epilogue, num_outputs: int, floats: int, scratch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checks operands that could be accessed out of bounds. Returns the row of zeros and the scratch memory."""
        if packed.instruction_set != self.library.name:
            raise ValueError(f"weights packed for {packed.instruction_set}, expected {self.library.name}")
        _check_rows(x, "features", None, packed.c_in)
        _check_epilogue(epilogue, num_outputs, packed.c_out)
        if scratch is None:
            scratch = torch.empty(floats)
        elif scratch.numel() < floats:
            raise ValueError(f"scratch of {scratch.numel()} floats, expected at least {floats}")
        pointer(scratch, torch.float32, "scratch")
        return torch.zeros(packed.c_in), scratch


def _check_epilogue(epilogue: Epilogue, n: int, channels: int) -> None:
    for name, tensor in (("residual", epilogue.residual), ("raw", epilogue.raw)):
        if tensor is not None:
            _check_rows(tensor, name, n, channels)
    vectors = [("bias", epilogue.bias)]
    for activation in epilogue.activated:
        _check_rows(activation.out, "activated", n, channels, (torch.float32, torch.uint8))
        vectors += [("scale", activation.scale), ("shift", activation.shift)]
    for name, vector in vectors:
        if vector is not None and (vector.shape != (channels,) or vector.dtype != torch.float32):
            raise ValueError(f"{name} is {vector.dtype} {tuple(vector.shape)}, expected float32 [{channels}]")


def _check_rows(
    tensor: Tensor, name: str, n: int | None, channels: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    fits = tensor.dim() == 2 and tensor.shape[1] == channels and (n is None or len(tensor) == n)
    kind = tensor.dtype in dtypes and tensor.device.type == "cpu"
    if not fits or not kind or (tensor.stride(1) != 1 and channels > 1 and tensor.numel()):
        wanted = f"[{'N' if n is None else n}, {channels}]"
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()} on {tensor.device}; "
            f"expected float32 {wanted} on the CPU, contiguous channels"
        )


def _bind(epilogue: Epilogue) -> c.Epilogue:
    bound = c.Epilogue()
    if epilogue.residual is not None:
        bound.residual, bound.residual_stride = epilogue.residual.data_ptr(), epilogue.residual.stride(0)
    if epilogue.raw is not None:
        bound.raw, bound.raw_stride = epilogue.raw.data_ptr(), epilogue.raw.stride(0)
    bound.bias = pointer(epilogue.bias, torch.float32, "bias")
    if len(epilogue.activated) > 2:
        raise ValueError(f"{len(epilogue.activated)} activated outputs, expected at most 2")
    for target, activation in zip(bound.activated, epilogue.activated, strict=False):
        target.out, target.stride = activation.out.data_ptr(), activation.out.stride(0)
        target.scale = pointer(activation.scale, torch.float32, "scale")
        target.shift = pointer(activation.shift, torch.float32, "shift")
        target.quantised = activation.out.dtype == torch.uint8
    return bound


def _raise_on_error(status: int, what: str) -> None:
    if status:
        raise IndexError(
            f"{what} has entries out of range; expected 0..N, N for a missing neighbour: was it made for other sites?"
        )


@lru_cache
def kernels(name: str | None = None) -> Kernels:
    """The kernels of the best instruction set, or of ``name``; see :mod:`sparserefine.engines.cpu.native.library`."""
    return Kernels(load(name))
