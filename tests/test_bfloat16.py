"""Convolutions of the CPU engine in bfloat16 against engine ``torch`` in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu.convolution import cpu_conv_weight
from sparserefine.sparse import Plan, PlanSpec, SparseUNet, Stencil
from support import engine_of

ROUNDED = 2.0**-8
"""Largest relative error of one rounding to bfloat16; sums are float32."""


@pytest.fixture(params=[True, False], ids=["pairs", "without"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The CPU engine, with the processor's products of bfloat16 and without."""
    cpu = engine_of("cpu")
    if request.param and not cpu.kernels.has_bf16:
        pytest.skip("this processor or object has no AVX512-BF16")
    monkeypatch.setattr(cpu.kernels, "has_bf16", request.param)
    return cpu


def sites_mask(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 1, 9, 11, generator=generator), (70, 83), mode="bicubic")
    return (smooth[:, 0] - 0.5).abs() < 0.06


def stencil_of(plan: Plan, kind: str) -> Stencil:
    level = plan.levels[0]
    assert level.down is not None
    return {"around": level.around, "down": level.down, "up": level.down.transposed()}[kind]


def rounded(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("channels", [(3, 16), (16, 16), (32, 48), (18, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["around", "down", "up"])
@pytest.mark.parametrize("down", ["cell", "paper"])
def test_results_and_gradients(engine, down, kind, channels) -> None:
    torch.manual_seed(1)
    spec, mask = PlanSpec(2, down), sites_mask()
    ours, reference = (stencil_of(of.plan(mask, spec), kind) for of in (engine, get_engine("torch")))
    x, weight = rounded(ours.num_inputs, channels[0]), rounded(ours.taps, *channels)
    grad, results = rounded(ours.num_outputs, channels[1]), []
    for stencil, dtype in ((ours, torch.bfloat16), (reference, torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        y = stencil.conv(*leaves)
        y.backward(grad.to(dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for own, expected in zip(*results, strict=True):
        assert own.dtype == torch.bfloat16
        assert float((own - expected).norm() / expected.norm()) < ROUNDED


def test_no_sites(engine) -> None:
    plan = engine.plan(torch.zeros(1, 8, 8, dtype=torch.bool), PlanSpec(2, "cell"))
    x = torch.zeros(0, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(9, 4, 6, dtype=torch.bfloat16, requires_grad=True)
    y = plan.levels[0].around.conv(x, weight)
    y.sum().backward()
    assert y.shape == (0, 6)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_same_bits_for_any_number_of_threads(engine) -> None:
    stencil = stencil_of(engine.plan(sites_mask(), PlanSpec(2, "cell")), "around")
    x, grad = rounded(stencil.num_inputs, 24), rounded(stencil.num_outputs, 40)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    cpu_conv_weight(x, grad, stencil.table, engine.kernels.library.name),
                    stencil.conv(x, torch.ones(9, 24, 8, dtype=torch.bfloat16)),
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_tables_out_of_range_are_refused() -> None:
    kernels = engine_of("cpu").kernels
    if not kernels.has_bf16:
        pytest.skip("this processor or object has no AVX512-BF16")
    x, weight, out = rounded(5, 4), rounded(1, 4, 8), rounded(3, 8)
    good = torch.tensor([[0], [5], [4]], dtype=torch.int32)
    kernels.convolve_bf16(x, good, weight, out)
    for bad in (6, -1):
        table = torch.tensor([[0], [bad], [4]], dtype=torch.int32)
        with pytest.raises(IndexError):
            kernels.convolve_bf16(x, table, weight, out)
        with pytest.raises(IndexError):
            kernels.weight_gradient(x, out, table)
    with pytest.raises(IndexError):
        kernels.convolve_bf16(x, good, weight, out, rows=torch.tensor([0, 1, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="C_in even"):
        kernels.convolve_bf16(rounded(5, 3), good, rounded(1, 3, 8), out)


def test_a_network_learns_in_bfloat16_as_in_float32(engine) -> None:
    torch.manual_seed(2)
    plan = engine.plan(sites_mask(), PlanSpec(3, "cell"))
    network = SparseUNet(3, 2, (8, 16, 24), blocks=1, down="cell")
    features, gradients = torch.randn(len(plan.sites), 3), []
    for enabled in (True, False):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = network(features, plan)
        logits.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99
