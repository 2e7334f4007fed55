"""Plans made by kernels for GPUs against the reference, which is made of torch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sparserefine.engines.reference.geometry import build_plan as reference_plan
from sparserefine.sparse import Plan, PlanSpec, Sites
from support import PATTERNS, SIZES, TRITON_ENGINES, device_of, mask_of, needs_triton

if TYPE_CHECKING:
    from sparserefine.engines.triton.convolution import Order
    from sparserefine.engines.triton.geometry import GpuStencil, PaddedPlan

DOWNS = ("paper", "cell")
WAITS = ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__")
POISON = 0x7F


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    needs_triton(gpu=request.param == "triton-gpu")
    return device_of(request.param)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is not 0 by chance."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(fresh: Tensor) -> Tensor:
        if fresh.dtype in (torch.uint8, torch.int32, torch.int64):
            fresh.view(-1).view(torch.uint8).fill_(POISON)
        return fresh

    monkeypatch.setattr(torch, "empty", lambda *size, **how: poison(empty(*size, **how)))
    monkeypatch.setattr(torch, "empty_like", lambda other, **how: poison(empty_like(other, **how)))


@pytest.fixture
def small_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row and several chunks of blocks in a small image."""
    from sparserefine.engines.triton import geometry

    monkeypatch.setattr(geometry, "_BLOCK", 4)
    monkeypatch.setattr(geometry, "_CHUNK", 4)


def build(mask: Tensor, spec: PlanSpec) -> Plan:
    from sparserefine.engines.triton.geometry import build_plan

    return build_plan(mask, spec)


def build_padded(mask: Tensor, spec: PlanSpec, capacities: list[int]) -> PaddedPlan:
    from sparserefine.engines.triton.geometry import build_padded_plan

    return build_padded_plan(mask, spec, capacities)


def random_mask(size: tuple[int, int], batch: int = 1, density: float = 0.3) -> Tensor:
    return torch.rand(batch, *size, generator=torch.Generator().manual_seed(7)) < density


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def order_of(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by parity, and how many of each."""
    parity = coords[:, 1] % 2 * 2 + coords[:, 2] % 2
    return parity.argsort(stable=True).int(), parity.bincount(minlength=4).int()


def check_order(order: Order | None, coords: Tensor) -> None:
    assert order is not None
    rows, counts = order_of(coords)
    equal(order.counts, counts)
    equal(order.rows[: len(rows)], rows)


def check_eager(actual: Plan, expected: Plan) -> None:
    assert actual.spec == expected.spec
    assert len(actual.levels) == len(expected.levels)
    for found, wanted in zip(actual.levels, expected.levels, strict=True):
        sites = found.sites
        size = (wanted.sites.batch_size, wanted.sites.height, wanted.sites.width)
        assert (sites.batch_size, sites.height, sites.width) == size
        assert type(sites) is Sites  # not padded
        equal(sites.coords, wanted.sites.coords)
        equal(found.around.table, wanted.around.table)
        assert found.around.reverse is found.around.table
        assert found.around.mirrored
        assert (found.down is None) == (wanted.down is None)
        for stencil in (found.around, found.down):
            check_layout(stencil)
        if found.down is not None and wanted.down is not None:
            down: GpuStencil = found.down
            equal(down.table, wanted.down.table)
            equal(down.reverse, wanted.down.reverse)
            assert not down.mirrored
            assert (down.single, down.reverse_single, down.order) == (None, None, None)
            assert (down.count, down.reverse_count) == (None, None)
            check_order(down.reverse_order, wanted.sites.coords)
            assert down.reverse_order.rows.shape == (len(sites),)


def check_layout(stencil: GpuStencil | None) -> None:
    for table in () if stencil is None else (stencil.table, stencil.reverse):
        assert table.dtype == torch.int32
        assert table.stride(0) == 1
        assert table.stride(1) % 16 == 0
        assert table.stride(1) >= max(1, len(table))


def check_padded(plan: PaddedPlan, expected: Plan, capacities: list[int]) -> None:
    """The first rows are the reference's, where rows past a capacity are missing."""
    totals = [len(level.sites) for level in expected.levels]
    kept = [min(total, capacity) for total, capacity in zip(totals, capacities, strict=True)]
    equal(plan.totals.cpu(), torch.tensor(totals, dtype=torch.int32))
    assert plan.rows == tuple(capacities)

    def check(table: Tensor, wanted: Tensor, own: int, read: int) -> None:
        assert table.shape == (capacities[own], wanted.shape[1])
        equal(table[: kept[own]], wanted.where(wanted < kept[read], capacities[read])[: kept[own]])

    for at, (found, wanted) in enumerate(zip(plan.levels, expected.levels, strict=True)):
        coords = wanted.sites.coords[: kept[at]]
        rows = found.sites.rows.coords
        equal(rows[: kept[at]], coords)
        assert rows.shape == (capacities[at], 3)
        assert not rows[kept[at] :].any()
        check(found.around.table, wanted.around.table, at, at)
        counts = [found.sites.count, found.around.count, found.around.reverse_count]
        check_layout(found.around)
        check_layout(found.down)
        if found.down is not None and wanted.down is not None:
            check(found.down.table, wanted.down.table, at + 1, at)
            check(found.down.reverse, wanted.down.reverse, at, at + 1)
            check_order(found.down.reverse_order, coords)
            assert found.down.reverse_order.rows.shape == (capacities[at],)
            counts.append(found.down.reverse_count)
            assert found.down.count.tolist() == [kept[at + 1]]
        assert [count.tolist() for count in counts] == [[kept[at]]] * len(counts)


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("size", SIZES)
def test_plan_of_a_batch_equals_the_reference(size: tuple[int, int], down: str, device: torch.device) -> None:
    mask = torch.cat([mask_of(pattern, size) for pattern in ("border", "none", "random")]).to(device)
    spec = PlanSpec(3, down)
    check_eager(build(mask, spec), reference_plan(Sites.from_mask(mask), spec))


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_plan_of_one_image_equals_the_reference(pattern: str, down: str, device: torch.device) -> None:
    mask = mask_of(pattern, (3, 5)).to(device)
    spec = PlanSpec(3, down)
    check_eager(build(mask, spec), reference_plan(Sites.from_mask(mask), spec))


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.usefixtures("small_blocks")
def test_plan_of_several_blocks_a_row_and_five_levels(down: str, device: torch.device) -> None:
    mask = random_mask((3, 13), 2).to(device)
    spec = PlanSpec(5, down)
    check_eager(build(mask, spec), reference_plan(Sites.from_mask(mask), spec))


def test_plan_of_images_wider_than_a_block(device: torch.device) -> None:
    mask = random_mask((2, 1027)).to(device)
    spec = PlanSpec(2, "cell")
    check_eager(build(mask, spec), reference_plan(Sites.from_mask(mask), spec))


def test_plan_of_one_level_and_a_mask_that_is_a_view(device: torch.device) -> None:
    mask = random_mask((5, 3), 2).to(device).transpose(1, 2)
    spec = PlanSpec(1, "paper")
    check_eager(build(mask, spec), reference_plan(Sites.from_mask(mask), spec))


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.usefixtures("small_blocks")
def test_padded_plan_begins_with_the_reference(down: str, device: torch.device) -> None:
    mask = random_mask((5, 7), 2).to(device)
    spec = PlanSpec(3, down)
    expected = reference_plan(Sites.from_mask(mask), spec)
    spare = (21, 0, 300)
    capacities = [len(level.sites) + more for level, more in zip(expected.levels, spare, strict=True)]
    check_padded(build_padded(mask, spec, capacities), expected, capacities)


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("short", [0, 1, 2])
@pytest.mark.usefixtures("small_blocks")
def test_padded_plan_leaves_out_what_has_no_room(short: int, down: str, device: torch.device) -> None:
    mask = random_mask((7, 9), 2).to(device)
    spec = PlanSpec(3, down)
    expected = reference_plan(Sites.from_mask(mask), spec)
    capacities = [len(level.sites) for level in expected.levels]
    capacities[short] = capacities[short] * 2 // 3
    check_padded(build_padded(mask, spec, capacities), expected, capacities)


@pytest.mark.parametrize("capacity", [0, 1, 4, 5, 6, 7, 8, 9])
@pytest.mark.usefixtures("small_blocks")
def test_order_of_what_there_is_room_for(capacity: int, device: torch.device) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()[None].to(device)
    spec = PlanSpec(2, "cell")
    capacities = [capacity, 3]
    check_padded(build_padded(mask, spec, capacities), reference_plan(Sites.from_mask(mask), spec), capacities)


@pytest.mark.parametrize("capacity", [0, 3])
def test_padded_plan_of_no_sites_and_of_levels_without_cells(capacity: int, device: torch.device) -> None:
    mask = torch.zeros(1, 2, 3, dtype=torch.bool, device=device)
    spec = PlanSpec(3, "paper")
    capacities = [capacity] * 3
    check_padded(build_padded(mask, spec, capacities), reference_plan(Sites.from_mask(mask), spec), capacities)


@pytest.mark.parametrize(
    ("make", "waits"),
    [
        pytest.param(build, ["tolist"], id="plan"),
        pytest.param(lambda mask, spec: build_padded(mask, spec, [9, 9]), [], id="padded"),
    ],
)
def test_waits_of_the_host(
    make: Callable[[Tensor, PlanSpec], Plan], waits: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = random_mask((2, 3)).to(device)
    seen: list[str] = []
    for name in WAITS:
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *rest, _n=name, _r=real: (seen.append(_n), _r(self, *rest))[1])
    make(mask, PlanSpec(2, "cell"))
    monkeypatch.undo()
    assert seen == waits


def test_plans_are_the_same_each_time(device: torch.device) -> None:
    mask = random_mask((5, 6)).to(device)
    spec = PlanSpec(2, "paper")
    first, second = build(mask, spec), build(mask, spec)
    check_eager(first, second)


def test_transposed_stencil_swaps_its_ends(device: torch.device) -> None:
    plan = build_padded(random_mask((4, 4)).to(device), PlanSpec(2, "cell"), [16, 4])
    down: GpuStencil = plan.levels[0].down
    up = down.transposed()
    assert (up.table is down.reverse, up.reverse is down.table) == (True, True)
    assert (up.order is down.reverse_order, up.reverse_order is down.order) == (True, True)
    assert (up.count is down.reverse_count, up.reverse_count is down.count) == (True, True)
    back = up.transposed()
    assert all(getattr(back, field.name) is getattr(down, field.name) for field in fields(down))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        pytest.param(torch.zeros(1, 2, 2), "float32", id="dtype"),
        pytest.param(torch.zeros(2, 2, dtype=torch.bool), r"\(2, 2\)", id="dimensions"),
        pytest.param(torch.zeros(1, 1, 1, dtype=torch.bool).expand(2, 40000, 40000), "smaller batches", id="cells"),
    ],
)
def test_masks_that_are_refused(mask: Tensor, words: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=words):
        build(mask.to(device), PlanSpec(2, "cell"))


@pytest.mark.parametrize("capacities", [[4], [4, 4, 4], [4, -1], [4, 2**31]])
def test_capacities_that_are_refused(capacities: list[int], device: torch.device) -> None:
    with pytest.raises(ValueError, match="expected 2 numbers"):
        build_padded(mask_of("all", (2, 2)).to(device), PlanSpec(2, "cell"), capacities)


@pytest.mark.gpu
@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("size", [(1024, 2048), (1031, 4099)])
def test_plan_of_a_large_image_equals_the_reference(size: tuple[int, int], down: str) -> None:
    needs_triton(gpu=True)
    mask = random_mask(size, 2, 0.1).cuda()
    spec = PlanSpec(5, down)
    expected = reference_plan(Sites.from_mask(mask), spec)
    check_eager(build(mask, spec), expected)
    capacities = [len(level.sites) * 9 // 10 for level in expected.levels]
    check_padded(build_padded(mask, spec, capacities), expected, capacities)


@pytest.mark.gpu
@pytest.mark.parametrize("down", DOWNS)
def test_padded_plan_in_a_cuda_graph(down: str) -> None:
    needs_triton(gpu=True)
    spec, capacities = PlanSpec(4, down), [9000, 3000, 800, 200]
    mask = random_mask((120, 200), 1, 0.1).cuda()
    build_padded(mask, spec, capacities)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = build_padded(mask, spec, capacities)
    for density in (0.0, 0.05, 0.3, 0.6):
        mask.copy_(random_mask((120, 200), 1, density))
        graph.replay()
        check_padded(plan, reference_plan(Sites.from_mask(mask), spec), capacities)
