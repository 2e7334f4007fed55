"""The compiled kernels of uncertainty and of access to the sites against the torch definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine.engines.cpu import uncertainty as cpu
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.native.build import INSTRUCTION_SETS
from sparserefine.engines.cpu.native.library import Library, available, load
from sparserefine.images import uncertainty as definition
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.sparse import Sites
from support import assert_close, mask_of

CLASSES = (1, 2, 3, 17, 19, 33, 150, 300)
SIZES = [  # coarse, full
    pytest.param((9, 13), (9, 13), id="1x"),
    pytest.param((17, 40), (68, 160), id="4x"),
    pytest.param((9, 37), (72, 296), id="8x"),
    pytest.param((40, 61), (17, 23), id="smaller"),
    pytest.param((21, 67), (70, 211), id="odd"),
    pytest.param((1, 1), (3, 5), id="one coarse pixel"),
    pytest.param((5, 50), (1, 1), id="one pixel"),
]
UPSAMPLINGS = [
    pytest.param(Upsampling(), id="logits"),
    pytest.param(Upsampling(outputs="scores"), id="scores"),
    pytest.param(Upsampling("nearest", input_size=(34, 80)), id="nearest"),
    pytest.param(Upsampling("nearest", "scores", (7, 5)), id="nearest scores"),
]


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


def coarse_of(classes: int, size: tuple[int, int], upsampling: Upsampling = Upsampling(), batch: int = 1) -> Tensor:  # noqa: B008
    values = 3 * torch.randn(batch, classes, *size)
    return values.exp() if upsampling.outputs == "scores" else values


def check(
    library: Library,
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    upsampling: Upsampling,
    windows: Sequence[Window] | None = None,
) -> None:
    """Uncertainty of all pixels and samples of some, against the definitions."""
    labels, entropies = cpu.uncertainty(library, Coarse(logits, size, upsampling, windows))
    expected_labels, expected_entropies = definition.uncertainty(Coarse(logits, size, upsampling, windows))
    assert labels.dtype == expected_labels.dtype
    assert_close(entropies, expected_entropies)
    assert entropies.min() >= 0
    coords = torch.ones(len(logits), *size).nonzero().int()
    dense = definition.sample(Coarse(logits, size, upsampling, windows), coords)
    best = dense.topk(min(2, dense.shape[1])).values
    clear = ((best[:, 0] - best[:, -1] > 1e-5) | (dense.shape[1] == 1)).view_as(labels)
    assert torch.equal(labels[clear], expected_labels[clear])
    assert clear.float().mean() > 0.99
    some = coords[::3].contiguous()
    assert_close(cpu.sample(library, Coarse(logits, size, upsampling, windows), some), dense[::3])


@pytest.mark.parametrize(("coarse", "size"), SIZES)
@pytest.mark.parametrize("classes", CLASSES)
def test_classes_and_sizes(library: Library, classes: int, coarse: tuple[int, int], size: tuple[int, int]) -> None:
    if classes > 100 and size[0] * size[1] > 5_000:
        coarse, size = (coarse[0] // 3, coarse[1]), (size[0] // 3, size[1])
    check(library, coarse_of(classes, coarse), size, Upsampling())


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("classes", [1, 2, 3, 19, 300])
def test_modes(library: Library, classes: int, upsampling: Upsampling) -> None:
    check(library, coarse_of(classes, (9, 20), upsampling, batch=2), (35, 83), upsampling)


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("classes", [2, 19])
def test_windows(library: Library, classes: int, upsampling: Upsampling) -> None:
    windows = [Window((71.7, 76.2), (0.4, 13.9)), Window((30.5, 41.25), (-2.5, -1.0)), Window((400, 400), (131, 199))]
    check(library, coarse_of(classes, (18, 20), upsampling, batch=3), (35, 61), upsampling, windows)


def test_images_of_several_sizes(library: Library) -> None:
    logits = [coarse_of(5, size)[0] for size in ((4, 5), (20, 31), (1, 2))]
    check(library, logits, (33, 47), Upsampling())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts(library: Library, dtype: torch.dtype) -> None:
    logits = coarse_of(4, (9, 20), batch=2).to(dtype)
    check(library, logits, (35, 83), Upsampling())
    check(library, logits.to(memory_format=torch.channels_last), (35, 83), Upsampling())
    check(library, logits[:, :, 1:-2, 2:-1], (35, 83), Upsampling())


@pytest.mark.parametrize("upsampling", [Upsampling(), Upsampling(outputs="scores")], ids=["logits", "scores"])
@pytest.mark.parametrize("classes", [2, 19])
def test_precision(library: Library, classes: int, upsampling: Upsampling) -> None:
    """Without interpolation, so that exp, log and the sums are what is judged."""
    logits = coarse_of(classes, (64, 64), upsampling) * (
        1e-3 if upsampling.outputs == "scores" else torch.rand(1, 1, 64, 64) * 6
    )
    values = logits.double()
    if upsampling.outputs == "scores":
        values = (values / values.sum(1, keepdim=True)).clamp_min(1e-10).log()
    log_p = values.log_softmax(1)
    expected = -(log_p.exp() * log_p).sum(1)
    entropies = cpu.uncertainty(library, Coarse(logits, (64, 64), upsampling))[1]
    assert (entropies - expected).abs().max() < 1.5e-6
    if classes == 2 and upsampling.outputs == "logits":  # as precise where the entropy is tiny
        small = (expected > 1e-9) & (expected < 1e-3)
        assert ((entropies - expected).abs() / expected)[small].max() < 5e-6


def test_certain_pixels(library: Library) -> None:
    certain = 200 * torch.eye(19).view(1, 19, 1, 19)
    labels, entropies = cpu.uncertainty(library, Coarse(certain, (1, 19)))
    assert labels[0, 0].tolist() == list(range(19))
    assert entropies.abs().max() == 0


@pytest.mark.parametrize("classes", [2, 3, 19, 300])
def test_uniform_pixels(library: Library, classes: int) -> None:
    for upsampling, value in (
        (Upsampling(), 7.0),
        (Upsampling(outputs="scores"), 0.0),
        (Upsampling(outputs="scores"), 1e-40),
    ):
        labels, entropies = cpu.uncertainty(
            library, Coarse(torch.full((1, classes, 2, 20), value), (4, 40), upsampling)
        )
        assert labels.max() == 0
        assert_close(entropies, torch.full((1, 4, 40), math.log(classes)))


def test_some_pixels_without_any_score(library: Library) -> None:
    upsampling = Upsampling(outputs="scores")
    scores = coarse_of(4, (8, 20), upsampling)
    scores[..., 2:5, 3:9] = 0
    labels, entropies = cpu.uncertainty(library, Coarse(scores, (32, 80), upsampling))
    expected = definition.uncertainty(Coarse(scores, (32, 80), upsampling))
    assert torch.equal(labels, expected[0])
    assert_close(entropies, expected[1])
    coords = torch.ones(1, 32, 80).nonzero().int()
    sampled = cpu.sample(library, Coarse(scores, (32, 80), upsampling), coords)
    assert_close(sampled, definition.sample(Coarse(scores, (32, 80), upsampling), coords))


@pytest.mark.parametrize("upsampling", [Upsampling(), Upsampling(outputs="scores")], ids=["logits", "scores"])
def test_of_equals_the_first_wins(library: Library, upsampling: Upsampling) -> None:
    half = coarse_of(9, (9, 20), upsampling)
    labels, _ = cpu.uncertainty(library, Coarse(half, (35, 83), upsampling))
    doubled, _ = cpu.uncertainty(library, Coarse(torch.cat([half, half], dim=1), (35, 83), upsampling))
    assert torch.equal(doubled, labels)
    equal = torch.zeros(1, 2, 3, 20)
    assert cpu.uncertainty(library, Coarse(equal, (12, 80)))[0].max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("outputs", ["logits", "scores"])
@pytest.mark.parametrize("classes", [2, 19])
def test_bad_values_stay_where_they_are(library: Library, classes: int, outputs: str, bad: float) -> None:
    upsampling = Upsampling(outputs=outputs)
    logits = coarse_of(classes, (9, 40), upsampling)
    expected_labels, expected = cpu.uncertainty(library, Coarse(logits, (36, 160), upsampling))
    logits[0, 1, 4, 20] = bad
    labels, entropies = cpu.uncertainty(library, Coarse(logits, (36, 160), upsampling))
    assert labels.max() < classes
    touched = torch.zeros(36, 160, dtype=torch.bool)
    touched[14:22, 78:86] = True
    assert torch.equal(entropies[0, ~touched], expected[0, ~touched])
    assert torch.equal(labels[0, ~touched], expected_labels[0, ~touched])
    assert cpu.sample(library, Coarse(logits, (36, 160), upsampling), touched[None].nonzero().int()).shape == (
        64,
        classes,
    )


def test_no_result_depends_on_the_threads(library: Library, threads: Callable[[int], None]) -> None:
    results = []
    for n in (1, 2, 3):
        threads(n)
        torch.manual_seed(0)
        tensors: list[Tensor] = []
        for upsampling in (Upsampling(), Upsampling(outputs="scores")):
            for classes in (2, 19):
                logits = coarse_of(classes, (30, 150), upsampling)
                tensors += cpu.uncertainty(library, Coarse(logits, (140, 590), upsampling))
                coords = mask_of("random", (140, 590)).nonzero().int()
                tensors.append(cpu.sample(library, Coarse(logits, (140, 590), upsampling), coords))
        image = torch.randint(0, 256, (1, 3, 140, 590), dtype=torch.uint8)
        tensors.append(cpu.gather_normalised(library, image, coords, torch.rand(3), torch.rand(3)))
        cpu.scatter_argmax(library, tensors[-2], coords, tensors[3])
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("classes", [2, 19, 300])
def test_scratch_is_small(library: Library, classes: int) -> None:
    """Bytes of a thread, whatever the image's size."""
    assert 4 * cpu._function(library, "sr_uncertainty_scratch")(classes) < (200_000 if classes > 100 else 50_000)


# ---- sites


@pytest.mark.parametrize("pattern", ["none", "one", "border", "random", "all"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
def test_gather(library: Library, batch: int, dtype: torch.dtype, pattern: str) -> None:
    sites = Sites.from_mask(mask_of(pattern, (33, 41), batch))
    image = torch.randint(0, 256, (batch, 3, 33, 41)).to(dtype)
    values = sites.gather(image)
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    whole = 255 if dtype == torch.uint8 else 1
    actual = cpu.gather_normalised(library, image, sites.coords, 1 / (whole * std), -mean / std)
    assert actual.shape == (len(sites), 3)
    torch.testing.assert_close(actual, (values.float() / whole - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["none", "one", "random", "all"])
@pytest.mark.parametrize("classes", CLASSES)
def test_scatter_argmax(library: Library, classes: int, pattern: str) -> None:
    sites = Sites.from_mask(mask_of(pattern, (33, 41), batch=3))
    logits = torch.randint(-4, 4, (len(sites), classes)).float()  # many ties
    logits[1::7] -= 100
    labels = torch.randint(0, 2, (3, 33, 41)).to(label_dtype(classes))
    expected = labels.clone()
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1) if len(sites) else logits.new_zeros(0)
    expected.view(-1)[sites.flat] = first.to(labels.dtype)
    cpu.scatter_argmax(library, logits, sites.coords, labels)
    assert torch.equal(labels, expected)


def test_coords_of_any_memory_layout(library: Library) -> None:
    image = torch.rand(2, 3, 33, 41)
    by_column = mask_of("random", (33, 41), 2).nonzero().int()
    wide = torch.zeros(len(by_column), 2, 4, dtype=torch.int32)
    wide[:, 1, 1:] = by_column
    results = [
        [
            cpu.gather_normalised(library, image, coords, torch.ones(3), torch.zeros(3)),
            cpu.sample(library, Coarse(image[..., ::2], (33, 41)), coords),
        ]
        for coords in (by_column, by_column.contiguous(), wide[:, 1, 1:])
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sample_of_no_site(library: Library) -> None:
    logits = coarse_of(5, (4, 5), batch=2)
    assert cpu.sample(library, Coarse(logits, (9, 13)), torch.zeros(0, 3, dtype=torch.int32)).shape == (0, 5)


@pytest.mark.parametrize(
    "bad",
    [(0, -1, 0), (0, 8, 0), (0, 0, -1), (0, 0, 9), (0, 2**31 - 1, 2**31 - 1), (-1, 0, 0), (2, 0, 0), (-(2**31), 0, 0)],
    ids=str,
)
def test_coords_outside_are_refused(library: Library, bad: tuple[int, int, int]) -> None:
    coords = torch.tensor([[0, 0, 0], bad, [1, 7, 8]], dtype=torch.int32)
    image = torch.rand(2, 3, 8, 9)
    calls: list[Callable[[], object]] = [
        lambda: cpu.sample(library, Coarse(image, (8, 9)), coords),
        lambda: cpu.gather_normalised(library, image, coords, torch.ones(3), torch.ones(3)),
        lambda: cpu.scatter_argmax(library, torch.rand(3, 4), coords, torch.zeros(2, 8, 9, dtype=torch.uint8)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"coords run from .* expected each within \[0, 0, 0\] and \[1, 7, 8\]"):
            call()


def test_batches_out_of_order_are_refused(library: Library) -> None:
    coords = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="ascending"):
        cpu.sample(library, Coarse(torch.rand(2, 3, 4, 4), (8, 9)), coords)


# ---- refusals

IMAGE = torch.rand(2, 3, 8, 9)
COORDS = torch.zeros(4, 3, dtype=torch.int32)
LABELS = torch.zeros(2, 8, 9, dtype=torch.uint8)
ONES = torch.ones(3)
ON_CPU, ON_META = (Coarse(image, (8, 9)) for image in (IMAGE, IMAGE.to("meta")))
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "meta logits": ("uncertainty", (ON_META,), "on meta, contiguous; expected contiguous torch.float32 on the CPU"),
    "sample: int64 coords": ("sample", (ON_CPU, COORDS.long()), "coords are torch.int64 .* expected int32"),
    "sample: coords [N, 2]": ("sample", (ON_CPU, COORDS[:, :2]), r"\(4, 2\) on cpu, expected int32 \[N, 3\]"),
    "sample: coords elsewhere": ("sample", (ON_CPU, COORDS.to("meta")), r"on meta, expected int32"),
    "gather: [C, H, W]": ("gather_normalised", (IMAGE[0], COORDS, ONES, ONES), r"expected \[B, C, H, W\]"),
    "gather: float64": ("gather_normalised", (IMAGE.double(), COORDS, ONES, ONES), "image is torch.float64"),
    "gather: strided": ("gather_normalised", (IMAGE[..., ::2], COORDS, ONES, ONES), "not contiguous"),
    "gather: scale": ("gather_normalised", (IMAGE, COORDS, ONES[:2], ONES), r"scale \(2,\), .* expected .* \[C\]"),
    "gather: shift": ("gather_normalised", (IMAGE, COORDS, ONES, ONES.double()), "shift is torch.float64"),
    "scatter: rows": ("scatter_argmax", (torch.rand(5, 3), COORDS, LABELS), r"logits are \(5, 3\) for 4 sites"),
    "scatter: no class": ("scatter_argmax", (torch.rand(4, 0), COORDS, LABELS), r"logits are \(4, 0\)"),
    "scatter: half": ("scatter_argmax", (torch.rand(4, 3).half(), COORDS, LABELS), "logits is torch.float16"),
    "scatter: int64": ("scatter_argmax", (torch.rand(4, 3), COORDS, LABELS.long()), "labels are torch.int64"),
    "scatter: 300": ("scatter_argmax", (torch.rand(4, 300), COORDS, LABELS), "expected torch.int16"),
    "scatter: strided": ("scatter_argmax", (torch.rand(4, 3), COORDS, LABELS[..., ::2]), "not contiguous"),
}
"""What would make a kernel read or write where nothing is. Checked in Python: the instruction set does not matter."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        getattr(cpu, name)(load(available()[0]), *arguments)


def test_taps_outside_are_refused(library: Library) -> None:
    """The kernels look at them on the way, whatever was checked before."""
    coarse = Coarse(IMAGE[:1], (8, 9), windows=[Window((8, 9))])
    object.__setattr__(coarse, "windows", (Window((math.nan, 9)),))
    calls: list[Callable[[], object]] = [
        lambda: cpu.uncertainty(library, coarse),
        lambda: cpu.sample(library, coarse, COORDS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="taps reach outside"):
            call()


def test_where_a_gradient_is_wanted_torch_computes(library: Library) -> None:
    engine, logits = CpuEngine(library.name), IMAGE.clone().requires_grad_()
    engine.sample(Coarse(logits, (16, 18)), COORDS).sum().backward()
    assert logits.grad is not None
    with torch.no_grad():
        check(library, logits, (16, 18), Upsampling())


# ---- any shape

EXTENTS = st.tuples(st.integers(1, 40), st.integers(1, 70))


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
    library: Library,
    classes: int,
    coarse: tuple[int, int],
    size: tuple[int, int],
    outputs: str,
    input_size: tuple[int, int] | None,
    window: Window | None,
    seed: int,
) -> None:
    upsampling = Upsampling("nearest" if input_size else "bilinear", outputs, input_size)
    torch.manual_seed(seed)
    check(library, coarse_of(classes, coarse, upsampling), size, upsampling, [window] if window else None)
