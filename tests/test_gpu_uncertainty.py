"""What the GPU's kernels of uncertainty and of access to the sites take beyond the others': any order, padding, graphs.

That values are those of the definitions is in ``test_conformance_uncertainty.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparserefine.images import uncertainty as definition
from sparserefine.images.coarse import Coarse
from sparserefine.images.upsampling import Axis, Upsampling
from sparserefine.sparse import PaddedSites, Sites
from support import TRITON_ENGINES, assert_close, device_of, mask_of, needs_triton
from test_conformance_uncertainty import coarse_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter divides by 0 aloud


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    needs_triton(gpu=request.param == "triton-gpu")
    return device_of(request.param)


@pytest.fixture
def gpu(device: torch.device) -> Iterator[ModuleType]:
    """The module under test; what it allocates is filled with garbage first."""
    from sparserefine.engines.triton import uncertainty

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN, or the largest integer
    yield uncertainty
    torch.use_deterministic_algorithms(before)


# ---- uncertainty and samples


@pytest.mark.parametrize("outputs", ["logits", "scores"])
def test_coords_of_any_layout_and_order(gpu: ModuleType, device: torch.device, outputs: str) -> None:
    """Padding, too, is sampled: rows of zeros behind those of the last image."""
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = coarse_of(18, (5, 6), upsampling, batch=2)
    coords = torch.cat([mask_of("random", (17, 21), 2).nonzero().int(), torch.zeros(9, 3, dtype=torch.int32)])
    order = coords[:, 0].sort(stable=True).indices
    expected = definition.sample(Coarse(logits, (17, 21), upsampling), coords[order])[order.argsort()]
    wide = torch.zeros(len(coords), 2, 4, dtype=torch.int32, device=device)
    wide[:, 1, 1:] = coords.to(device)
    for images in (logits.to(device), list(logits.to(device))):
        for given in (coords.to(device), coords.t().contiguous().t().to(device), wide[:, 1, 1:]):
            assert_close(gpu.sample(Coarse(images, (17, 21), upsampling), given).cpu(), expected)


# ---- taps


def test_rows_are_split_where_their_coarse_rows_change(device: torch.device) -> None:
    from sparserefine.engines.triton.uncertainty import _device_taps

    for out, coarse, full, offset in ((37, 5, 37.0, 0.0), (40, 10, 40.0, 0.0), (9, 30, 9.0, 0.0), (50, 4, 20.0, -9.5)):
        taps = _device_taps(Axis(out, coarse, full, offset), device)
        assert taps.low.dtype == taps.high.dtype == taps.blocks.dtype == torch.int32
        covered: list[int] = []
        for first, end in taps.blocks.tolist():
            assert 0 < end - first <= taps.length
            assert len(taps.low[first:end].unique()) == len(taps.high[first:end].unique()) == 1
            covered += range(first, end)
        assert covered == list(range(out))


def test_taps_live_as_long_as_the_logits(gpu: ModuleType, device: torch.device) -> None:
    """A CUDA graph reads them as often as it is replayed, and owns its coarse logits."""
    coarse = Coarse(coarse_of(2, (3, 4)).to(device), (6, 8))
    gpu.uncertainty(coarse)
    kept = {axis: id(taps) for axis, taps in coarse.kept.items()}
    assert set(kept) == set(coarse.axes(0))
    gpu._device_taps.cache_clear()
    gpu.sample(coarse, torch.zeros(1, 3, dtype=torch.int32, device=device))
    assert {axis: id(taps) for axis, taps in coarse.kept.items()} == kept


# ---- sites


@pytest.mark.parametrize("pattern", ["one", "border", "random", "all"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pixels(gpu: ModuleType, device: torch.device, channels: int, dtype: torch.dtype, pattern: str) -> None:
    sites = Sites.from_mask(mask_of(pattern, (13, 11), batch=3).to(device))
    image = torch.randint(0, 256, (3, channels, 13, 11)).to(dtype).to(device)
    scale, shift = torch.rand(channels, device=device) + 0.5, torch.rand(2 * channels, device=device)[::2]
    expected = sites.gather(image).float() * scale + shift
    for given in (image, image.to(memory_format=torch.channels_last), image.flip(0).flip(3).flip(3).flip(0)):
        actual = gpu.pixels(given, sites.coords, scale, shift)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


def test_pixels_of_a_part_of_an_image(gpu: ModuleType, device: torch.device) -> None:
    sites = Sites.from_mask(mask_of("random", (8, 9)).to(device))
    image = torch.rand(1, 4, 20, 30, device=device)[:, 1:, 3:11, 2:20:2]
    expected = sites.gather(image) * 2 - 1
    factors = torch.tensor([2.0] * 3, device=device), torch.tensor([-1.0] * 3, device=device)
    assert_close(gpu.pixels(image, sites.coords, *factors), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("used", [0, 1, 130])
def test_padding_is_not_written(gpu: ModuleType, device: torch.device, used: int, dtype: torch.dtype) -> None:
    mask = torch.ones(1, 10, 20, dtype=torch.bool, device=device)
    mask[0, 0, 0] = False  # where padding points to
    coords = Sites.from_mask(mask).coords
    coords[used:] = 0
    count = torch.tensor([used], dtype=torch.int32, device=device)
    sites = PaddedSites(Sites(coords, 1, 10, 20), count)
    logits = torch.randn(len(coords), 3, device=device).to(dtype)
    logits[used:, 2] = math.nan
    wide = torch.full((1, 10, 40), 77, dtype=torch.int16, device=device)
    labels = wide[..., ::2]
    expected = labels.clone()
    expected[mask] = torch.where(torch.arange(199, device=device) < used, logits[:, :].nan_to_num(-9).argmax(1), 77).to(
        torch.int16
    )
    gpu.write_labels(labels, logits, sites)
    assert torch.equal(labels, expected)
    assert wide[..., 1::2].eq(77).all()


# ---- which tensors


def test_what_is_taken(gpu: ModuleType, device: torch.device) -> None:
    plain, wanted = torch.zeros(2, device=device), torch.zeros(2, device=device, requires_grad=True)
    assert gpu.runs_kernels_on(plain, plain)
    assert not gpu.runs_kernels_on(plain, wanted)
    assert not gpu.runs_kernels_on(plain, plain.to("meta"))
    with torch.no_grad():
        assert gpu.runs_kernels_on(plain, wanted)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    needs_triton(gpu=True)
    from sparserefine.engines.triton import uncertainty as gpu

    coarse = Coarse(coarse_of(19, (16, 32), batch=2).cuda(), (64, 128))
    coords = mask_of("random", (64, 128), 2).nonzero().int().cuda()

    def call() -> list[Tensor]:
        return [*gpu.uncertainty(coarse), gpu.sample(coarse, coords)]

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    coarse.logits.copy_(coarse_of(19, (16, 32), batch=2))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, call(), strict=True))
