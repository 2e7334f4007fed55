"""The GPU's kernels of uncertainty and of access to the sites against the torch definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparserefine.images import uncertainty as definition
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Axis, Upsampling, Window
from sparserefine.sparse import PaddedSites, Sites
from support import TRITON_ENGINES, assert_close, device_of, mask_of, needs_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter divides by 0 aloud

UPSAMPLINGS = [
    pytest.param(Upsampling(), id="logits"),
    pytest.param(Upsampling(outputs="scores"), id="scores"),
    pytest.param(Upsampling("nearest", input_size=(14, 20)), id="nearest"),
    pytest.param(Upsampling("nearest", "scores", (7, 5)), id="nearest scores"),
]
SIZES = [  # coarse, full
    pytest.param((5, 7), (5, 7), id="1x"),
    pytest.param((4, 8), (8, 16), id="2x"),
    pytest.param((3, 33), (12, 132), id="4x"),
    pytest.param((2, 5), (17, 37), id="8x"),
    pytest.param((20, 31), (7, 9), id="smaller"),
    pytest.param((1, 1), (3, 5), id="one coarse pixel"),
    pytest.param((5, 50), (1, 1), id="one pixel"),
]


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


def coarse_of(classes: int, size: tuple[int, int], upsampling: Upsampling = Upsampling(), batch: int = 1) -> Tensor:  # noqa: B008
    values = 3 * torch.randn(batch, classes, *size)
    return values.exp() if upsampling.outputs == "scores" else values


def check(
    gpu: ModuleType,
    device: torch.device,
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    upsampling: Upsampling,
    windows: Sequence[Window] | None = None,
) -> None:
    """Uncertainty of all pixels and samples of some, against the definitions."""
    there = logits.to(device) if isinstance(logits, Tensor) else [image.to(device) for image in logits]
    labels, entropies = (t.cpu() for t in gpu.uncertainty(Coarse(there, size, upsampling, windows)))
    expected_labels, expected_entropies = definition.uncertainty(Coarse(logits, size, upsampling, windows))
    assert labels.dtype == expected_labels.dtype
    assert_close(entropies, expected_entropies)
    assert entropies.min() >= 0
    coords = torch.ones(len(logits), *size).nonzero().int()
    dense = definition.sample(Coarse(logits, size, upsampling, windows), coords)
    best = dense.topk(min(2, dense.shape[1])).values
    clear = ((best[:, 0] - best[:, -1] > 1e-5) | (dense.shape[1] == 1)).view_as(labels)
    assert torch.equal(labels[clear], expected_labels[clear])
    assert clear.float().mean() > 0.95
    some = coords[::3].contiguous()
    assert_close(gpu.sample(Coarse(there, size, upsampling, windows), some.to(device)).cpu(), dense[::3])


# ---- uncertainty and samples


@pytest.mark.parametrize(("coarse", "size"), SIZES)
@pytest.mark.parametrize("classes", [2, 5])
def test_sizes(
    gpu: ModuleType, device: torch.device, classes: int, coarse: tuple[int, int], size: tuple[int, int]
) -> None:
    check(gpu, device, coarse_of(classes, coarse), size, Upsampling())


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 19])
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_classes_and_modes(gpu: ModuleType, device: torch.device, classes: int, upsampling: Upsampling) -> None:
    check(gpu, device, coarse_of(classes, (3, 7), upsampling, batch=2), (9, 23), upsampling)


@pytest.mark.parametrize("outputs", ["logits", "scores"])
def test_many_classes(gpu: ModuleType, device: torch.device, outputs: str) -> None:
    """Labels are int16 then."""
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = coarse_of(257, (1, 3), upsampling)
    logits[:, 256, :, 1] = 30
    check(gpu, device, logits, (1, 5), upsampling)


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("classes", [2, 4])
def test_windows(gpu: ModuleType, device: torch.device, classes: int, upsampling: Upsampling) -> None:
    windows = [Window((31.7, 36.2), (0.4, 13.9)), Window((10.5, 21.25), (-2.5, -1.0)), Window((400, 400), (131, 199))]
    check(gpu, device, coarse_of(classes, (8, 10), upsampling, batch=3), (13, 21), upsampling, windows)


@pytest.mark.parametrize("outputs", ["logits", "scores"])
def test_images_of_several_sizes(gpu: ModuleType, device: torch.device, outputs: str) -> None:
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = [coarse_of(3, size, upsampling)[0] for size in ((4, 5), (10, 13), (1, 2))]
    check(gpu, device, logits, (11, 17), upsampling)
    check(gpu, device, logits[1:2], (11, 17), upsampling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [2, 3])
def test_other_precisions_and_layouts(gpu: ModuleType, device: torch.device, classes: int, dtype: torch.dtype) -> None:
    logits = coarse_of(classes, (6, 11), batch=2).to(dtype)
    check(gpu, device, logits, (5, 23), Upsampling())
    check(gpu, device, logits.to(memory_format=torch.channels_last), (5, 23), Upsampling())
    check(gpu, device, logits[:, :, 1:-2, 2:-1], (5, 23), Upsampling())
    check(gpu, device, logits[:1].expand(2, -1, -1, -1), (5, 23), Upsampling())


@pytest.mark.parametrize("upsampling", [Upsampling(), Upsampling(outputs="scores")], ids=["logits", "scores"])
@pytest.mark.parametrize("classes", [2, 19])
def test_precision(gpu: ModuleType, device: torch.device, classes: int, upsampling: Upsampling) -> None:
    """Without interpolation, so that exp, log and the sums are what is judged."""
    logits = coarse_of(classes, (8, 120), upsampling) * (
        1e-3 if upsampling.outputs == "scores" else torch.rand(1, 1, 8, 120) * 6
    )
    values = logits.double()
    if upsampling.outputs == "scores":
        values = (values / values.sum(1, keepdim=True)).clamp_min(1e-10).log()
    log_p = values.log_softmax(1)
    expected = -(log_p.exp() * log_p).sum(1)
    entropies = gpu.uncertainty(Coarse(logits.to(device), (8, 120), upsampling))[1].cpu()
    assert (entropies - expected).abs().max() < 1.5e-6
    if classes == 2 and upsampling.outputs == "logits":  # as precise where the entropy is tiny
        small = (expected > 1e-9) & (expected < 1e-3)
        assert small.any()
        assert ((entropies - expected).abs() / expected)[small].max() < 5e-6


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("value", [200.0, 1e4])
def test_certain_pixels(gpu: ModuleType, device: torch.device, classes: int, value: float) -> None:
    certain = value * torch.eye(classes, device=device).view(1, classes, 1, classes)
    labels, entropies = gpu.uncertainty(Coarse(certain, (1, classes)))
    assert labels[0, 0].tolist() == list(range(classes))
    assert entropies.abs().max() == 0
    opposite = gpu.uncertainty(Coarse(-certain, (1, classes)))[1]
    assert_close(opposite.cpu(), torch.full((1, 1, classes), math.log(classes - 1)))


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_uniform_pixels(gpu: ModuleType, device: torch.device, classes: int) -> None:
    for upsampling, value in (
        (Upsampling(), 7.0),
        (Upsampling(outputs="scores"), 0.0),
        (Upsampling(outputs="scores"), 0.25),
    ):
        labels, entropies = gpu.uncertainty(
            Coarse(torch.full((1, classes, 1, 5), value, device=device), (2, 10), upsampling)
        )
        assert labels.max() == 0
        assert_close(entropies.cpu(), torch.full((1, 2, 10), math.log(classes)))


def test_some_pixels_without_any_score(gpu: ModuleType, device: torch.device) -> None:
    upsampling = Upsampling(outputs="scores")
    scores = coarse_of(4, (6, 9), upsampling)
    scores[..., 2:5, 3:7] = 0
    labels, entropies = gpu.uncertainty(Coarse(scores.to(device), (12, 18), upsampling))
    expected = definition.uncertainty(Coarse(scores, (12, 18), upsampling))
    assert torch.equal(labels.cpu(), expected[0])
    assert_close(entropies.cpu(), expected[1])
    coords = torch.ones(1, 12, 18).nonzero().int()
    sampled = gpu.sample(Coarse(scores.to(device), (12, 18), upsampling), coords.to(device))
    assert_close(sampled.cpu(), definition.sample(Coarse(scores, (12, 18), upsampling), coords))


@pytest.mark.parametrize("upsampling", [Upsampling(), Upsampling(outputs="scores")], ids=["logits", "scores"])
def test_of_equals_the_first_wins(gpu: ModuleType, device: torch.device, upsampling: Upsampling) -> None:
    half = coarse_of(5, (4, 9), upsampling).to(device)
    labels, _ = gpu.uncertainty(Coarse(half, (11, 30), upsampling))
    doubled, _ = gpu.uncertainty(Coarse(torch.cat([half, half], dim=1), (11, 30), upsampling))
    assert torch.equal(doubled, labels)
    assert gpu.uncertainty(Coarse(torch.zeros(1, 2, 3, 5, device=device), (6, 10), upsampling))[0].max() == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 3e38])
@pytest.mark.parametrize("outputs", ["logits", "scores"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("channel", [0, 1])
def test_bad_values_stay_where_they_are(
    gpu: ModuleType, device: torch.device, channel: int, classes: int, outputs: str, bad: float
) -> None:
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = coarse_of(classes, (5, 12), upsampling).to(device)
    expected_labels, expected = gpu.uncertainty(Coarse(logits, (10, 24), upsampling))
    logits[0, channel, 2, 6] = bad
    labels, entropies = gpu.uncertainty(Coarse(logits, (10, 24), upsampling))
    assert labels.max() < classes
    touched = torch.zeros(10, 24, dtype=torch.bool, device=device)
    touched[3:7, 11:15] = True
    assert torch.equal(entropies[0, ~touched], expected[0, ~touched])
    assert torch.equal(labels[0, ~touched], expected_labels[0, ~touched])
    if outputs == "logits" and not math.isfinite(bad):
        assert entropies[0, touched].isnan().all()
    assert gpu.sample(Coarse(logits, (10, 24), upsampling), touched[None].nonzero().int()).shape == (16, classes)


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


def test_no_site(gpu: ModuleType, device: torch.device) -> None:
    sites = Sites.from_mask(torch.zeros(2, 9, 13, dtype=torch.bool, device=device))
    logits = coarse_of(5, (4, 5), batch=2).to(device)
    assert gpu.sample(Coarse(logits, (9, 13)), sites.coords).shape == (0, 5)
    image, ones = torch.rand(2, 3, 9, 13, device=device), torch.ones(3, device=device)
    assert gpu.pixels(image, sites.coords, ones, ones).shape == (0, 3)
    labels = torch.ones(2, 9, 13, dtype=torch.uint8, device=device)
    gpu.write_labels(labels, torch.zeros(0, 5, device=device), sites)
    assert labels.min() == 1


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


@pytest.mark.parametrize("pattern", ["one", "random", "all"])
@pytest.mark.parametrize("classes", [1, 2, 19, 255, 300])
def test_write_labels(gpu: ModuleType, device: torch.device, classes: int, pattern: str) -> None:
    sites = Sites.from_mask(mask_of(pattern, (9, 11), batch=3).to(device))
    logits = torch.randint(-4, 4, (len(sites), classes), device=device).float()  # many ties
    logits[1::7] -= 100
    labels = torch.randint(0, 2, (3, 9, 11)).to(label_dtype(classes)).to(device)
    expected = labels.clone()
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    expected.view(-1)[sites.flat] = first.to(labels.dtype)
    gpu.write_labels(labels, logits, sites)
    assert torch.equal(labels, expected)


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

IMAGE = torch.rand(2, 3, 8, 9)


def test_taps_outside_are_refused(gpu: ModuleType, device: torch.device) -> None:
    coarse = Coarse(IMAGE[:1].to(device), (8, 9), windows=[Window((8, 9))])
    object.__setattr__(coarse, "windows", (Window((math.nan, 9)),))
    with pytest.raises(ValueError, match="taps reach outside"):
        gpu.uncertainty(coarse)


def test_what_is_taken(gpu: ModuleType, device: torch.device) -> None:
    plain, wanted = torch.zeros(2, device=device), torch.zeros(2, device=device, requires_grad=True)
    assert gpu.takes(plain, plain)
    assert not gpu.takes(plain, wanted)
    assert not gpu.takes(plain, plain.to("meta"))
    with torch.no_grad():
        assert gpu.takes(plain, wanted)
        check(gpu, device, IMAGE.clone().requires_grad_(), (8, 9), Upsampling())


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
