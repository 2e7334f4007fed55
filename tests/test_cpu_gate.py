"""The compiled gated ensembler against the module that defines it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.gate import Perceptron, gated
from sparserefine.engines.cpu.native.build import INSTRUCTION_SETS
from sparserefine.engines.cpu.native.library import Library, available, load
from sparserefine.stages.ensembler import GatedEnsembler
from support import assert_close

CLASSES = (1, 2, 3, 17, 19, 33, 150)
SITES = (0, 1, 15, 16, 17, 1000)
Fuser = Literal["residual", "paper"]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param not in available():
        pytest.skip(f"{request.param}: not built, or this processor lacks it")
    return load(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ensembler_of(classes: int, fuser: Fuser = "residual", hidden: int = 64) -> GatedEnsembler:
    """With a last layer that does something, and no gradients."""
    ensembler = GatedEnsembler(classes, fuser, hidden)
    for parameter in ensembler.fuser[2].parameters():
        nn.init.normal_(parameter, std=0.1)
    return ensembler.requires_grad_(False)


def weights_of(network: nn.Sequential) -> Perceptron:
    first, second = network[0], network[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return first.weight, first.bias, second.weight, second.bias


def run(library: Library, ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    return gated(library, coarse, sparse, gate, fuser, ensembler.residual)


def expected_of(ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    double = GatedEnsembler(coarse.shape[1], "residual" if ensembler.residual else "paper", len(ensembler.gate[0].bias))
    double.load_state_dict(ensembler.state_dict())
    with torch.inference_mode():
        return double.double()(coarse.double(), sparse.double())


def logits_of(sites: int, classes: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(sites, classes), 3 * torch.randn(sites, classes)


@pytest.mark.parametrize("fuser", ["residual", "paper"])
@pytest.mark.parametrize("classes", CLASSES)
def test_definition(library: Library, classes: int, fuser: Fuser) -> None:
    for sites in SITES:
        ensembler, both = ensembler_of(classes, fuser), logits_of(sites, classes)
        refined = run(library, ensembler, *both)
        assert refined.dtype == torch.float32
        assert_close(refined, expected_of(ensembler, *both))


@pytest.mark.parametrize("hidden", [1, 7, 8, 65])
@pytest.mark.parametrize("classes", [2, 5])
def test_hidden_widths(library: Library, classes: int, hidden: int) -> None:
    ensembler, both = ensembler_of(classes, hidden=hidden), logits_of(40, classes)
    assert_close(run(library, ensembler, *both), expected_of(ensembler, *both))


def test_two_hidden_widths(library: Library) -> None:
    coarse, sparse = logits_of(40, 3)
    narrow, wide = ensembler_of(3, "paper", 11), ensembler_of(3, "paper", 21)
    for parameter in (narrow.gate[2].weight, wide.gate[2].weight):
        parameter.zero_()
    wide.gate[2].bias.copy_(narrow.gate[2].bias)  # the gates are constant and equal, so the fuser alone decides
    refined = gated(library, coarse, sparse, weights_of(narrow.gate), weights_of(wide.fuser), False)
    assert_close(refined, expected_of(wide, coarse, sparse))


@pytest.mark.parametrize("fuser", ["residual", "paper"])
@pytest.mark.parametrize("classes", CLASSES)
def test_extreme_logits(library: Library, classes: int, fuser: Fuser) -> None:
    """Certain, contradicting and undecided predictions in all combinations."""
    signs = torch.randint(0, 2, (6, classes)) * 2.0 - 1
    kinds = torch.cat([80 * signs, torch.full((2, classes), 80.0), torch.full((1, classes), -80.0), signs * 0])
    kinds[2:4] = -80
    kinds[2, 0] = kinds[3, -1] = 80
    which = torch.cartesian_prod(torch.arange(len(kinds)), torch.arange(len(kinds)))
    coarse, sparse = kinds[which[:, 0]], kinds[which[:, 1]]
    ensembler = ensembler_of(classes, fuser)
    refined, expected = run(library, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse)
    # These logits are 25 times those of the other tests, and so are the terms that cancel where a result is small.
    torch.testing.assert_close(refined.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("opened", [-200.0, -20.0, 20.0, 200.0])
def test_closed_and_open_gates(library: Library, classes: int, opened: float) -> None:
    ensembler, (coarse, sparse) = ensembler_of(classes), logits_of(50, classes)
    ensembler.gate[2].bias.fill_(opened)
    assert_close(run(library, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse))
    for parameter in ensembler.fuser[2].parameters():
        parameter.zero_()
    assert_close(run(library, ensembler, coarse, sparse), coarse if opened > 0 else sparse)


@pytest.mark.parametrize("classes", CLASSES)
def test_sites_do_not_see_each_other(library: Library, classes: int) -> None:
    ensembler, (coarse, sparse) = ensembler_of(classes), logits_of(600, classes)
    refined = run(library, ensembler, coarse, sparse)
    for start, end in ((5, 600), (0, 301), (250, 260)):
        assert torch.equal(run(library, ensembler, coarse[start:end], sparse[start:end]), refined[start:end])
    for bad in (math.nan, math.inf, -math.inf):
        coarse[333, 0] = bad
        touched = run(library, ensembler, coarse, sparse)
        others = torch.arange(600) != 333
        assert torch.equal(touched[others], refined[others])
        assert not touched[333].isfinite().all()


def test_no_result_depends_on_the_threads(library: Library, threads: Callable[[int], None]) -> None:
    for classes in (2, 19, 33):
        ensembler, both = ensembler_of(classes), logits_of(3000, classes)
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(run(library, ensembler, *both))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coarse": torch.zeros(4, 4)}, r"coarse logits are \(4, 4\)"),
        ({"coarse": torch.zeros(4)}, r"coarse logits are \(4,\)"),
        ({"sparse": torch.zeros(5, 3)}, r"sparse ones \(5, 3\)"),
        ({"coarse": torch.zeros(4, 0), "sparse": torch.zeros(4, 0)}, "K of at least 1"),
        ({"coarse": torch.zeros(4, 3, dtype=torch.float64)}, "coarse logits is torch.float64"),
        ({"sparse": torch.zeros(4, 3, dtype=torch.float16)}, "sparse logits is torch.float16"),
        ({"sparse": torch.zeros(3, 4).t()}, "not contiguous"),
        ({"coarse": torch.zeros(4, 3, device="meta")}, "on meta"),
    ],
)
def test_wrong_logits(change: dict[str, Tensor], words: str) -> None:
    ensembler = ensembler_of(3)
    arguments: dict[str, Any] = {"coarse": torch.zeros(4, 3), "sparse": torch.zeros(4, 3), **change}
    with pytest.raises(ValueError, match=words):
        run(load(available()[0]), ensembler, **arguments)


@pytest.mark.parametrize("part", range(4))
def test_wrong_weights(part: int) -> None:
    library = load(available()[0])
    ensembler, both = ensembler_of(3), logits_of(4, 3)
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    name = ("first weight", "first bias", "second weight", "second bias")[part]

    def call(change: Callable[[Tensor], Tensor]) -> None:
        changed = [tuple(change(t) if i == part else t for i, t in enumerate(mlp)) for mlp in (gate, fuser)]
        with pytest.raises(ValueError, match=f"{name} of the gate"):
            gated(library, *both, changed[0], fuser, True)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name} of the fuser"):
            gated(library, *both, gate, changed[1], True)  # type: ignore[arg-type]

    call(lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1))
    call(lambda t: t[None])
    call(lambda t: t.double())
    call(lambda t: t.to("meta"))


def test_no_hidden_units() -> None:
    library = load(available()[0])
    ensembler, both = ensembler_of(3), logits_of(4, 3)
    empty = (torch.zeros(0, 8), torch.zeros(0), torch.zeros(1, 0), torch.zeros(1))
    with pytest.raises(ValueError, match="first weight of the gate"):
        gated(library, *both, empty, weights_of(ensembler.fuser), True)


def test_where_a_gradient_is_wanted_the_modules_run(library: Library) -> None:
    engine, ensembler, (coarse, sparse) = CpuEngine(library.name), ensembler_of(3), logits_of(4, 3)
    weights = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    assert engine.gated(coarse, sparse, *weights, True) is not None
    assert engine.gated(coarse, sparse.clone().requires_grad_(), *weights, True) is None
    ensembler.requires_grad_()
    assert engine.gated(coarse, sparse, *weights, True) is None
    ensembler(coarse, sparse, engine).sum().backward()
    assert all(p.grad is not None for p in ensembler.parameters())
    with torch.no_grad():
        assert_close(run(library, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse))
