"""The GPU's gated ensembler against the module that defines it."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from sparserefine.sparse import Perceptron
from sparserefine.stages.ensembler import GatedEnsembler
from support import TRITON_ENGINES, assert_close, device_of, needs_triton

Fuser = Literal["residual", "paper"]

# The interpreter tells of infinite values aloud.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    needs_triton(gpu=request.param == "triton-gpu")
    return device_of(request.param)


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


def run(device: torch.device, ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    """On the CPU; a result that was not written is NaN."""
    from sparserefine.engines.triton.gate import gated

    ensembler = ensembler.to(device)
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    refined = gated(coarse.to(device), sparse.to(device), gate, fuser, ensembler.residual)
    torch.use_deterministic_algorithms(before)
    assert refined is not None
    assert refined.dtype == torch.float32
    assert refined.shape == coarse.shape
    return refined.cpu()


def expected_of(ensembler: GatedEnsembler, coarse: Tensor, sparse: Tensor) -> Tensor:
    double = GatedEnsembler(coarse.shape[1], "residual" if ensembler.residual else "paper", len(ensembler.gate[0].bias))
    double.load_state_dict(ensembler.state_dict())
    with torch.inference_mode():
        return double.double()(coarse.double(), sparse.double())


def logits_of(sites: int, classes: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(sites, classes), 3 * torch.randn(sites, classes)


@pytest.mark.parametrize("fuser", ["residual", "paper"])
@pytest.mark.parametrize(
    "classes", [1, 2, 16, 17, 19, 64, 65, *(pytest.param(k, marks=pytest.mark.slow) for k in (150, 256))]
)
def test_classes(device: torch.device, classes: int, fuser: Fuser) -> None:
    ensembler, both = ensembler_of(classes, fuser), logits_of(41, classes)
    assert_close(run(device, ensembler, *both), expected_of(ensembler, *both))


@pytest.mark.parametrize("sites", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("classes", [2, 19])
def test_sites(device: torch.device, classes: int, sites: int) -> None:
    ensembler, both = ensembler_of(classes), logits_of(sites, classes)
    assert_close(run(device, ensembler, *both), expected_of(ensembler, *both))


@pytest.mark.parametrize("hidden", [1, 7, 16, 65, 130])
@pytest.mark.parametrize("classes", [2, 40])
def test_hidden_widths(device: torch.device, classes: int, hidden: int) -> None:
    ensembler, both = ensembler_of(classes, hidden=hidden), logits_of(40, classes)
    assert_close(run(device, ensembler, *both), expected_of(ensembler, *both))


def test_two_hidden_widths(device: torch.device) -> None:
    from sparserefine.engines.triton.gate import gated

    coarse, sparse = logits_of(40, 3)
    narrow, wide = ensembler_of(3, "paper", 11), ensembler_of(3, "paper", 41)
    for parameter in (narrow.gate[2].weight, wide.gate[2].weight):
        parameter.zero_()
    wide.gate[2].bias.copy_(narrow.gate[2].bias)  # the gates are constant and equal, so the fuser alone decides
    narrow, wide = narrow.to(device), wide.to(device)
    refined = gated(coarse.to(device), sparse.to(device), weights_of(narrow.gate), weights_of(wide.fuser), False)
    assert refined is not None
    assert_close(refined.cpu(), expected_of(wide, coarse, sparse))


@pytest.mark.parametrize("classes", [2, 19, 150])
def test_extreme_logits(device: torch.device, classes: int) -> None:
    """Certain, contradicting and undecided predictions in all combinations."""
    signs = torch.randint(0, 2, (4, classes)) * 2.0 - 1
    kinds = torch.cat([80 * signs, torch.full((2, classes), 80.0), torch.full((1, classes), -80.0), signs[:1] * 0])
    kinds[2:4] = -80
    kinds[2, 0] = kinds[3, -1] = 80
    which = torch.cartesian_prod(torch.arange(len(kinds)), torch.arange(len(kinds)))
    coarse, sparse = kinds[which[:, 0]], kinds[which[:, 1]]
    ensembler = ensembler_of(classes)
    refined, expected = run(device, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse)
    # These logits are 25 times those of the other tests, and so are the terms that cancel where a result is small.
    torch.testing.assert_close(refined.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opened", [-200.0, -20.0, 20.0, 200.0])
def test_closed_and_open_gates(device: torch.device, opened: float) -> None:
    ensembler, (coarse, sparse) = ensembler_of(19), logits_of(50, 19)
    ensembler.gate[2].bias.fill_(opened)
    assert_close(run(device, ensembler, coarse, sparse), expected_of(ensembler, coarse, sparse))
    for parameter in ensembler.fuser[2].parameters():
        parameter.zero_()
    assert_close(run(device, ensembler, coarse, sparse), coarse if opened > 0 else sparse)


@pytest.mark.parametrize("classes", [2, 19, 65])
def test_sites_do_not_see_each_other(device: torch.device, classes: int) -> None:
    ensembler, (coarse, sparse) = ensembler_of(classes), logits_of(90, classes)
    refined = run(device, ensembler, coarse, sparse)
    assert torch.equal(run(device, ensembler, coarse[32:60], sparse[32:60]), refined[32:60])
    for bad in (math.nan, math.inf):
        coarse[43, 0] = bad
        touched = run(device, ensembler, coarse, sparse)
        others = torch.arange(90) != 43
        assert torch.equal(touched[others], refined[others])
        assert not touched[43].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts(device: torch.device, dtype: torch.dtype) -> None:
    ensembler, (coarse, sparse) = ensembler_of(5).to(dtype), logits_of(40, 5)
    expected = expected_of(ensembler, coarse, sparse)
    strided = coarse.t().contiguous().t()
    assert_close(run(device, ensembler, strided, torch.cat([sparse, sparse], 1)[:, :5]), expected)


def test_what_no_kernel_does(device: torch.device) -> None:
    from sparserefine.engines.triton.gate import MAX_CLASSES, gated

    ensembler = ensembler_of(3).to(device)
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    coarse, sparse = (logits.to(device) for logits in logits_of(4, 3))
    assert gated(coarse.half(), sparse, gate, fuser, True) is None
    assert gated(coarse, sparse.double(), gate, fuser, True) is None
    assert gated(coarse.to("meta"), sparse, gate, fuser, True) is None
    assert gated(coarse.clone().requires_grad_(), sparse, gate, fuser, True) is None
    ensembler.requires_grad_()
    assert gated(coarse, sparse, gate, fuser, True) is None
    with torch.no_grad():
        assert gated(coarse, sparse, gate, fuser, True) is not None
    many = ensembler_of(MAX_CLASSES + 1).to(device)
    both = torch.zeros(4, MAX_CLASSES + 1, device=device)
    assert gated(both, both, weights_of(many.gate), weights_of(many.fuser), True) is None
