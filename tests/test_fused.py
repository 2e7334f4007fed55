"""Networks as flat lists of steps: in plain torch they are the modules, and buffers live as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from networks import K, context_of, expected_of, network
from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu.memory import Layout
from sparserefine.sparse import Sites, SparseConv, calibrating
from sparserefine.sparse.fused import Part, Program, Step, fuse
from sparserefine.sparse.plan import Plan
from sparserefine.sparse.quantisation import quantised_convs
from support import assert_close, mask_of

NETWORKS = [
    *[((16, 32, 64), 2, "paper"), ((3, 5, 7), 1, "cell"), ((17, 33), 3, "cell")],
    *[((16,), 1, "cell"), ((8,), 3, "paper"), ((4, 8, 4, 8, 4), 1, "paper")],
]
"""Planes, blocks, kind of down-sampling."""


def written(step: Step) -> list[Part]:
    return [part for part in (step.raw, *step.activated) if part is not None]


def execute(
    network_of: torch.nn.Module, features: Tensor, plan: Plan, context: Sequence[Tensor] | None = None
) -> Tensor:
    """The steps one by one, as their docstrings say, each buffer kept from its first to its last step only."""
    program, numbers = fuse(network_of)
    held: dict[int, Tensor] = {}
    for step, own in zip(program.steps, numbers, strict=True):
        x, stencil = step.input(features, context, held), step.stencil(plan)
        v = x @ own.weight[0] if stencil is None else stencil.conv(x, own.weight)
        if own.bias is not None:
            v = v + own.bias
        if step.residual is not None:
            v = v + held[step.residual]
        for buffer in step.begins:
            of = program.buffers[buffer]
            held[buffer] = torch.full((len(plan.levels[of.level].sites), of.channels), torch.nan, dtype=v.dtype)
        if step.raw is not None:
            held[step.raw.buffer][:, step.raw.start : step.raw.stop] = v
        for part, norm in zip(step.activated, own.norms, strict=True):
            held[part.buffer][:, part.start : part.stop] = (v * norm.scale + norm.shift).relu()
        for buffer in step.ends:
            del held[buffer]
    assert list(held) == [program.result]
    return held[program.result]


@pytest.mark.parametrize("pattern", ["none", "one", "random"])
@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_the_steps_are_the_network(planes: tuple[int, ...], blocks: int, down: str, pattern: str) -> None:
    net, mask = network(planes, blocks, down), mask_of(pattern, (13, 18), batch=3)
    x = torch.randn(int(mask.sum()), 3)
    plan = get_engine("torch").geometry(Sites.from_mask(mask), net.spec)
    assert_close(execute(net.double(), x.double(), plan), expected_of(net, x, mask))


@pytest.mark.parametrize("pattern", ["none", "one", "random"])
@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_the_steps_add_the_context(planes: tuple[int, ...], blocks: int, down: str, pattern: str) -> None:
    net, mask = network(planes, blocks, down, context=5), mask_of(pattern, (13, 18), batch=3)
    x = torch.randn(int(mask.sum()), 3)
    plan = get_engine("torch").geometry(Sites.from_mask(mask), net.spec)
    context = [values.double() for values in context_of(net, plan)]
    assert_close(execute(net.double(), x.double(), plan, context), expected_of(net, x, mask))


@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_a_step_for_the_context_of_each_level(planes: tuple[int, ...], blocks: int, down: str) -> None:
    """In floats, before the step that adds it; all others are those of the network without."""
    program, numbers = fuse(network(planes, blocks, down, context=5))
    plain, _ = fuse(network(planes, blocks, down))
    assert (program.context, plain.context) == (5, 0)
    steps = list(zip(program.steps, numbers, strict=True))
    assert [step.level for step, _ in steps if step.reads_context] == list(range(len(planes)))
    for (step, own), (after, _) in pairwise(steps):
        if step.reads_context:
            assert (step.kind, step.source, step.residual) == ("own", None, None)
            assert own.weight.shape == (1, 5, planes[step.level])
            assert own.bias is not None
            assert own.input_step is None
            assert after.residual == step.raw.buffer
            assert not program.buffers[step.raw.buffer].rounded
    others = [(step.kind, step.level) for step in program.steps if not step.reads_context]
    assert others == [(step.kind, step.level) for step in plain.steps]


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_a_buffer_lives_from_its_first_to_its_last_step(
    planes: tuple[int, ...], blocks: int, down: str, context: int
) -> None:
    program, numbers = fuse(network(planes, blocks, down, context))
    assert program.buffers[program.result].channels == K
    for number in range(len(program.buffers)):
        uses = [
            i for i, s in enumerate(program.steps) if number in (s.source, s.residual, *(p.buffer for p in written(s)))
        ]
        assert [i for i, s in enumerate(program.steps) if number in s.begins] == uses[:1]
        ends = [i for i, s in enumerate(program.steps) if number in s.ends]
        assert ends == ([] if number == program.result else uses[-1:])
        assert number in (part.buffer for part in written(program.steps[uses[0]]))
    for step, own in zip(program.steps, numbers, strict=True):
        assert len(step.activated) == len(own.norms) <= 2
        inputs = program.context if step.reads_context else program.channels
        c_in = inputs if step.source is None else program.buffers[step.source].channels
        assert own.weight.shape[1] == c_in
        assert all(part.stop - part.start == own.weight.shape[2] for part in written(step))
        assert all(program.buffers[part.buffer].level == step.level for part in written(step))


@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_what_8_bits_may_round(planes: tuple[int, ...], blocks: int, down: str) -> None:
    """Inputs of all convolutions but the stem; not what linear layers read."""
    net = network(planes, blocks, down)
    assert all(own.input_step is None for own in fuse(net)[1])
    mask = mask_of("all", (40, 40))
    with calibrating(net), torch.no_grad():
        net(torch.randn(1600, 3), get_engine("torch").geometry(Sites.from_mask(mask), net.spec))
    program, numbers = fuse(net)
    steps = list(zip(program.steps, numbers, strict=True))
    rounding = [own for step, own in steps if step.source is not None and program.buffers[step.source].rounded]
    assert [own for _, own in steps if own.input_step is not None] == rounding
    convs = {conv.weight.data_ptr() for conv in quantised_convs(net)}
    assert {own.weight.data_ptr() for own in rounding} == convs
    for step, own in steps:
        for part, norm in zip(step.activated, own.norms, strict=True):
            assert (norm.step is not None) == program.buffers[part.buffer].rounded
            readers = [
                other for reader, other in steps if reader.source == part.buffer and other.input_step is not None
            ]
            assert all(torch.equal(norm.step, other.input_step[part.start : part.stop]) for other in readers)


def test_weights_are_the_networks_own() -> None:
    net = network((16, 32), 2)
    own = {parameter.data_ptr() for parameter in net.parameters()}
    assert all(numbers.weight.data_ptr() in own for numbers in fuse(net)[1])
    layers = [m for m in net.modules() if isinstance(m, SparseConv | torch.nn.Linear)]
    assert len(fuse(net)[0].steps) == len(layers)


# ---- memory of the CPU engine


def needed(program: Program) -> Iterator[tuple[Step, set[int]]]:
    """Each step with the buffers that hold something while it runs, the result's left out."""
    held: set[int] = set()
    for step in program.steps:
        held |= set(step.begins) - {program.result}
        yield step, set(held)
        held -= set(step.ends)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "8 bits"])
@pytest.mark.parametrize("rows", ["falling", "equal", "none"])
@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize(("planes", "blocks", "down"), NETWORKS)
def test_buffers_in_use_do_not_overlap(
    planes: tuple[int, ...], blocks: int, down: str, context: int, rows: str, int8: bool
) -> None:
    """But for a result in the place of the residual that it is added to."""
    program, _ = fuse(network(planes, blocks, down, context))
    counts = [{"falling": 1000 >> 2 * level, "equal": 77, "none": 0}[rows] for level in range(len(planes))]
    layout = Layout(program, int8=int8)
    starts, floats = layout.starts(counts)
    block = torch.zeros(floats)
    slots = [shape.view(block, start, counts) for shape, start in zip(layout.shapes, starts, strict=True)]
    shared = 0
    for step, buffers in needed(program):
        places = sorted(
            (
                view.data_ptr(),
                view.data_ptr() + ((len(view) - 1) * view.stride(0) + view.shape[1]) * view.element_size(),
                b,
            )
            for b in buffers
            for view in [slots[layout.slot_of[b]]]
            if len(view)
        )
        for (_, end, one), (start, _, other) in pairwise(places):
            if start < end:
                shared += 1
                assert step.residual in (one, other)
                assert step.residual in step.ends
                assert {one, other} - {step.residual} <= set(step.begins)
                assert layout.slot_of[one] == layout.slot_of[other]
    assert shared or rows == "none" or blocks == 1
    for buffer, of in enumerate(program.buffers):
        if buffer != program.result:
            view = slots[layout.slot_of[buffer]]
            assert view.shape == (counts[of.level] + (int8 and of.rounded), of.channels)
            assert view.dtype == (torch.uint8 if int8 and of.rounded else torch.float32)


def test_memory_is_that_of_the_step_that_needs_most() -> None:
    """At full size: skips (4 x 16 channels), three buffers of the next level's way in, and no gaps worth a word."""
    program, _ = fuse(network((16, 32, 64), 2, "paper"))
    counts = [210_000, 73_000, 26_000]
    sizes = [b.channels * counts[b.level] for b in program.buffers]
    most = max(sum(sizes[b] for b in buffers) for _, buffers in needed(program))
    _, floats = Layout(program, int8=False).starts(counts)
    assert floats <= 1.1 * most
