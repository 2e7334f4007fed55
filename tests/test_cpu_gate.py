"""What the compiled gated ensembler promises beside values: threads, refusals, gradients.

That values are those of the module is in ``test_conformance_gate.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.gate import gated
from sparserefine.engines.cpu.native.build import INSTRUCTION_SETS
from sparserefine.engines.cpu.native.library import Library, available, load
from sparserefine.stages.ensembler import GatedEnsembler
from support import assert_close
from test_conformance_gate import ensembler_of, expected_of, logits_of, weights_of


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


def run(library: Library, ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    return gated(library, coarse, sparse, gate, fuser, ensembler.residual)


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
        ({"coarse": torch.zeros(4, 0), "sparse": torch.zeros(4, 0)}, "K at least 1"),
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
