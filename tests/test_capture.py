"""The refine step with room for a fixed number of sites: what a CUDA graph holds. Interpreted, there is no graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet
from sparserefine.bases.refined import refined
from sparserefine.capture import CapturedRefiner
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector
from support import TRITON_ENGINES, assert_close, device_of, engine_of

K = 3
SIZE = (8, 10)
TINY = ExtractorConfig((4, 6), blocks=1)


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    engine_of(request.param)
    return device_of(request.param)


def refiner_of(
    device: torch.device, selector: Selector | None = None, down: str = "cell", *, context: bool = False
) -> SparseRefiner:
    """Its ensembler is not the plain blend that it starts as, and a context is not without effect."""
    base = FrozenBase(UNet(K, (4, 8)), K, BaseConfig(ratio=0.5))
    features = ("rgb", "coords", "probabilities", "entropy")
    extractor = ExtractorConfig((4, 6), blocks=1, down=down, features=features, context=context)
    config = RefinerConfig(selector=selector or Selector(0.0, 30), extractor=extractor)
    refiner = SparseRefiner(base, config, engine="triton").eval()
    with torch.no_grad():
        for parameter in (*refiner.ensembler.parameters(), *refiner.extractor.context.parameters()):
            parameter.normal_(std=0.3)
    return refiner.to(device)


def pixels(device: torch.device, seed: int = 0, batch: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=random).to(device)


def eager(refiner: SparseRefiner, image: Tensor) -> Refinement:
    with torch.inference_mode():
        return refiner(image)


def assert_same(actual: Refinement, expected: Refinement) -> None:
    """Bit for bit."""
    assert torch.equal(actual.sites.coords, expected.sites.coords)
    assert torch.equal(actual.coarse.logits, expected.coarse.logits)
    for name in ("coarse_labels", "coarse_entropy", "coarse_logits", "sparse_logits", "refined_logits"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for what in ("labels", "logits", "entropy"):
        assert torch.equal(getattr(actual, what)(), getattr(expected, what)())
    assert actual.density == expected.density
    assert actual.macs == expected.macs


@pytest.mark.parametrize(("batch", "down"), [(1, "paper"), (2, "cell")])
def test_equals_the_refiner(device: torch.device, batch: int, down: str) -> None:
    refiner = refiner_of(device, down=down)
    captured = refiner.capture(pixels(device, batch=batch))
    image = pixels(device, 1, batch)
    expected = eager(refiner, image)
    assert_same(captured(image), expected)
    assert torch.equal(captured.labels(image), expected.labels())
    assert captured.calls == 2
    assert captured.overflows == 0


@pytest.mark.parametrize(("down", "capacities", "overflows"), [("paper", [90, 50], 0), ("cell", [50, 20], 1)])
def test_with_context(device: torch.device, down: str, capacities: list[int], overflows: int) -> None:
    """With rows of padding, and of an image with more sites than there is room for."""
    refiner = refiner_of(device, Selector(0.0), down, context=True)
    captured = refiner.capture(pixels(device), capacities=capacities)
    assert_same(captured(pixels(device, 1)), eager(refiner, pixels(device, 1)))
    assert captured.overflows == overflows


def test_with_a_refiner_as_base(device: torch.device) -> None:
    """It runs before the graph, with an engine of its own."""
    inner = refiner_of(device, Selector(0.0, 10))
    outer = SparseRefiner(FrozenBase(refined(inner), config=BaseConfig(ratio=0.5)), inner.config, engine="triton")
    captured = outer.eval().to(device).capture(pixels(device))
    for seed in (1, 2):
        image = pixels(device, seed)
        assert_same(captured(image), eager(outer, image))
    assert captured.overflows == 0


def test_results_are_not_overwritten(device: torch.device) -> None:
    refiner = refiner_of(device)
    captured = refiner.capture(pixels(device))
    first = captured(pixels(device, 1))
    labels = captured.labels(pixels(device, 1))
    captured(pixels(device, 2))
    expected = eager(refiner, pixels(device, 1))
    assert_same(first, expected)
    assert torch.equal(labels, expected.labels())


def test_images_with_more_sites_are_refined_all_the_same(device: torch.device) -> None:
    refiner = refiner_of(device, Selector(0.0))
    captured = refiner.capture(pixels(device), capacities=[50, 20])
    image = pixels(device, 1)
    expected = eager(refiner, image)
    assert len(expected.sites) == SIZE[0] * SIZE[1]
    assert_same(captured(image), expected)
    assert torch.equal(captured.labels(image), expected.labels())
    assert captured.overflows == captured.calls == 2


def test_no_site(device: torch.device) -> None:
    refiner = refiner_of(device, Selector(1.0986))  # just under ln 3
    captured = refiner.capture(pixels(device))
    image = pixels(device, 1)
    assert len(captured(image).sites) == 0
    assert torch.equal(captured.labels(image), eager(refiner, image).coarse_labels)


def test_given_coarse_logits(device: torch.device) -> None:
    refiner = refiner_of(device)
    image = pixels(device, 1)
    coarse = 3 * torch.randn_like(eager(refiner, image).coarse.logits)
    captured = refiner.capture(pixels(device), coarse)
    with torch.inference_mode():
        assert_same(captured.refine(image, coarse), refiner.refine(image, coarse))
        assert torch.equal(captured.labels(image, coarse), refiner.refine(image, coarse).labels())


def test_in_half_precision(device: torch.device) -> None:
    """The precision is that of the recording, whatever is on around a call."""
    refiner, image = refiner_of(device), pixels(device, 1)
    with torch.autocast(device.type, torch.bfloat16):
        captured, expected = refiner.capture(pixels(device)), eager(refiner, image)
    assert expected.coarse.logits.dtype == torch.bfloat16
    assert_same(captured(image), expected)
    captured.capacities = (1, 1)  # as if there were more sites than there is room for
    assert_same(captured(image), expected)
    assert captured.overflows == 1
    with pytest.raises(ValueError, match=r"coarse logits: torch.float32 .* captured for torch.bfloat16"):
        captured.refine(image, expected.coarse.logits.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_converted_refiner(device: torch.device, dtype: torch.dtype) -> None:
    """All weights in half precision, instead of autocast."""
    refiner, image = refiner_of(device), pixels(device, 1)
    with torch.inference_mode():
        coarse = refiner.base(image).to(dtype)
        expected = refiner.refine(image, coarse.float())
    refiner.to(dtype)
    with torch.inference_mode():
        found = refiner.refine(image, coarse)
    assert torch.equal(found.sites.coords, expected.sites.coords)
    assert_close(found.refined_logits, expected.refined_logits, dtype)


def test_timings(device: torch.device) -> None:
    captured = refiner_of(device).capture(pixels(device))
    assert list(captured(pixels(device, 1)).timings_ms) == ["base", "refine"]


# ---- room


def test_room_is_for_the_largest_image_and_some_more(device: torch.device) -> None:
    refiner = refiner_of(device)
    images = [pixels(device, seed) // (seed + 1) for seed in range(3)]
    refiner.selector = Selector(float(eager(refiner, images[0]).coarse_entropy.quantile(0.8)))
    found = [len(eager(refiner, image).sites) for image in images]
    assert len(set(found)) > 1
    captured = refiner.capture(images, headroom=1.25)
    room = 1.25 * max(found)
    assert min(room, SIZE[0] * SIZE[1]) <= captured.capacities[0] <= 1.25 * room + 16
    for image in images:
        captured(image)
    assert captured.overflows == 0


def test_room_is_no_more_than_there_can_be(device: torch.device) -> None:
    cells = SIZE[0] * SIZE[1]
    assert refiner_of(device, Selector(budget=20)).capture(pixels(device), headroom=9).capacities[0] == 20
    assert refiner_of(device, Selector(0.0)).capture(pixels(device), headroom=9).capacities == (cells, cells // 4)


def test_values_that_are_not_finite_are_refused(device: torch.device) -> None:
    refiner = refiner_of(device)
    captured, image = refiner.capture(pixels(device)), pixels(device, 1)
    coarse = eager(refiner, image).coarse.logits.clone()
    coarse[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"1 of .* coarse logits are NaN or infinite"):
        captured.refine(image, coarse)


@pytest.mark.parametrize("value", [1e300, -1e300, 1e31])
def test_logits_are_judged_as_they_become_in_float32(device: torch.device, value: float) -> None:
    refiner = refiner_of(device)
    coarse = eager(refiner, pixels(device)).coarse.logits.double()
    captured, image = refiner.capture(pixels(device), coarse), pixels(device, 1)
    captured.refine(image, coarse)
    coarse[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"coarse logits (are NaN or infinite in float32|reach 1e\+31)"):
        captured.refine(image, coarse)


def test_pixels_outside_0_to_1_are_refused(device: torch.device) -> None:
    """By the graph itself: the host waits once, for all that it has to know."""
    refiner, image = refiner_of(device), pixels(device) / 255
    captured = refiner.capture(image)
    coarse = captured(image).coarse.logits
    for bad, words in ((255 * image, r"image holds 0\.\.25"), (image * torch.nan, "image holds NaN")):
        for call in (captured, captured.labels, lambda given: captured.refine(given, coarse)):
            with pytest.raises(ValueError, match=words):
                call(bad)
        with pytest.raises(ValueError, match=words):
            refiner.capture(bad)
    assert_same(captured(image), eager(refiner, image))


def test_negative_scores_are_refused(device: torch.device) -> None:
    base = FrozenBase(UNet(K, (4, 8)), K, BaseConfig(ratio=0.5, outputs="scores"))
    base.model.head = torch.nn.Sequential(base.model.head, torch.nn.Softplus())
    config = RefinerConfig(selector=Selector(budget=20), extractor=TINY)
    refiner = SparseRefiner(base, config, engine="triton").eval().to(device)
    captured, image = refiner.capture(pixels(device)), pixels(device, 1)
    with pytest.raises(ValueError, match="outputs='scores' but the smallest is -1"):
        captured.refine(image, torch.where(torch.rand_like(eager(refiner, image).coarse.logits) < 0.5, -1.0, 0.5))


# ---- what it is valid for


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"batch": 2}, r"uint8 \(2, 3, 8, 10\).*captured for torch.uint8 \(1, 3, 8, 10\)"),
        ({"size": (8, 11)}, r"\(1, 3, 8, 11\).*capture again"),
    ],
    ids=["batch", "size"],
)
def test_other_images_are_refused(device: torch.device, image: dict, words: str) -> None:
    captured = refiner_of(device).capture(pixels(device))
    with pytest.raises(ValueError, match=words):
        captured(pixels(device, **image))


def test_another_dtype_is_refused(device: torch.device) -> None:
    captured = refiner_of(device).capture(pixels(device))
    with pytest.raises(ValueError, match=r"torch.float32.*captured for torch.uint8"):
        captured(pixels(device).float() / 255)


def _weights(refiner: SparseRefiner) -> None:
    with torch.no_grad():
        refiner.extractor.head.weight.mul_(2)


def _gate(refiner: SparseRefiner) -> None:
    with torch.no_grad():
        next(refiner.ensembler.parameters()).mul_(2)


def _selector(refiner: SparseRefiner) -> None:
    refiner.selector = Selector(0.2)


def _train(refiner: SparseRefiner) -> None:
    refiner.train()


@pytest.mark.parametrize("change", [_weights, _gate, _selector, _train])
def test_a_refiner_that_changed_is_refused(device: torch.device, change: object) -> None:
    refiner = refiner_of(device)
    captured = refiner.capture(pixels(device))
    change(refiner)
    with pytest.raises(RuntimeError, match="since it was captured"):
        captured(pixels(device, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"headroom": 0.5}, "headroom = 0.5, expected at least 1"),
        ({"headroom": float("nan")}, "headroom = nan"),
        ({"headroom": float("inf")}, "headroom = inf"),
        ({"capacities": [100]}, r"capacities = \[100\], expected 2 numbers"),
        ({"capacities": [100, 0]}, "above 0"),
    ],
)
def test_bad_arguments(device: torch.device, arguments: dict, words: str) -> None:
    refiner = refiner_of(device).train()
    with pytest.raises(ValueError, match=words):
        refiner.capture(pixels(device), **arguments)
    assert refiner.training  # nothing was captured, so nothing has changed


def test_coarse_logits_for_other_images(device: torch.device) -> None:
    refiner, image = refiner_of(device), pixels(device)
    with pytest.raises(ValueError, match="2 coarse logits for 1 images"):
        refiner.capture(image, 2 * [eager(refiner, image).coarse.logits])


def test_no_image(device: torch.device) -> None:
    with pytest.raises(ValueError, match="no image is given"):
        refiner_of(device).capture([])


def test_images_of_two_sizes(device: torch.device) -> None:
    with pytest.raises(ValueError, match="capture again for it"):
        refiner_of(device).capture([pixels(device), pixels(device, size=(8, 12))])


def test_without_a_gpu() -> None:
    refiner = refiner_of_cpu()
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU and engine 'triton'"):
        refiner.capture(pixels(torch.device("cpu")))


def refiner_of_cpu() -> SparseRefiner:
    base = FrozenBase(UNet(K, (4, 8)), K, BaseConfig(ratio=0.5))
    return SparseRefiner(base, RefinerConfig(extractor=TINY), engine="torch")


def test_an_extractor_with_hooks(device: torch.device) -> None:
    refiner = refiner_of(device)
    refiner.extractor.stem.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be packed"):
        refiner.capture(pixels(device))


def test_it_says_what_it_is(device: torch.device) -> None:
    assert isinstance(refiner_of(device).capture(pixels(device)), CapturedRefiner)
