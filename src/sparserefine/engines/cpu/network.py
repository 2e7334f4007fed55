"""Runs whole networks for inference: the steps of ``sparse/fused.py``, with weights that are packed once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.engines.cpu.convolution import parity_taps
from sparserefine.engines.cpu.geometry import Across, Around
from sparserefine.engines.cpu.kernels import Int8Packed, Kernels, Packed, Tiles
from sparserefine.engines.cpu.memory import Layout, Scratch, padded
from sparserefine.sparse.epilogue import Activation, Epilogue
from sparserefine.sparse.fused import Part, Program, Step, Weights, fuse
from sparserefine.sparse.plan import Plan
from sparserefine.sparse.quantisation import quantised_weight
from sparserefine.sparse.unet import SparseUNet

# With fewer channels, Winograd's transforms cost more than the multiplications that they save.
# Above this product of input and output channels, reading the weights of F(4x4), which are four times as large as those
# of the convolution, costs more than it saves; F(2x2) is used instead.
_FEWEST_CHANNELS = 8
_MOST_CHANNELS = 1024 * 512


@dataclass(frozen=True)
class _Layer:
    """A step with its packed parameters. An up-sampling step has weights for each parity."""

    step: Step
    packed: Sequence[Packed | Int8Packed]
    bias: Tensor | None
    norms: Sequence[tuple[Tensor, Tensor]]


class PackedNetwork:
    """A network in evaluation mode: ``(features [N, F], plan, context) -> logits [N, K]``, float32.

    Args:
        network: its weights are copied, so later changes have no effect.
        kernels: the compiled kernels.
        int8: whether all convolutions except the stem run in 8 bits; the network must be calibrated
            (``quantisation.py``).
    """

    def __init__(self, network: SparseUNet, kernels: Kernels, *, int8: bool = False) -> None:
        self.kernels, self.int8 = kernels, int8
        self.program, weights = fuse(network)
        self.layout = Layout(self.program, int8=int8)
        self.layers = [
            _Layer(
                step,
                _pack(kernels, self.program, step, own, int8=int8),
                None if own.bias is None else own.bias.clone(),
                [norm.factors(int8=int8) for norm in own.norms],
            )
            for step, own in zip(self.program.steps, weights, strict=True)
        ]
        self._memory = Scratch()

    @property
    def megabytes(self) -> float:
        """Size of the packed weights [MB]."""
        return sum(packed.data.nbytes for layer in self.layers for packed in layer.packed) / 1e6

    def clear(self) -> None:
        """Frees the feature memory that is kept for the next forward pass. The packed weights stay."""
        self._memory.clear()

    def tables(self, plan: Plan) -> None:
        """Makes the tables that this network reads from the plan. Otherwise the first forward pass makes them."""
        for layer in self.layers:
            if not _uses_winograd(layer):
                list(_tables(layer, plan))
        _Run(self, plan)  # makes the tiles

    def __call__(
        self,
        features: Tensor,
        plan: Plan,
        context: Sequence[Tensor] | None = None,
        *,
        levels_ms: list[float] | None = None,
    ) -> Tensor:
        """Logits ``float32 [N, K]``.

        Args:
            features: ``float32 [N, F]``.
            plan: the plan of the N sites, built by this engine.
            context: of each level, ``float32 [n_l, C]``, if the network takes one.
            levels_ms: if given, filled with the time of each level [ms].

        Raises:
            ValueError: features, plan or context do not fit this network.
        """
        self.program.check(features, plan, Around, "cpu", context)
        run = _Run(self, plan)
        with self._memory.take(run.floats) as block:
            inputs = context and [values.detach().contiguous() for values in context]
            return run(features.detach().contiguous(), inputs, block, levels_ms)


def _pack(kernels: Kernels, program: Program, step: Step, weights: Weights, *, int8: bool) -> list[Packed | Int8Packed]:
    weight = weights.weight
    taps, c_in, c_out = weight.shape
    groups = parity_taps(taps) if step.kind == "up" else (list(range(taps)),)
    if int8 and step.source is not None and program.buffers[step.source].rounded:
        assert weights.input_step is not None
        rounded, scale = quantised_weight(weight, weights.input_step)
        return [kernels.pack_int8(rounded[group].contiguous(), scale) for group in groups]
    tile = 0
    if step.kind == "around" and step.source is not None and min(c_in, c_out) >= _FEWEST_CHANNELS:
        tile = 4 if c_in * c_out <= _MOST_CHANNELS else 2
    return [kernels.pack(weight[group].contiguous(), tile) for group in groups]


class _Run:
    """One forward pass."""

    def __init__(self, net: PackedNetwork, plan: Plan) -> None:
        self.net, self.plan, self.kernels = net, plan, net.kernels
        self.rows = [len(level.sites) for level in plan.levels]
        self.scratch_floats = padded(max(self._scratch_needs()))
        self.starts, floats = net.layout.starts(self.rows)
        self.floats = self.scratch_floats + floats

    def __call__(
        self, features: Tensor, context: Sequence[Tensor] | None, block: Tensor, levels_ms: list[float] | None
    ) -> Tensor:
        layout, result = self.net.layout, self.net.program.result
        self.scratch, rest = block[: self.scratch_floats], block[self.scratch_floats :]
        slots = [shape.view(rest, start, self.rows) for shape, start in zip(layout.shapes, self.starts, strict=True)]
        self.buffers = {buffer: slots[slot] for buffer, slot in layout.slot_of.items()}
        self.buffers[result] = torch.empty(self.rows[0], self.net.program.buffers[result].channels)
        if levels_ms is not None:
            levels_ms[:] = [0.0] * len(self.rows)
        for layer in self.net.layers:
            start = time.perf_counter()
            self._layer(layer, layer.step.input(features, context, self.buffers))
            if levels_ms is not None:
                levels_ms[layer.step.finer] += 1e3 * (time.perf_counter() - start)
        return self.buffers[result]

    def _layer(self, layer: _Layer, x: Tensor) -> None:
        step, n = layer.step, self.rows[layer.step.level]
        for buffer in step.begins:
            if self.buffers[buffer].dtype == torch.uint8:
                self.buffers[buffer][-1].zero_()  # other buffers used this memory before
        epilogue = Epilogue(
            None if step.residual is None else self.buffers[step.residual],
            layer.bias,
            None if step.raw is None else self._part(step.raw, n),
            tuple(
                Activation(self._part(part, n), *factors)
                for part, factors in zip(step.activated, layer.norms, strict=True)
            ),
        )
        if _uses_winograd(layer):
            packed = layer.packed[0]
            assert isinstance(packed, Packed)
            self.kernels.winograd(x, _tiles(step, packed, self.plan), packed, epilogue, scratch=self.scratch)
            return
        for packed, table, rows in _tables(layer, self.plan):
            if isinstance(packed, Packed):
                self.kernels.convolve(x, table, packed, epilogue, n, rows=rows, scratch=self.scratch)
            else:
                assert table is not None
                self.kernels.convolve_int8(x, table, packed, epilogue, n, rows=rows)

    def _part(self, part: Part, n: int) -> Tensor:
        return self.buffers[part.buffer][:n, part.start : part.stop]

    def _scratch_needs(self) -> Iterator[int]:
        for layer in self.net.layers:
            for packed in layer.packed:
                if isinstance(packed, Packed):
                    count = self.rows[layer.step.level]
                    if packed.tile:
                        tiles = _tiles(layer.step, packed, self.plan)
                        quarters = tiles.quarters if packed.tile == 2 else None
                        count = len(tiles.table if quarters is None else quarters)
                    yield self.kernels.scratch_floats(packed, count)


def _uses_winograd(layer: _Layer) -> bool:
    """Whether the step runs as a Winograd convolution on tiles."""
    return isinstance(layer.packed[0], Packed) and layer.packed[0].tile > 0


def _tiles(step: Step, packed: Packed, plan: Plan) -> Tiles:
    around = plan.levels[step.level].around
    assert isinstance(around, Around)
    return around.cells.tiles if packed.tile == 4 else around.cells.quarters


def _tables(layer: _Layer, plan: Plan) -> Iterator[tuple[Packed | Int8Packed, Tensor | None, Tensor | None]]:
    """Packed weights, their table (``None``: row n reads row n) and output rows (``None``: row n)."""
    stencil = layer.step.stencil(plan)
    if not isinstance(stencil, Across) or not stencil.up:
        yield layer.packed[0], None if stencil is None else stencil.table, None
        return
    rows, counts, table = stencil.between.parities
    row = start = 0
    for count, packed in zip(counts, layer.packed, strict=True):
        part = table[start : start + count * packed.taps].view(count, packed.taps)
        yield packed, part, rows[row : row + count]
        row, start = row + count, start + count * packed.taps
