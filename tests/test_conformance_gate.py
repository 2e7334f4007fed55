"""The gated ensembler: the kernels of every engine against the module that defines it.

What one engine alone promises is in ``test_cpu_gate.py`` and ``test_gpu_gate.py``.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from sparserefine.engines.cpu import gate as cpu
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.sparse import Perceptron
from sparserefine.stages.ensembler import GatedEnsembler
from support import KERNEL_ENGINES, assert_close, device_of, engine_of, on_each

# The interpreter tells of infinite values aloud.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

Fuser = Literal["residual", "paper"]
CLASSES = (1, 2, 3, 17, 19, 33, 150)


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


def logits_of(sites: int, classes: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(sites, classes), 3 * torch.randn(sites, classes)


def gated(name: str, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool) -> Tensor:
    """What an engine's kernel computes, on the CPU; what it does not write is NaN."""
    device, engine = device_of(name), engine_of(name)
    tensors = [tensor.to(device) for tensor in (coarse, sparse, *gate, *fuser)]
    there = (tensors[0], tensors[1], tuple(tensors[2:6]), tuple(tensors[6:]), residual)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    if isinstance(engine, CpuEngine):
        refined = cpu.gated(engine.kernels.library, *there)  # type: ignore[arg-type]
    else:
        from sparserefine.engines.triton.gate import gated

        refined = gated(*there)  # type: ignore[arg-type, assignment]
    torch.use_deterministic_algorithms(before)
    assert refined is not None
    assert refined.dtype == torch.float32
    assert refined.shape == coarse.shape
    return refined.cpu()


def run(name: str, ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    return gated(name, coarse, sparse, weights_of(ensembler.gate), weights_of(ensembler.fuser), ensembler.residual)


def expected_of(ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    double = GatedEnsembler(coarse.shape[1], "residual" if ensembler.residual else "paper", len(ensembler.gate[0].bias))
    double.load_state_dict(ensembler.state_dict())
    with torch.inference_mode():
        return double.double()(coarse.double(), sparse.double())


@pytest.mark.parametrize("fuser", ["residual", "paper"])
@pytest.mark.parametrize(
    ("engine", "classes", "sites"),
    on_each(
        [(classes, 41) for classes in (1, 2, 16, 17, 19, 64, 65)],
        [(classes, sites) for classes in CLASSES for sites in (0, 1, 15, 16, 17, 1000)],
        late=[(classes, 41) for classes in (150, 256)],
    ),
)
def test_definition(engine: str, classes: int, sites: int, fuser: Fuser) -> None:
    ensembler, both = ensembler_of(classes, fuser), logits_of(sites, classes)
    assert_close(run(engine, ensembler, *both), expected_of(ensembler, *both))


@pytest.mark.parametrize("sites", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_sites(engine: str, classes: int, sites: int) -> None:
    ensembler, both = ensembler_of(classes), logits_of(sites, classes)
    assert_close(run(engine, ensembler, *both), expected_of(ensembler, *both))


@pytest.mark.parametrize(
    ("engine", "classes", "hidden"),
    on_each(
        [(classes, hidden) for classes in (2, 40) for hidden in (1, 7, 16, 65, 130)],
        [(classes, hidden) for classes in (2, 5) for hidden in (1, 7, 8, 65)],
    ),
)
def test_hidden_widths(engine: str, classes: int, hidden: int) -> None:
    ensembler, both = ensembler_of(classes, hidden=hidden), logits_of(40, classes)
    assert_close(run(engine, ensembler, *both), expected_of(ensembler, *both))


@pytest.mark.parametrize("hidden", [21, 41])
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_two_hidden_widths(engine: str, hidden: int) -> None:
    coarse, sparse = logits_of(40, 3)
    narrow, wide = ensembler_of(3, "paper", 11), ensembler_of(3, "paper", hidden)
    for parameter in (narrow.gate[2].weight, wide.gate[2].weight):
        parameter.zero_()
    wide.gate[2].bias.copy_(narrow.gate[2].bias)  # the gates are constant and equal, so the fuser alone decides
    refined = gated(engine, coarse, sparse, weights_of(narrow.gate), weights_of(wide.fuser), False)
    assert_close(refined, expected_of(wide, coarse, sparse))


@pytest.mark.parametrize(
    ("engine", "classes", "fuser", "mixed", "undecided"),
    on_each(
        [(classes, "residual", 4, 1) for classes in (2, 19, 150)],
        [(classes, fuser, 6, 6) for classes in CLASSES for fuser in ("residual", "paper")],
    ),
)
def test_extreme_logits(engine: str, classes: int, fuser: Fuser, mixed: int, undecided: int) -> None:
    """Certain, contradicting and undecided predictions in all combinations."""
    signs = torch.randint(0, 2, (mixed, classes)) * 2.0 - 1
    both_ends = [torch.full((2, classes), 80.0), torch.full((1, classes), -80.0)]
    kinds = torch.cat([80 * signs, *both_ends, torch.zeros(undecided, classes)])
    kinds[2:4] = -80
    kinds[2, 0] = kinds[3, -1] = 80
    which = torch.cartesian_prod(torch.arange(len(kinds)), torch.arange(len(kinds)))
    coarse, sparse = kinds[which[:, 0]], kinds[which[:, 1]]
    ensembler = ensembler_of(classes, fuser)
    refined, expected = run(engine, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse)
    # These logits are 25 times those of the other tests, and so are the terms that cancel where a result is small.
    torch.testing.assert_close(refined.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("opened", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_closed_and_open_gates(engine: str, opened: float, classes: int) -> None:
    ensembler, (coarse, sparse) = ensembler_of(classes), logits_of(50, classes)
    ensembler.gate[2].bias.fill_(opened)
    assert_close(run(engine, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse))
    for parameter in ensembler.fuser[2].parameters():
        parameter.zero_()
    assert_close(run(engine, ensembler, coarse, sparse), coarse if opened > 0 else sparse)


@pytest.mark.parametrize(
    ("engine", "classes", "sites"),
    on_each([(classes, 90) for classes in (2, 19, 65)], [(classes, 600) for classes in CLASSES]),
)
def test_sites_do_not_see_each_other(engine: str, classes: int, sites: int) -> None:
    ensembler, (coarse, sparse) = ensembler_of(classes), logits_of(sites, classes)
    refined, bad_site = run(engine, ensembler, coarse, sparse), sites // 2
    # Programs of a GPU share no sites; those of a part begin where they began.
    parts = ((32, 60),) if sites == 90 else ((5, 600), (0, 301), (250, 260))
    for start, end in parts:
        assert torch.equal(run(engine, ensembler, coarse[start:end], sparse[start:end]), refined[start:end])
    for bad in (math.nan, math.inf) if sites == 90 else (math.nan, math.inf, -math.inf):
        coarse[bad_site, 0] = bad
        touched = run(engine, ensembler, coarse, sparse)
        others = torch.arange(sites) != bad_site
        assert torch.equal(touched[others], refined[others])
        assert not touched[bad_site].isfinite().all()
