"""The budget on the GPU against the torch engine's; see test_selector.py for the latter."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparserefine.engines.reference.selection import keep_largest as expected_keep_largest
from support import TRITON_ENGINES, device_of, needs_triton

PIXELS = 13 * 27


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    needs_triton(gpu=request.param == "triton-gpu")
    return device_of(request.param)


@pytest.fixture
def selection(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module under test, with blocks so small that tiny images are several programs of several blocks."""
    from sparserefine.engines.triton import selection

    monkeypatch.setattr(selection, "_BLOCK", 32 if device.type == "cpu" else 128)  # at least one a thread
    monkeypatch.setattr(selection, "_CHUNKS", 3 if device.type == "cpu" else 1)
    return selection


def values_of(kind: str, shape: tuple[int, int, int] = (2, 13, 27)) -> Tensor:
    if kind == "entropies":
        return torch.rand(shape) * 3
    if kind == "a few values":
        return torch.randint(0, 4, shape) / 4
    if kind == "constant":
        return torch.full(shape, 0.5)
    if kind == "close":  # they differ in the last bits
        return (torch.full(shape, 1.0).view(torch.int32) + torch.randint(-9, 9, shape, dtype=torch.int32)).view(
            torch.float32
        )
    special = (0.0, -0.0, 1e-42, -1e-42, torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38, 1.0, -1.0)
    return torch.tensor(special)[torch.randint(0, len(special), shape)]


def check(selection: ModuleType, device: torch.device, values: Tensor, mask: Tensor, budget: int) -> None:
    expected = mask.clone()
    expected_keep_largest(values, expected, budget)
    actual, given = mask.to(device), values.to(device)
    selection.keep_largest(given, actual, budget)
    assert torch.equal(actual.cpu(), expected)
    assert torch.equal(given.cpu().view(torch.int32), values.view(torch.int32)), "the values have changed"


@pytest.mark.parametrize("budget", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 40)), 200])
@pytest.mark.parametrize("kind", ["entropies", "a few values", "constant", "close", "special"])
def test_as_the_torch_engine(selection: ModuleType, device: torch.device, kind: str, budget: int) -> None:
    """The second image has fewer candidates than the largest budget."""
    mask = torch.rand(2, 13, 27) < 0.8
    mask[1, 5:] = False
    check(selection, device, values_of(kind), mask, budget)


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_about_as_many_candidates_as_the_budget(selection: ModuleType, device: torch.device, excess: int) -> None:
    mask = torch.rand(1, 13, 27) < 0.5
    check(selection, device, values_of("a few values", (1, 13, 27)), mask, int(mask.sum()) - excess)


@pytest.mark.parametrize("budget", [0, PIXELS - 1, PIXELS, 1 << 40])
def test_nothing_and_everything(selection: ModuleType, device: torch.device, budget: int) -> None:
    check(selection, device, values_of("special"), torch.ones(2, 13, 27, dtype=torch.bool), budget)


def test_images_without_candidates(selection: ModuleType, device: torch.device) -> None:
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[1] = True
    check(selection, device, values_of("entropies", (3, 4, 5)), mask, 7)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (0, 3, 4), (2, 0, 4), (1, 97, 1), (1, 1, 96)], ids=str)
def test_odd_shapes(selection: ModuleType, device: torch.device, shape: tuple[int, int, int]) -> None:
    check(selection, device, values_of("a few values", shape), torch.ones(shape, dtype=torch.bool), 1)


def test_with_its_own_block_size(device: torch.device) -> None:
    from sparserefine.engines.triton import selection

    mask = torch.rand(1, 61, 77) < 0.9
    check(selection, device, values_of("a few values", (1, 61, 77)), mask, 1234)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(selection: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    values, mask = values_of("entropies", (1, 9, 11)).to(dtype), torch.ones(1, 9, 11, dtype=torch.bool)
    expected, actual = mask.clone(), mask.to(device)
    expected_keep_largest(values, expected, 30)
    selection.keep_largest(values.to(device), actual, 30)
    assert torch.equal(actual.cpu(), expected)


def test_any_layout_of_the_values(selection: ModuleType, device: torch.device) -> None:
    values = values_of("entropies").transpose(1, 2).contiguous().transpose(1, 2)
    check(selection, device, values, torch.ones(2, 13, 27, dtype=torch.bool), 20)


def test_the_same_every_time_whatever_lay_in_memory(
    selection: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, mask = values_of("a few values").to(device), torch.ones(2, 13, 27, dtype=torch.bool, device=device)
    first = mask.clone()
    selection.keep_largest(values, first, 100)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(0x5A5A5A5A))
    again = mask.clone()
    selection.keep_largest(values, again, 100)
    assert torch.equal(first, again)
    assert first.sum((1, 2)).tolist() == [100, 100]


def test_neighbouring_memory_is_left_alone(selection: ModuleType, device: torch.device) -> None:
    """The mask is the middle of three; the values around it are so large that they would win."""
    around = torch.full((3, 5, 7), 9.0, device=device)
    around[1] = torch.rand(5, 7)
    masks = torch.ones(3, 5, 7, dtype=torch.bool, device=device)
    selection.keep_largest(around[1:2], masks[1:2], 4)
    assert masks.sum((1, 2)).tolist() == [35, 4, 35]


def test_nothing_is_read_by_the_host(
    selection: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":  # the interpreter reads what it runs on
        monkeypatch.setattr(selection, "launch", lambda *arguments, **constants: None)
    values, mask = values_of("entropies").to(device), torch.ones(2, 13, 27, dtype=torch.bool, device=device)

    def refuse(*arguments: object) -> None:
        raise AssertionError("read by the host")

    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)
    selection.keep_largest(values, mask, 50)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    needs_triton(gpu=True)
    from sparserefine.engines.triton.selection import keep_largest

    values = values_of("entropies", (2, 300, 401)).cuda()
    keep_largest(values, torch.ones_like(values, dtype=torch.bool), 999)  # compiles
    mask = torch.ones_like(values, dtype=torch.bool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep_largest(values, mask, 999)
    for kind in ("a few values", "special", "close"):
        values.copy_(values_of(kind, (2, 300, 401)))
        mask.fill_(True)
        graph.replay()
        expected = torch.ones(2, 300, 401, dtype=torch.bool)
        expected_keep_largest(values.cpu(), expected, 999)
        assert torch.equal(mask.cpu(), expected)
