"""A whole sparse U-Net for inference: weights packed once, normalisation, ReLU and residuals fused into epilogues."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from sparserefine.engines.cpu.convolution import parity_taps
from sparserefine.engines.cpu.geometry import Across, Around
from sparserefine.engines.cpu.kernels import Int8Packed, Kernels, Packed, Tiles
from sparserefine.sparse.epilogue import Activation, Epilogue
from sparserefine.sparse.layers import ResidualBlock, SparseBatchNorm, SparseConv
from sparserefine.sparse.plan import Plan
from sparserefine.sparse.quantisation import quantised_weight, step_of
from sparserefine.sparse.unet import SparseUNet

# Channels below which transforming tiles costs more than the multiplications that it saves, and the product of both
# widths above which F(4x4)'s weights, four times the size of the convolution's own, cost more than they save.
_FEWEST_CHANNELS = 8
_MOST_CHANNELS = 1024 * 512


class Scratch:
    """Memory of a network's features: one block for each forward at a time, kept for the next one.

    Fresh memory costs as much time as a convolution: the kernel of the system clears every page of it.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self, floats: int) -> Iterator[Tensor]:
        """``float32 [>= floats]``, nobody else's until the end of the ``with``; then the largest block is kept."""
        with self._lock:
            block = self._idle.pop() if self._idle else None
        if block is None or block.numel() < floats:
            # NumPy asks the system for large pages, torch does not.
            block = torch.from_numpy(np.empty(floats, np.float32))
        try:
            yield block
        finally:
            with self._lock:
                self._idle = [max([block, *self._idle], key=len)]

    def clear(self) -> None:
        """Gives the kept block back to the system."""
        with self._lock:
            self._idle = []


class _Norm:
    """Batch normalisation with running statistics as ``x * scale + shift``, in units of ``step`` if that is given."""

    def __init__(self, norm: nn.Module, step: Tensor | None = None) -> None:
        assert isinstance(norm, SparseBatchNorm)
        scale, shift = norm.folded()
        if step is not None:
            scale, shift = scale / step, shift / step
        self.scale, self.shift = scale.float(), shift.float()

    def into(self, out: Tensor, sites: int, part: slice = slice(None)) -> Activation:
        """An epilogue's output: the activation of some channels, written to the first rows of ``out``."""
        return Activation(out[:sites], self.scale[part], self.shift[part])


class _Block:
    def __init__(self, block: nn.Module, pack: _Pack) -> None:
        assert isinstance(block, ResidualBlock)
        self.norm1, self.norm2 = pack.norm(block.norm1, block.conv1), pack.norm(block.norm2, block.conv2)
        self.conv1, self.conv2 = pack.around(block.conv1), pack.around(block.conv2)
        shortcut = block.shortcut
        self.shortcut = pack.linear(shortcut) if isinstance(shortcut, nn.Linear) else None


class _Pack:
    """Packs layers, in 8 bits if asked for."""

    def __init__(self, kernels: Kernels, *, int8: bool) -> None:
        self.kernels, self.int8 = kernels, int8

    def stem(self, layer: SparseConv) -> Packed:
        return self.kernels.pack(layer.weight.detach().contiguous())

    def linear(self, layer: nn.Linear) -> Packed:
        return self.kernels.pack(layer.weight.detach().t()[None].contiguous())

    def conv(self, layer: nn.Module) -> Packed | Int8Packed:
        assert isinstance(layer, SparseConv)
        return self._taps(layer, [list(range(len(layer.weight)))])[0]

    def up(self, layer: nn.Module) -> list[Packed | Int8Packed]:
        assert isinstance(layer, SparseConv)
        return self._taps(layer, parity_taps(len(layer.weight)))

    def around(self, layer: SparseConv) -> Packed | Int8Packed:
        c_in, c_out = layer.weight.shape[1:]
        if self.int8 or min(c_in, c_out) < _FEWEST_CHANNELS:
            return self.conv(layer)
        return self.kernels.pack(layer.weight.detach().contiguous(), 4 if c_in * c_out <= _MOST_CHANNELS else 2)

    def norm(self, norm: nn.Module, reader: nn.Module) -> _Norm:
        """The normalisation whose activations ``reader`` reads."""
        assert isinstance(reader, SparseConv)
        return _Norm(norm, step_of(reader) if self.int8 else None)

    def _taps(self, layer: SparseConv, groups: Sequence[list[int]]) -> list[Packed | Int8Packed]:
        if self.int8:
            weight, scale = quantised_weight(layer)
            return [self.kernels.pack_int8(weight[taps].contiguous(), scale) for taps in groups]
        weight = layer.weight.detach()
        return [self.kernels.pack(weight[taps].contiguous()) for taps in groups]


class _Level:
    """Buffers of one level, ``[N, C]`` each: raw features, activated ones, and what lies between two convolutions.

    ``skip`` and ``skip_activated`` hold, side by side, the features on the way down and those that come up again.
    """

    def __init__(self, sites: int, channels: int, *, skips: bool, int8: bool) -> None:
        self.sites, self.channels = sites, channels
        whole = [(2 * channels, False), (2 * channels, int8)] if skips else []
        self._kept = [*whole, (channels, int8)]  # widths, and which are of 8 bits
        self._passing = [(channels, False), (channels, int8)]

    def place(self, block: Tensor, start: int) -> int:
        """Lays the buffers out from ``start``; where those of the next level may begin."""
        buffers = []
        for width, int8 in (*self._kept, *self._passing):
            end = start + self._floats(width, int8=int8)
            buffers.append(self._view(block[start:end], width, int8=int8))
            start = end
        *skips, self.activated, self.raw, self.between = buffers
        if skips:
            self.skip, self.skip_activated = skips
        return start - self._total(self._passing)

    def extent(self, start: int) -> tuple[int, int]:
        """End of the buffers that live through deeper levels, and of all."""
        end = start + self._total(self._kept)
        return end, end + self._total(self._passing)

    def _total(self, buffers: list[tuple[int, bool]]) -> int:
        return sum(self._floats(width, int8=int8) for width, int8 in buffers)

    def _floats(self, width: int, *, int8: bool) -> int:
        return _padded((self.sites + 1) * _fours(width) // 4 if int8 else self.sites * width)

    def _view(self, floats: Tensor, width: int, *, int8: bool) -> Tensor:
        """``float32 [N, C]``; or ``uint8 [N + 1, C]``, rows of whole fours of channels, the last row zero."""
        if not int8:
            return floats[: self.sites * width].view(self.sites, width)
        stride = _fours(width)
        return floats.view(torch.uint8)[: (self.sites + 1) * stride].view(self.sites + 1, stride)[:, :width]

    def clear(self) -> None:
        """Zeroes the last rows of 8-bit buffers, where missing neighbours are read: others lay there since."""
        for buffer in (self.activated, self.between, *([self.skip_activated] if len(self._kept) > 1 else [])):
            if buffer.dtype == torch.uint8:
                buffer[-1].zero_()


def _fours(width: int) -> int:
    return -(-width // 4) * 4


def _padded(floats: int) -> int:
    return -(-floats // 16) * 16


class PackedUNet:
    """:class:`SparseUNet` in evaluation mode: ``(features [N, F], plan) -> logits [N, K]``, float32.

    Args:
        network: its weights are copied; later changes of them do not reach here.
        kernels: what computes.
        int8: convolutions but the stem in 8 bits; the network must be calibrated (``quantisation.py``).
    """

    def __init__(self, network: SparseUNet, kernels: Kernels, *, int8: bool = False) -> None:
        self.kernels, self.spec, self.int8 = kernels, network.spec, int8
        pack = _Pack(kernels, int8=int8)
        self.stem = pack.stem(network.stem)
        self.descend = [[_Block(b, pack) for b in blocks.children()] for blocks in network.descend]
        self.ascend = [[_Block(b, pack) for b in blocks.children()] for blocks in network.ascend]
        self.down_norms = list(map(pack.norm, network.down_norms, network.down_convs))
        self.up_norms = list(map(pack.norm, network.up_norms, network.up_convs))
        self.down = list(map(pack.conv, network.down_convs))
        self.up = list(map(pack.up, network.up_convs))
        self.head_norm, self.head = _Norm(network.head_norm), pack.linear(network.head)
        self.head_bias = network.head.bias.detach().clone()
        self.planes = [blocks[0].conv2.c_out for blocks in self.descend]
        self._memory = Scratch()

    @property
    def megabytes(self) -> float:
        """Packed weights [MB]."""
        blocks = [block for level in (*self.descend, *self.ascend) for block in level]
        packed = [self.stem, self.head, *self.down, *(p for ps in self.up for p in ps)]
        packed += [p for b in blocks for p in (b.conv1, b.conv2, b.shortcut) if p is not None]
        return sum(p.data.nbytes for p in packed) / 1e6

    def clear(self) -> None:
        """Gives back the memory of features, else kept for the next forward; the packed weights stay."""
        self._memory.clear()

    def tables(self, plan: Plan) -> None:
        """Makes the tables of the plan that this network reads, which the forward does otherwise."""
        _Run(self, plan, None).tables()

    def __call__(self, features: Tensor, plan: Plan, *, levels_ms: list[float] | None = None) -> Tensor:
        """Logits ``float32 [N, K]``.

        Args:
            features: ``float32 [N, F]``.
            plan: of the N sites, by this engine.
            levels_ms: filled with the milliseconds that each level took.

        Raises:
            ValueError: features or plan do not fit.
        """
        if plan.spec != self.spec:
            raise ValueError(f"plan was built for {plan.spec}, this network needs {self.spec}")
        if not all(isinstance(level.around, Around) for level in plan.levels):
            raise ValueError(f"plan was built by engine {plan.engine!r}; build it by engine 'cpu'")
        if features.dim() != 2 or len(features) != len(plan.levels[0].sites) or features.shape[1] != self.stem.c_in:
            raise ValueError(
                f"features are {tuple(features.shape)}, expected [{len(plan.levels[0].sites)}, {self.stem.c_in}]"
            )
        run = _Run(self, plan, levels_ms)
        with self._memory.take(run.floats) as block:
            return run(features, block)


class _Run:
    """One forward."""

    def __init__(self, net: PackedUNet, plan: Plan, levels_ms: list[float] | None) -> None:
        self.net, self.plan, self.kernels, self.levels_ms = net, plan, net.kernels, levels_ms
        last = len(plan.levels) - 1
        self.levels = [
            _Level(len(level.sites), channels, skips=depth < last, int8=net.int8)
            for depth, (level, channels) in enumerate(zip(plan.levels, net.planes, strict=True))
        ]
        self.scratch_floats = _padded(max(self._scratch_needs()))
        start, ends = self.scratch_floats, []
        for level in self.levels:
            start, end = level.extent(start)
            ends.append(end)
        self.floats = max(ends)

    def __call__(self, features: Tensor, block: Tensor) -> Tensor:
        net, top = self.net, self.levels[0]
        self.scratch, start = block[: self.scratch_floats], self.scratch_floats
        for level in self.levels:
            start = level.place(block, start)
        if self.levels_ms is not None:
            self.levels_ms[:] = [0.0] * len(self.levels)
        with self._timed(0):
            top.clear()
            first = net.descend[0][0].norm1
            stem = Epilogue(raw=top.raw, activated=(first.into(top.activated, top.sites),))
            self._convolve(features.detach().contiguous(), self.plan.levels[0].around.table, net.stem, stem, top.sites)
        for depth in range(len(self.levels)):
            self._descend(depth)
        for depth in reversed(range(len(self.levels) - 1)):
            self._ascend(depth)
        with self._timed(0):
            logits = torch.empty(top.sites, net.head.c_out)
            self._convolve(self._leaving(0).out, None, net.head, Epilogue(bias=net.head_bias, raw=logits), top.sites)
        return logits

    def tables(self) -> None:
        """Reads every table once; tiles were read to find out how much scratch memory they need."""
        for level in self.plan.levels:
            if self.net.int8 or level is self.plan.levels[0]:
                _ = level.around.table
            if isinstance(level.down, Across):
                _ = level.down.table, level.down.between.parities

    def _descend(self, depth: int) -> None:
        net, level, blocks = self.net, self.levels[depth], self.net.descend[depth]
        c, n, deepest = level.channels, level.sites, depth == len(self.levels) - 1
        with self._timed(depth):
            for block, after in pairwise(blocks):
                self._block(
                    depth, block, level.activated, level.raw, level.raw, (after.norm1.into(level.activated, n),)
                )
            if deepest:
                self._block(depth, blocks[-1], level.activated, level.raw, None, (self._leaving(depth),))
                return
            outputs = (
                net.down_norms[depth].into(level.activated, n),
                net.ascend[depth][0].norm1.into(level.skip_activated[:, :c], n, slice(0, c)),
            )
            self._block(depth, blocks[-1], level.activated, level.raw, level.skip[:, :c], outputs)
            coarser, down = self.levels[depth + 1], self.plan.levels[depth].down
            assert down is not None
            coarser.clear()
            entering = net.descend[depth + 1][0].norm1.into(coarser.activated, coarser.sites)
            epilogue = Epilogue(raw=coarser.raw, activated=(entering,))
            self._convolve(level.activated, down.table, net.down[depth], epilogue, coarser.sites)

    def _ascend(self, depth: int) -> None:
        net, level, blocks = self.net, self.levels[depth], self.net.ascend[depth]
        c, n, down = level.channels, level.sites, self.plan.levels[depth].down
        with self._timed(depth):
            assert isinstance(down, Across)
            rows, counts, table = down.between.parities
            first = blocks[0]
            activated = first.norm1.into(level.skip_activated[:, c:], n, slice(c, 2 * c))
            epilogue = Epilogue(raw=level.skip[:, c:], activated=(activated,))
            row = start = 0
            for count, packed in zip(counts, net.up[depth], strict=True):
                part = table[start : start + count * packed.taps].view(count, packed.taps)
                coarse = self.levels[depth + 1].activated
                self._convolve(coarse, part, packed, epilogue, level.sites, rows=rows[row : row + count])
                row, start = row + count, start + count * packed.taps
            level.clear()
            source, residual = level.skip_activated, level.skip
            if first.shortcut is not None:
                self._convolve(level.skip, None, first.shortcut, Epilogue(raw=level.raw), level.sites)
                residual = level.raw
            for block, after in pairwise(blocks):
                self._block(depth, block, source, residual, level.raw, (after.norm1.into(level.activated, n),))
                source, residual = level.activated, level.raw
            self._block(depth, blocks[-1], source, residual, None, (self._leaving(depth),))

    def _leaving(self, depth: int) -> Activation:
        """What the next finer level, or the head, reads of the last block of a level."""
        level = self.levels[depth]
        if depth:
            return self.net.up_norms[depth - 1].into(level.activated, level.sites)
        # The head reads floats: in 8 bits they replace the residual, which the same rows need no longer.
        return self.net.head_norm.into(level.raw if self.net.int8 else level.activated, level.sites)

    def _block(
        self,
        depth: int,
        block: _Block,
        source: Tensor,
        residual: Tensor,
        raw: Tensor | None,
        activated: tuple[Activation, ...],
    ) -> None:
        between, n = self.levels[depth].between, self.levels[depth].sites
        self._around(depth, source, block.conv1, Epilogue(activated=(block.norm2.into(between, n),)))
        self._around(depth, between, block.conv2, Epilogue(residual=residual, raw=raw, activated=activated))

    def _around(self, depth: int, x: Tensor, packed: Packed | Int8Packed, epilogue: Epilogue) -> None:
        if isinstance(packed, Packed) and packed.tile:
            self.kernels.winograd(x, self._tiles(depth, packed), packed, epilogue, scratch=self.scratch)
        else:
            self._convolve(x, self.plan.levels[depth].around.table, packed, epilogue, self.levels[depth].sites)

    def _tiles(self, depth: int, packed: Packed) -> Tiles:
        around = self.plan.levels[depth].around
        assert isinstance(around, Around)
        return around.cells.tiles if packed.tile == 4 else around.cells.quarters

    def _convolve(
        self,
        x: Tensor,
        table: Tensor | None,
        packed: Packed | Int8Packed,
        epilogue: Epilogue,
        n: int,
        rows: Tensor | None = None,
    ) -> None:
        if isinstance(packed, Packed):
            self.kernels.convolve(x, table, packed, epilogue, n, rows=rows, scratch=self.scratch)
        else:
            assert table is not None
            self.kernels.convolve_int8(x, table, packed, epilogue, n, rows=rows)

    def _scratch_needs(self) -> Iterator[int]:
        net = self.net
        for depth, level in enumerate(self.levels):
            for block in (*net.descend[depth], *(net.ascend[depth] if depth < len(net.ascend) else ())):
                for packed in (block.conv1, block.conv2):
                    if isinstance(packed, Packed) and packed.tile:
                        tiles = self._tiles(depth, packed)
                        quarters = tiles.quarters if packed.tile == 2 else None
                        count = len(tiles.table if quarters is None else quarters)
                        yield self.kernels.scratch_floats(packed, count)
                    elif isinstance(packed, Packed):
                        yield self.kernels.scratch_floats(packed, level.sites)
        for conv in (net.stem, net.head, *net.down):
            if isinstance(conv, Packed):
                yield self.kernels.scratch_floats(conv, 0)

    @contextmanager
    def _timed(self, depth: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.levels_ms is not None:
            self.levels_ms[depth] += 1e3 * (time.perf_counter() - start)
