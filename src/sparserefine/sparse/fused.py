"""A network in evaluation mode as one flat list of fused convolutions. Engines that run whole networks execute it.

Besides the modules themselves, only this file knows the order of the layers. A step is a convolution with its epilogue
(``epilogue.py``). Normalisation, ReLU, residuals and the concatenation of skips are part of epilogues, not steps. To
add a layer, change this file; engines only know steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sparserefine.sparse.layers import ResidualBlock, SparseBatchNorm, SparseConv
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.quantisation import step_of
from sparserefine.sparse.unet import SparseUNet, check_context

Kind = Literal["around", "down", "up", "own"]
"""Which rows a step reads: ``around``, neighbours at its own level; ``down``, the next finer level; ``up``, the next
coarser level; ``own``, only the row itself, as linear layers do."""


@dataclass(frozen=True)
class Buffer:
    """Features that one step writes and others read.

    Attributes:
        level: its sites are the rows.
        channels: columns of each row.
        rounded: whether the steps that read it may do so in 8 bits (``quantisation.py``).
    """

    level: int
    channels: int
    rounded: bool


@dataclass(frozen=True)
class Part:
    """Channels ``start`` to ``stop`` of the buffer with that number."""

    buffer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Norm:
    """Batch normalisation with running statistics: ``x * scale + shift``.

    Attributes:
        scale: ``float64 [C]``.
        shift: ``float64 [C]``.
        step: quantisation step of the result, ``float32 [C]``; ``None`` if the next layer reads floats or the network
            is not calibrated.
    """

    scale: Tensor
    shift: Tensor
    step: Tensor | None

    def factors(self, *, int8: bool = False) -> tuple[Tensor, Tensor]:
        """Scale and shift, ``float32 [C]``. With ``int8``, the result is in units of ``step``, if there is one."""
        scale, shift = self.scale, self.shift
        if int8 and self.step is not None:
            scale, shift = scale / self.step, shift / self.step
        return scale.float(), shift.float()


@dataclass(frozen=True)
class Weights:
    """The parameters of a step.

    Attributes:
        weight: ``[T, C_in, C_out]``; shares memory with the network.
        input_step: quantisation step of the inputs, ``float32 [C_in]``; ``None`` if the inputs are floats or the
            network is not calibrated.
        bias: ``[C_out]``.
        norms: one for each of the step's ``activated``.
    """

    weight: Tensor
    input_step: Tensor | None
    bias: Tensor | None
    norms: tuple[Norm, ...]


@dataclass(frozen=True)
class Step:
    """Writes ``v = sum + bias + residual`` to ``raw``, and ``relu(v * scale + shift)`` to each of ``activated``.

    Attributes:
        kind: which rows the step reads.
        level: the level of the rows it writes.
        source: buffer it reads; ``None``: an input of the network, its features or its context.
        residual: buffer it adds.
        raw: receives v.
        activated: up to two outputs that receive v normalised and activated.
        begins: buffers that this step is the first to write.
        ends: buffers that no later step needs.
        reads_context: whether the input that it reads is the context of its level.
    """

    kind: Kind
    level: int
    source: int | None
    residual: int | None
    raw: Part | None
    activated: tuple[Part, ...]
    begins: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    reads_context: bool = False

    @property
    def finer(self) -> int:
        """The finer of the two levels that the step reads and writes."""
        return self.level - 1 if self.kind == "down" else self.level

    def input(self, features: Tensor, context: Sequence[Tensor] | None, buffers: Mapping[int, Tensor]) -> Tensor:
        """The rows that the step reads."""
        if self.source is not None:
            return buffers[self.source]
        if not self.reads_context:
            return features
        assert context is not None
        return context[self.level]

    def stencil(self, plan: Plan) -> Stencil | None:
        """Which rows each row reads; ``None``: only itself."""
        if self.kind == "own":
            return None
        level = plan.levels[self.finer]
        if self.kind == "around":
            return level.around
        assert level.down is not None
        return level.down if self.kind == "down" else level.down.transposed()


@dataclass(frozen=True)
class Program:
    """Steps in order, and the buffers between them.

    Attributes:
        spec: plans must be built for it.
        channels: channels of the network's input features.
        context: channels of the network's context at each level; 0: it takes none.
        buffers: all buffers; their numbers are positions here.
        steps: in order of execution.
        result: number of the buffer of the logits, float32; no step ends it.
    """

    spec: PlanSpec
    channels: int
    context: int
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    result: int

    def check(
        self,
        features: Tensor,
        plan: Plan,
        stencil: type[Stencil],
        engine: str,
        context: Sequence[Tensor] | None = None,
    ) -> None:
        """Checks that features, plan and context fit this program.

        Args:
            features: should be ``[N, channels]``.
            plan: should be the plan of the N sites.
            stencil: class that the plan's stencils must have.
            engine: name of the engine whose plans have them, for the message.
            context: should be ``[n_l, context]`` for each level, or ``None`` if the network takes none.

        Raises:
            ValueError: they do not.
        """
        if plan.spec != self.spec:
            raise ValueError(f"plan was built for {plan.spec}, this network needs {self.spec}")
        around = plan.levels[0].around
        if not isinstance(around, stencil):
            raise ValueError(f"plan was built by engine {plan.engine!r}; build it by engine {engine!r}")
        if features.dim() != 2 or features.shape != (around.num_outputs, self.channels):
            raise ValueError(f"features are {tuple(features.shape)}, expected [{around.num_outputs}, {self.channels}]")
        check_context(context, plan.rows, self.context)


def fuse(network: SparseUNet) -> tuple[Program, tuple[Weights, ...]]:
    """The steps of a network and the parameters of each; :func:`sparserefine.sparse.unet.is_packable` must be true."""
    write = _Writer()
    last = network.spec.levels - 1
    descend, ascend = ([_block_list(blocks) for blocks in part] for part in (network.descend, network.ascend))
    planes = [blocks[0].conv2.weight.shape[2] for blocks in descend]
    skips: list[tuple[Part, _Activated]] = []

    def level_output(depth: int) -> _Activated:
        """The output of the last block of a level, for the next finer level or the head."""
        if not depth:
            return write.activated(0, planes[0], network.head_norm, network.head)
        return write.activated(depth, planes[depth], network.up_norms[depth - 1], network.up_convs[depth - 1])

    def enter_level(kind: Kind, depth: int, layer: nn.Module, source: Part | None) -> tuple[Part, _Activated]:
        """The convolution whose output is the input of an encoder level."""
        raw, first = write.buffer(depth, planes[depth]), descend[depth][0]
        active = write.activated(depth, planes[depth], first.norm1, first.conv1)
        residual = None
        if network.context:
            residual = write.buffer(depth, planes[depth])
            write.step("own", depth, network.context[depth], None, raw=residual, reads_context=True)
        write.step(kind, depth, layer, source, residual=residual, raw=raw, activated=(active,))
        return raw, active

    raw, active = enter_level("around", 0, network.stem, None)
    for depth in range(last):
        c, down, first = planes[depth], network.down_convs[depth], ascend[depth][0]
        skip, whole = write.buffer(depth, 2 * c), write.activated(depth, 2 * c, first.norm1, first.conv1)
        below = write.activated(depth, c, network.down_norms[depth], down)
        write.blocks(depth, descend[depth], raw, active.part, _slice(skip, 0, c), (below, whole.channels(0, c)))
        skips.append((skip, whole))
        raw, active = enter_level("down", depth + 1, down, below.part)
    result = level_output(last)
    write.blocks(last, descend[last], raw, active.part, None, (result,))
    for depth in reversed(range(last)):
        c, (skip, whole), blocks = planes[depth], skips.pop(), ascend[depth]
        up = (whole.channels(c, 2 * c),)
        write.step("up", depth, network.up_convs[depth], result.part, raw=_slice(skip, c, 2 * c), activated=up)
        residual = skip
        if isinstance(blocks[0].shortcut, nn.Linear):
            residual = write.buffer(depth, c)
            write.step("own", depth, blocks[0].shortcut, skip, raw=residual)
        result = level_output(depth)
        write.blocks(depth, blocks, residual, whole.part, None, (result,))
    logits = write.buffer(0, network.head.out_features)
    write.step("own", 0, network.head, result.part, raw=logits)
    channels = network.stem.weight.shape[1], network.context_channels
    return write.finish(network.spec, channels, logits.buffer), tuple(write.weights)


@dataclass(frozen=True)
class _Activated:
    """An activated output of a step: the channels to write and the normalisation to apply."""

    part: Part
    norm: Norm

    def channels(self, start: int, stop: int) -> _Activated:
        norm, step = self.norm, self.norm.step
        some = Norm(norm.scale[start:stop], norm.shift[start:stop], None if step is None else step[start:stop])
        return _Activated(_slice(self.part, start, stop), some)


class _Writer:
    """Collects buffers and steps."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.weights: list[Weights] = []

    def buffer(self, level: int, channels: int, *, rounded: bool = False) -> Part:
        self.buffers.append(Buffer(level, channels, rounded))
        return Part(len(self.buffers) - 1, 0, channels)

    def activated(self, level: int, channels: int, norm: nn.Module, reader: nn.Module) -> _Activated:
        """A new buffer for the activated input of layer ``reader``; ``norm`` precedes that layer."""
        assert isinstance(norm, SparseBatchNorm)
        part = self.buffer(level, channels, rounded=isinstance(reader, SparseConv))
        return _Activated(part, Norm(*norm.folded(), _input_step(reader)))

    def step(
        self,
        kind: Kind,
        level: int,
        layer: nn.Module,
        source: Part | None,
        *,
        residual: Part | None = None,
        raw: Part | None = None,
        activated: Sequence[_Activated] = (),
        reads_context: bool = False,
    ) -> None:
        assert isinstance(layer, SparseConv | nn.Linear)
        weight = layer.weight.detach()
        bias = layer.bias.detach() if isinstance(layer, nn.Linear) and layer.bias is not None else None
        self.steps.append(
            Step(
                kind,
                level,
                None if source is None else source.buffer,
                None if residual is None else residual.buffer,
                raw,
                tuple(out.part for out in activated),
                reads_context=reads_context,
            )
        )
        self.weights.append(
            Weights(
                weight.t()[None] if isinstance(layer, nn.Linear) else weight,
                None if source is None else _input_step(layer),  # inputs of the network are floats
                bias,
                tuple(out.norm for out in activated),
            )
        )

    def blocks(
        self,
        level: int,
        blocks: Sequence[ResidualBlock],
        residual: Part,
        active: Part,
        raw: Part | None,
        activated: Sequence[_Activated],
    ) -> None:
        """Adds the residual blocks of a level. The last one writes ``raw`` and ``activated``."""
        for i, block in enumerate(blocks):
            channels = block.conv2.weight.shape[2]
            between = self.activated(level, channels, block.norm2, block.conv2)
            self.step("around", level, block.conv1, active, activated=(between,))
            if i == len(blocks) - 1:
                self.step("around", level, block.conv2, between.part, residual=residual, raw=raw, activated=activated)
                return
            after = blocks[i + 1]
            sums = self.buffer(level, channels)
            following = self.activated(level, channels, after.norm1, after.conv1)
            self.step("around", level, block.conv2, between.part, residual=residual, raw=sums, activated=(following,))
            residual, active = sums, following.part

    def finish(self, spec: PlanSpec, channels: tuple[int, int], result: int) -> Program:
        """The program, with the first and last step of each buffer filled in."""
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            written = [part.buffer for part in (step.raw, *step.activated) if part is not None]
            for buffer in written:
                begins.setdefault(buffer, number)
            used = {step.source, step.residual, *written} - {None, result}
            ends.update((buffer, number) for buffer in used if buffer is not None)

        def buffers_at(when: dict[int, int], number: int) -> tuple[int, ...]:
            return tuple(buffer for buffer, at_step in when.items() if at_step == number)

        steps = [replace(s, begins=buffers_at(begins, n), ends=buffers_at(ends, n)) for n, s in enumerate(self.steps)]
        return Program(spec, *channels, tuple(self.buffers), tuple(steps), result)


def _block_list(blocks: nn.Module) -> list[ResidualBlock]:
    return cast("list[ResidualBlock]", list(blocks.children()))


def _slice(part: Part, start: int, stop: int) -> Part:
    return Part(part.buffer, part.start + start, part.start + stop)


def _input_step(reader: nn.Module) -> Tensor | None:
    if not isinstance(reader, SparseConv) or reader.input_max is None:
        return None
    with torch.no_grad():
        return step_of(reader)
