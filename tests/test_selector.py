"""Which pixels are selected, against sorting in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.stages.selector import Selector
from support import ENGINES, device_of, engine_of

SHAPE = (3, 5, 7)
CHOICES = [
    (threshold, budget)
    for threshold in (None, 0.0, 0.25, 0.5, 0.6)
    for budget in (None, 0, 1, 9, 34, 35, 1000)
    if (threshold, budget) != (None, None)
]


def expected_mask(entropy: Tensor, threshold: float | None, budget: int | None, valid: Tensor | None) -> Tensor:
    """Of each image the first ``budget`` pixels by (entropy downwards, position upwards), among those that qualify."""
    mask = torch.zeros(entropy.shape, dtype=torch.bool)
    for b, image in enumerate(entropy):
        values = image.flatten().tolist()
        allowed = [True] * len(values) if valid is None else valid[b].flatten().tolist()
        chosen = [i for i, v in enumerate(values) if allowed[i] and (threshold is None or v > threshold)]
        chosen.sort(key=lambda i: (-values[i], i))
        mask[b].view(-1)[chosen[:budget]] = True
    return mask


def entropies(kind: str) -> Tensor:
    if kind == "distinct":
        return torch.rand(SHAPE)
    if kind == "ties":
        return torch.randint(0, 4, SHAPE) / 4
    return torch.full(SHAPE, 0.5)


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "some padding"])
@pytest.mark.parametrize(("threshold", "budget"), CHOICES)
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant"])
def test_selection(kind: str, threshold: float | None, budget: int | None, masked: bool) -> None:
    entropy = entropies(kind)
    valid = torch.rand(SHAPE) < 0.7 if masked else None
    sites = Selector(threshold, budget)(entropy, valid)
    assert torch.equal(sites.mask(), expected_mask(entropy, threshold, budget, valid))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_keeps_to_the_budget(engine: str) -> None:
    run, device = engine_of(engine), device_of(engine)
    entropy, valid = entropies("ties"), torch.rand(SHAPE) < 0.7
    mask = Selector(0.2, 9).mask(entropy.to(device), valid.to(device), run)
    assert torch.equal(mask.cpu(), expected_mask(entropy, 0.2, 9, valid))


def test_the_given_engine_keeps_to_the_budget() -> None:
    class Recording(TorchEngine):
        def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
            asked.append(budget)

    asked: list[int] = []
    entropy = entropies("distinct")
    assert Selector(0.0).mask(entropy, engine=Recording()).all()
    assert Selector(0.0, 3).mask(entropy, engine=Recording()).all(), "only the engine clears"
    assert asked == [3]


def test_sites_are_those_of_the_mask() -> None:
    entropy, valid = entropies("ties"), torch.rand(SHAPE) < 0.7
    selector = Selector(0.2, 9)
    assert torch.equal(selector(entropy, valid).mask(), selector.mask(entropy, valid))


@pytest.mark.parametrize("budget", [0, 2, 3, 4, 5, 6, 7])
def test_nan_counts_as_minus_infinity(budget: int) -> None:
    values = torch.tensor([[[math.nan, 1.0, -math.inf], [-2.0, math.nan, 3.0]]])
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    get_engine("torch").keep_largest(values, mask, budget)
    assert mask.flatten().nonzero().flatten().tolist() == sorted([5, 1, 3, 0, 2, 4][:budget])


def test_threshold_is_exclusive() -> None:
    assert Selector(0.5)(torch.tensor([[[0.5, 0.5001, 0.4]]])).coords.tolist() == [[0, 0, 1]]


def test_budget_is_per_image() -> None:
    entropy = torch.rand(SHAPE)
    entropy[0] += 10
    assert Selector(budget=4)(entropy).coords[:, 0].bincount().tolist() == [4, 4, 4]


def test_the_same_every_time() -> None:
    entropy = entropies("ties")
    first = Selector(0.1, 11)(entropy)
    assert all(torch.equal(Selector(0.1, 11)(entropy).coords, first.coords) for _ in range(5))


def test_arguments_are_left_alone() -> None:
    entropy, valid = torch.rand(SHAPE), torch.rand(SHAPE) < 0.5
    before = entropy.clone(), valid.clone()
    Selector(0.2, 3)(entropy, valid)
    assert torch.equal(entropy, before[0])
    assert torch.equal(valid, before[1])


@pytest.mark.parametrize("selector", [Selector(0.5), Selector(budget=5), Selector(0.5, 5)], ids=str)
def test_any_memory_layout(selector: Selector) -> None:
    entropy = torch.rand(SHAPE)
    transposed = entropy.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(selector(transposed).coords, selector(entropy).coords)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "got neither"),
        ({"threshold": -0.1}, "threshold = -0.1 nats, expected at least 0"),
        ({"threshold": math.nan}, "threshold = nan nats"),
        ({"budget": -1}, "budget = -1 sites, expected at least 0"),
        ({"threshold": 0.3, "budget": -1}, "budget = -1"),
    ],
    ids=str,
)
def test_bad_selector(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Selector(**arguments)


@pytest.mark.parametrize(("threshold", "classes"), [(math.log(2), 2), (0.7, 2), (math.log(19), 19), (math.inf, 5)])
def test_check_refuses_a_threshold_that_selects_nothing(threshold: float, classes: int) -> None:
    with pytest.raises(ValueError, match=f"would select nothing.*ln {classes}") as error:
        Selector(threshold).check(classes)
    assert str(threshold) in str(error.value)


@pytest.mark.parametrize("selector", [Selector(0.69), Selector(0.0), Selector(budget=3)], ids=str)
def test_check_accepts(selector: Selector) -> None:
    selector.check(2)
