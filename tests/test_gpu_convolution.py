"""Convolutions whose sums several programs share out, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparserefine.sparse.epilogue import Activation, Epilogue
from support import TRITON_ENGINES, assert_close, device_of, engine_of

N_IN, N_OUT, C_OUT = 30, 37, 20


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    engine_of(request.param)
    return device_of(request.param)


def expected(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    padded = torch.cat([x.double(), x.new_zeros(1, x.shape[1]).double()])
    return torch.einsum("ntc,tcd->nd", padded[table.long()], weight.double())


def by_parity(table: Tensor) -> Tensor:
    """Leaves each output the taps of its parity; returns how many outputs have each, which are in that order."""
    parity = torch.arange(N_OUT) * 4 // N_OUT
    taps = torch.arange(9)
    reached = (taps // 3 % 2 == parity[:, None] // 2) & (taps % 3 % 2 == parity[:, None] % 2)
    table[~reached] = N_IN
    return torch.bincount(parity, minlength=4).int()


@pytest.mark.parametrize("ordered", [False, True], ids=["table", "by parity"])
@pytest.mark.parametrize("counted", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_shared_sums(
    device: torch.device, dtype: torch.dtype, counted: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparserefine.engines.triton import convolution
    from sparserefine.engines.triton.convolution import Order

    c_in, used = 40, N_OUT - 6 if counted else N_OUT
    table = torch.randint(0, N_IN + 1, (N_OUT, 9), dtype=torch.int32)
    counts = by_parity(table) if ordered else None
    x, weight = torch.randn(N_IN, c_in).to(dtype), (torch.randn(9, c_in, C_OUT) / 19).to(dtype)
    residual, bias, scale, shift = torch.randn(N_OUT, C_OUT).to(dtype), *torch.randn(3, C_OUT)
    sums = expected(x, weight, table) + residual.double() + bias.double()
    activated = (sums * scale.double() + shift.double()).clamp(min=0)
    order = None
    if counts is not None:
        if counted:
            counts[3] -= N_OUT - used
        order = Order(torch.arange(N_OUT, dtype=torch.int32, device=device), counts.to(device))
    for shares in (1, 2, 3, 7):
        tiling = convolution.Tiling(16, 16, 16, 4, 2, shares)
        monkeypatch.setattr(convolution, "tiling", lambda *_, tiling=tiling: tiling)
        raw, active = torch.full((2, N_OUT, C_OUT), torch.nan, dtype=dtype, device=device).unbind()
        epilogue = Epilogue(
            residual.to(device), bias.to(device), raw, (Activation(active, scale.to(device), shift.to(device)),)
        )
        count = torch.tensor([used], dtype=torch.int32, device=device) if counted else None
        arguments = (x.to(device), weight.to(device), epilogue, N_OUT)
        convolution.convolve(*arguments, table=table.to(device), order=order, count=count)
        assert_close(raw[:used].cpu(), sums[:used], dtype)
        assert_close(active[:used].cpu(), activated[:used], dtype)
        assert raw[used:].isnan().all()  # padding is not written


def test_which_sums_are_shared() -> None:
    """Few rows and long sums, in half precision; a network of many sites stays as it is."""
    pytest.importorskip("triton")
    from sparserefine.engines.triton.convolution import tiling

    deep, half = (806, 1024, 1024), torch.float16
    assert tiling(*deep, half, "ieee", 9).shares == 4
    assert tiling(*deep, torch.float32, "tf32", 9).shares == 1
    assert tiling(*deep, half, "ieee").shares == 1
    assert tiling(100_000, 256, 256, half, "ieee", 9).shares == 1
    assert tiling(0, 1024, 1024, half, "ieee", 9).shares == 1
