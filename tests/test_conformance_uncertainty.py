"""Labels, entropy, logits, pixels at the sites: the kernels of every engine against the definitions, which torch runs.

What one engine alone promises is in ``test_cpu_uncertainty.py`` and ``test_gpu_uncertainty.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.images import uncertainty as definition
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.sparse import Sites
from support import CPU_ENGINES, KERNEL_ENGINES, assert_close, device_of, engine_of, mask_of, on_each

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter divides by 0 aloud

OUTPUTS = ("logits", "scores")
LOGITS, SCORES = Upsampling(), Upsampling(outputs="scores")
UPSAMPLINGS = [
    pytest.param(LOGITS, id="logits"),
    pytest.param(SCORES, id="scores"),
    pytest.param(Upsampling("nearest", input_size=(14, 20)), id="nearest"),
    pytest.param(Upsampling("nearest", "scores", (7, 5)), id="nearest scores"),
]
SMALL = [  # coarse, full
    ((5, 7), (5, 7)),
    ((4, 8), (8, 16)),
    ((3, 33), (12, 132)),
    ((2, 5), (17, 37)),
    ((20, 31), (7, 9)),
    ((1, 1), (3, 5)),
    ((5, 50), (1, 1)),
]
LARGE = [
    ((9, 13), (9, 13)),
    ((17, 40), (68, 160)),
    ((9, 37), (72, 296)),
    ((40, 61), (17, 23)),
    ((21, 67), (70, 211)),
]


class Kernels:
    """Those of one engine, with arguments and results on the CPU. What they allocate is NaN, or the largest integer."""

    def __init__(self, name: str) -> None:
        self.name, self.device, engine = name, device_of(name), engine_of(name)
        self.library = engine.kernels.library if isinstance(engine, CpuEngine) else None

    @property
    def module(self) -> ModuleType:
        if self.library:
            from sparserefine.engines.cpu import uncertainty
        else:
            from sparserefine.engines.triton import uncertainty
        return uncertainty

    def there(self, coarse: Coarse) -> Coarse:
        logits = coarse.logits
        moved = logits.to(self.device) if isinstance(logits, Tensor) else [image.to(self.device) for image in logits]
        return Coarse(moved, coarse.size, coarse.upsampling, coarse.windows)

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        first = [self.library] if self.library else []
        labels, entropies = self.module.uncertainty(*first, self.there(coarse))
        return labels.cpu(), entropies.cpu()

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        first = [self.library] if self.library else []
        return self.module.sample(*first, self.there(coarse), coords.to(self.device)).cpu()

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        given = [tensor.to(self.device) for tensor in (image, coords, scale, shift)]
        if self.library:
            return self.module.gather_normalised(self.library, *given)
        return self.module.pixels(*given).cpu()

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites) -> None:
        if self.library:
            self.module.scatter_argmax(self.library, logits, sites.coords, labels)
            return
        written = labels.to(self.device)
        there = Sites(sites.coords.to(self.device), sites.batch_size, sites.height, sites.width)
        self.module.write_labels(written, logits.to(self.device), there)
        labels.copy_(written)


@pytest.fixture(params=KERNEL_ENGINES)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    found, before = Kernels(request.param), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield found
    torch.use_deterministic_algorithms(before)


def coarse_of(classes: int, size: tuple[int, int], upsampling: Upsampling = LOGITS, batch: int = 1) -> Tensor:
    values = 3 * torch.randn(batch, classes, *size)
    return values.exp() if upsampling.outputs == "scores" else values


def check(
    kernels: Kernels,
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    upsampling: Upsampling,
    windows: Sequence[Window] | None = None,
) -> None:
    """Uncertainty of all pixels and samples of some, against the definitions."""
    coarse = Coarse(logits, size, upsampling, windows)
    labels, entropies = kernels.uncertainty(coarse)
    expected_labels, expected_entropies = definition.uncertainty(coarse)
    assert labels.dtype == expected_labels.dtype
    assert_close(entropies, expected_entropies)
    assert entropies.min() >= 0
    coords = torch.ones(len(logits), *size).nonzero().int()
    dense = definition.sample(coarse, coords)
    best = dense.topk(min(2, dense.shape[1])).values
    clear = ((best[:, 0] - best[:, -1] > 1e-5) | (dense.shape[1] == 1)).view_as(labels)
    assert torch.equal(labels[clear], expected_labels[clear])
    assert clear.float().mean() > (0.99 if clear.numel() > 1000 else 0.95)
    assert_close(kernels.sample(coarse, coords[::3].contiguous()), dense[::3])


# ---- uncertainty and samples


@pytest.mark.parametrize(
    ("kernels", "classes", "coarse", "size"),
    on_each(
        [(classes, *sizes) for classes in (2, 5) for sizes in SMALL],
        [(classes, *sizes) for classes in (1, 2, 3, 17, 19, 33, 150, 300) for sizes in LARGE + SMALL[-2:]],
    ),
    indirect=["kernels"],
)
def test_sizes(kernels: Kernels, classes: int, coarse: tuple[int, int], size: tuple[int, int]) -> None:
    if classes > 100 and size[0] * size[1] > 5_000:
        coarse, size = (coarse[0] // 3, coarse[1]), (size[0] // 3, size[1])
    check(kernels, coarse_of(classes, coarse), size, LOGITS)


@pytest.mark.parametrize(
    ("kernels", "classes", "coarse", "size"),
    on_each(
        [(classes, (3, 7), (9, 23)) for classes in (1, 2, 3, 4, 19)],
        [(classes, (9, 20), (35, 83)) for classes in (1, 2, 3, 19, 300)],
    ),
    indirect=["kernels"],
)
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_modes(
    kernels: Kernels, classes: int, coarse: tuple[int, int], size: tuple[int, int], upsampling: Upsampling
) -> None:
    check(kernels, coarse_of(classes, coarse, upsampling, batch=2), size, upsampling)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_many_classes(kernels: Kernels, outputs: str) -> None:
    """Labels are int16 then."""
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = coarse_of(257, (1, 3), upsampling)
    logits[:, 256, :, 1] = 30
    check(kernels, logits, (1, 5), upsampling)


@pytest.mark.parametrize(
    ("kernels", "classes", "coarse", "size", "scale"),
    on_each(
        [(classes, (8, 10), (13, 21), 1) for classes in (2, 4)],
        [(classes, (18, 20), (35, 61), 2.2) for classes in (2, 19)],
    ),
    indirect=["kernels"],
)
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_windows(
    kernels: Kernels,
    classes: int,
    coarse: tuple[int, int],
    size: tuple[int, int],
    scale: float,
    upsampling: Upsampling,
) -> None:
    windows = [
        Window((31.7 * scale, 36.2 * scale), (0.4, 13.9)),
        Window((10.5 * scale, 21.25 * scale), (-2.5, -1.0)),
        Window((400, 400), (131, 199)),
    ]
    check(kernels, coarse_of(classes, coarse, upsampling, batch=3), size, upsampling, windows)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    ("kernels", "classes", "middle", "size"),
    on_each([(3, (10, 13), (11, 17))], [(5, (20, 31), (33, 47))]),
    indirect=["kernels"],
)
def test_images_of_several_sizes(
    kernels: Kernels, classes: int, middle: tuple[int, int], size: tuple[int, int], outputs: str
) -> None:
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = [coarse_of(classes, extent, upsampling)[0] for extent in ((4, 5), middle, (1, 2))]
    check(kernels, logits, size, upsampling)
    check(kernels, logits[1:2], size, upsampling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("kernels", "classes", "coarse", "size"),
    on_each([(classes, (6, 11), (5, 23)) for classes in (2, 3)], [(4, (9, 20), (35, 83))]),
    indirect=["kernels"],
)
def test_other_precisions_and_layouts(
    kernels: Kernels, classes: int, coarse: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    logits = coarse_of(classes, coarse, batch=2).to(dtype)
    check(kernels, logits, size, LOGITS)
    check(kernels, logits.to(memory_format=torch.channels_last), size, LOGITS)
    check(kernels, logits[:, :, 1:-2, 2:-1], size, LOGITS)
    check(kernels, logits[:1].expand(2, -1, -1, -1), size, LOGITS)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize(("kernels", "size"), on_each([((8, 120),)], [((64, 64),)]), indirect=["kernels"])
def test_precision(kernels: Kernels, classes: int, size: tuple[int, int], outputs: str) -> None:
    """Without interpolation, so that exp, log and the sums are what is judged."""
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    logits = coarse_of(classes, size, upsampling) * (1e-3 if outputs == "scores" else torch.rand(1, 1, *size) * 6)
    values = logits.double()
    if outputs == "scores":
        values = (values / values.sum(1, keepdim=True)).clamp_min(1e-10).log()
    log_p = values.log_softmax(1)
    expected = -(log_p.exp() * log_p).sum(1)
    entropies = kernels.uncertainty(Coarse(logits, size, upsampling))[1]
    assert (entropies - expected).abs().max() < 1.5e-6
    if classes == 2 and outputs == "logits":  # as precise where the entropy is tiny
        small = (expected > 1e-9) & (expected < 1e-3)
        assert small.any()
        assert ((entropies - expected).abs() / expected)[small].max() < 5e-6


@pytest.mark.parametrize("classes", [2, 19])
@pytest.mark.parametrize("value", [200.0, 1e4])
def test_certain_pixels(kernels: Kernels, classes: int, value: float) -> None:
    certain = value * torch.eye(classes).view(1, classes, 1, classes)
    labels, entropies = kernels.uncertainty(Coarse(certain, (1, classes)))
    assert labels[0, 0].tolist() == list(range(classes))
    assert entropies.abs().max() == 0
    opposite = kernels.uncertainty(Coarse(-certain, (1, classes)))[1]
    assert_close(opposite, torch.full((1, 1, classes), math.log(classes - 1)))


UNIFORM = [("logits", 7.0), ("scores", 0.0), ("scores", 0.25)]


@pytest.mark.parametrize(
    ("kernels", "classes", "size", "outputs", "value"),
    on_each(
        [(k, (1, 5), *each) for k in (2, 3, 20) for each in UNIFORM],
        [(k, (2, 20), *each) for k in (2, 3, 19, 300) for each in [*UNIFORM, ("scores", 1e-40)]],
    ),
    indirect=["kernels"],
)
def test_uniform_pixels(kernels: Kernels, classes: int, size: tuple[int, int], outputs: str, value: float) -> None:
    upsampling, full = Upsampling(outputs=outputs), (2 * size[0], 2 * size[1])  # type: ignore[arg-type]
    labels, entropies = kernels.uncertainty(Coarse(torch.full((1, classes, *size), value), full, upsampling))
    assert labels.max() == 0
    assert_close(entropies, torch.full((1, *full), math.log(classes)))


@pytest.mark.parametrize(
    ("kernels", "size", "full", "last"),
    on_each([((6, 9), (12, 18), 7)], [((8, 20), (32, 80), 9)]),
    indirect=["kernels"],
)
def test_some_pixels_without_any_score(
    kernels: Kernels, size: tuple[int, int], full: tuple[int, int], last: int
) -> None:
    scores = coarse_of(4, size, SCORES)
    scores[..., 2:5, 3:last] = 0
    coarse = Coarse(scores, full, SCORES)
    labels, entropies = kernels.uncertainty(coarse)
    expected = definition.uncertainty(coarse)
    assert torch.equal(labels, expected[0])
    assert_close(entropies, expected[1])
    coords = torch.ones(1, *full).nonzero().int()
    assert_close(kernels.sample(coarse, coords), definition.sample(coarse, coords))


@pytest.mark.parametrize("upsampling", [LOGITS, SCORES], ids=OUTPUTS)
@pytest.mark.parametrize(
    ("kernels", "classes", "size", "full"),
    on_each([(5, (4, 9), (11, 30))], [(9, (9, 20), (35, 83))]),
    indirect=["kernels"],
)
def test_of_equals_the_first_wins(
    kernels: Kernels, classes: int, size: tuple[int, int], full: tuple[int, int], upsampling: Upsampling
) -> None:
    half = coarse_of(classes, size, upsampling)
    labels, _ = kernels.uncertainty(Coarse(half, full, upsampling))
    doubled, _ = kernels.uncertainty(Coarse(torch.cat([half, half], dim=1), full, upsampling))
    assert torch.equal(doubled, labels)
    assert kernels.uncertainty(Coarse(torch.zeros(1, 2, *size), full, upsampling))[0].max() == 0


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize(
    ("kernels", "bad", "classes", "size", "scale"),
    on_each(
        [(bad, classes, (5, 12), 2) for bad in (math.nan, -math.inf, 3e38) for classes in (2, 5)],
        [(bad, classes, (9, 40), 4) for bad in (math.nan, math.inf, -math.inf, 3e38, -3e38) for classes in (2, 19)],
    ),
    indirect=["kernels"],
)
def test_bad_values_stay_where_they_are(
    kernels: Kernels, bad: float, classes: int, size: tuple[int, int], scale: int, channel: int, outputs: str
) -> None:
    upsampling = Upsampling(outputs=outputs)  # type: ignore[arg-type]
    row, column, full = size[0] // 2, size[1] // 2, (scale * size[0], scale * size[1])
    logits = coarse_of(classes, size, upsampling)
    expected_labels, expected = kernels.uncertainty(Coarse(logits, full, upsampling))
    logits[0, channel, row, column] = bad
    labels, entropies = kernels.uncertainty(Coarse(logits, full, upsampling))
    assert labels.max() < classes
    touched = torch.zeros(full, dtype=torch.bool)
    reach = scale // 2  # pixels left of and above the first one of a coarse pixel, and as many behind its last one
    rows = slice(scale * row - reach, scale * (row + 1) + reach)
    touched[rows, scale * column - reach : scale * (column + 1) + reach] = True
    assert torch.equal(entropies[0, ~touched], expected[0, ~touched])
    assert torch.equal(labels[0, ~touched], expected_labels[0, ~touched])
    spread = math.isnan(bad) or (math.isinf(bad) and kernels.library is None)  # the CPU's take infinity as certainty
    if outputs == "logits" and spread:
        assert entropies[0, touched].isnan().all()
    sampled = kernels.sample(Coarse(logits, full, upsampling), touched[None].nonzero().int())
    assert sampled.shape == (4 * scale**2, classes)


def test_taps_outside_are_refused(kernels: Kernels) -> None:
    """The kernels look at them on the way, whatever was checked before."""
    coarse = Coarse(torch.rand(1, 3, 8, 9), (8, 9), windows=[Window((8, 9))])
    there = kernels.there(coarse)
    object.__setattr__(there, "windows", (Window((math.nan, 9)),))
    kernels.there = lambda _: there  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="taps reach outside"):
        kernels.uncertainty(coarse)
    with pytest.raises(ValueError, match="taps reach outside"):
        kernels.sample(coarse, torch.zeros(4, 3, dtype=torch.int32))


def test_parameters_are_taken_where_no_gradient_is_recorded(kernels: Kernels) -> None:
    with torch.no_grad():
        check(kernels, torch.rand(2, 3, 8, 9).requires_grad_(), (16, 18), LOGITS)


# ---- sites


@pytest.mark.parametrize("pattern", ["none", "one", "border", "random", "all"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("kernels", "batch", "channels", "size"),
    on_each([(3, channels, (13, 11)) for channels in (1, 3, 5)], [(batch, 3, (33, 41)) for batch in (1, 3)]),
    indirect=["kernels"],
)
def test_pixels(
    kernels: Kernels, batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype, pattern: str
) -> None:
    sites = Sites.from_mask(mask_of(pattern, size, batch))
    image = torch.randint(0, 256, (batch, channels, *size)).to(dtype)
    mean, std = torch.rand(channels), torch.rand(channels) + 0.5
    whole = 255 if dtype == torch.uint8 else 1
    actual = kernels.pixels(image, sites.coords, 1 / (whole * std), -mean / std)
    expected = (sites.gather(image).float() / whole - mean) / std
    assert actual.shape == (len(sites), channels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["none", "one", "random", "all"])
@pytest.mark.parametrize(
    ("kernels", "classes", "size"),
    on_each(
        [(classes, (9, 11)) for classes in (1, 2, 19, 255, 300)],
        [(classes, (33, 41)) for classes in (1, 2, 3, 17, 19, 33, 150, 300)],
    ),
    indirect=["kernels"],
)
def test_write_labels(kernels: Kernels, classes: int, size: tuple[int, int], pattern: str) -> None:
    sites = Sites.from_mask(mask_of(pattern, size, batch=3))
    logits = torch.randint(-4, 4, (len(sites), classes)).float()  # many ties
    logits[1::7] -= 100
    labels = torch.randint(0, 2, (3, *size)).to(label_dtype(classes))
    expected = labels.clone()
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1) if len(sites) else logits.new_zeros(0)
    expected.view(-1)[sites.flat] = first.to(labels.dtype)
    kernels.write_labels(labels, logits, sites)
    assert torch.equal(labels, expected)


@pytest.mark.parametrize(("kernels", "size"), on_each([((13, 11),)], [((33, 41),)]), indirect=["kernels"])
def test_coords_of_any_memory_layout(kernels: Kernels, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    by_column = mask_of("random", size, 2).nonzero().int()
    wide = torch.zeros(len(by_column), 2, 4, dtype=torch.int32)
    wide[:, 1, 1:] = by_column
    results = [
        [
            kernels.pixels(image, coords, torch.ones(3), torch.zeros(3)),
            kernels.sample(Coarse(image[..., ::2], size), coords),
        ]
        for coords in (by_column, by_column.contiguous(), wide[:, 1, 1:])
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_site(kernels: Kernels) -> None:
    sites = Sites.from_mask(torch.zeros(2, 9, 13, dtype=torch.bool))
    assert kernels.sample(Coarse(coarse_of(5, (4, 5), batch=2), (9, 13)), sites.coords).shape == (0, 5)
    assert kernels.pixels(torch.rand(2, 3, 9, 13), sites.coords, torch.ones(3), torch.ones(3)).shape == (0, 3)
    labels = torch.ones(2, 9, 13, dtype=torch.uint8)
    kernels.write_labels(labels, torch.zeros(0, 5), sites)
    assert labels.min() == 1


# ---- any shape

EXTENTS = st.tuples(st.integers(1, 40), st.integers(1, 70))


@pytest.mark.parametrize("name", CPU_ENGINES)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    classes=st.integers(1, 40),
    coarse=EXTENTS,
    size=st.tuples(st.integers(1, 140), st.integers(1, 200)),
    outputs=st.sampled_from(["logits", "scores"]),
    input_size=st.none() | EXTENTS,
    window=st.none() | st.builds(Window, *[st.tuples(st.floats(1, 500), st.floats(1, 500))] * 2),
    seed=st.integers(0, 99),
)
def test_any_shape(
    name: str,
    classes: int,
    coarse: tuple[int, int],
    size: tuple[int, int],
    outputs: str,
    input_size: tuple[int, int] | None,
    window: Window | None,
    seed: int,
) -> None:
    upsampling = Upsampling("nearest" if input_size else "bilinear", outputs, input_size)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    check(Kernels(name), coarse_of(classes, coarse, upsampling), size, upsampling, [window] if window else None)
