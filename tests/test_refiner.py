"""The whole method on a tiny random base."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from sparserefine.images.upsampling import Window
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Engine
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector
from support import CPU_ENGINES, assert_close, at_sites, engine_of

K = 3
HALF = BaseConfig(ratio=0.5)
TINY = ExtractorConfig((4, 6), blocks=1)
NOTHING, EVERYTHING = Selector(budget=0), Selector(budget=10_000)
SOME = Selector(threshold=0.0, budget=30)
STAGES = ["base", "uncertainty", "select", "plan", "gather", "extractor", "ensembler"]


def base_of(config: BaseConfig = HALF, num_classes: int = K) -> FrozenBase:
    return FrozenBase(UNet(num_classes, (4, 8)), num_classes, config)


def refiner_of(selector: Selector = SOME, base: FrozenBase | None = None, **choices: Any) -> SparseRefiner:
    """In evaluation mode, its ensembler not the plain blend that it starts as."""
    config = RefinerConfig(selector=selector, extractor=TINY, **choices)
    refiner = SparseRefiner(base or base_of(), config).eval()
    with torch.no_grad():
        for parameter in refiner.ensembler.parameters():
            parameter.normal_(std=0.3)
    return refiner


def always(engine: Engine) -> Any:
    """Stands for an ``EngineChoice`` that gives one engine for every device."""
    return SimpleNamespace(name=engine.name, on=lambda device: engine)


def pixels(batch: int = 1, size: tuple[int, int] = (9, 14)) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


@pytest.fixture
def triton() -> Engine:
    """The engine of GPUs, interpreted."""
    return engine_of("triton")


def upsampled(result: Refinement) -> Tensor:
    size = (result.sites.height, result.sites.width)
    return F.interpolate(result.coarse.logits.double(), size, mode="bilinear", align_corners=False)


def assert_labels(labels: Tensor, logits: Tensor) -> None:
    """Each label is a class of highest logit, either of two that tie within rounding."""
    chosen = logits.gather(1, labels.long()[:, None])[:, 0]
    assert bool((chosen >= logits.amax(1) - 1e-5).all())


# ---- what is refined, what is not


def test_without_sites_it_is_the_base() -> None:
    result = refiner_of(NOTHING)(pixels(2))
    assert len(result.sites) == result.density == 0
    assert torch.equal(result.labels(), result.coarse_labels)
    assert torch.equal(result.entropy(), result.coarse_entropy)
    assert_labels(result.labels(), upsampled(result))
    assert_close(result.logits(), upsampled(result), torch.float32)


def test_with_all_sites_it_is_the_ensembler() -> None:
    result = refiner_of(EVERYTHING)(pixels(2))
    assert result.density == 1
    refined = result.refined_logits.view(2, 9, 14, K).permute(0, 3, 1, 2)
    assert torch.equal(result.logits(), refined)
    assert torch.equal(result.labels().long(), refined.argmax(1))
    assert_close(result.coarse_logits, at_sites(upsampled(result), result.sites.mask()), torch.float32)


@pytest.mark.parametrize("name", ["gated", "minimum_entropy", "mean"])
def test_refined_at_the_sites_and_the_bases_elsewhere(name: str) -> None:
    refiner = refiner_of(ensembler=EnsemblerConfig(name))
    result = refiner(pixels(2))
    mask = result.sites.mask()
    assert mask.flatten(1).sum(1).tolist() == [30, 30]
    assert result.density == 60 / (2 * 9 * 14)
    assert_close(result.refined_logits, refiner.ensembler(result.coarse_logits, result.sparse_logits))
    assert_close(at_sites(result.logits(), mask), result.refined_logits)
    assert_close(at_sites(result.logits(), ~mask), at_sites(upsampled(result), ~mask), torch.float32)
    assert torch.equal(result.labels()[mask].long(), result.refined_logits.argmax(1))
    assert torch.equal(result.labels()[~mask], result.coarse_labels[~mask])


def test_selected_are_the_most_uncertain() -> None:
    result = refiner_of()(pixels())
    mask = result.sites.mask()
    assert result.coarse_entropy[mask].min() >= result.coarse_entropy[~mask].max()


@pytest.mark.parametrize("selector", [NOTHING, SOME, EVERYTHING, Selector(0.5)], ids=str)
def test_labels_are_the_argmax_of_the_logits(selector: Selector) -> None:
    result = refiner_of(selector)(pixels(2))
    assert result.labels().dtype == torch.uint8
    assert_labels(result.labels(), result.logits())


@pytest.mark.parametrize("selector", [NOTHING, SOME, EVERYTHING], ids=str)
def test_entropy_is_that_of_the_logits(selector: Selector) -> None:
    """Refined at the sites, the base's elsewhere: H = - sum p ln p of whatever ``logits()`` says."""
    result = refiner_of(selector)(pixels(2))
    log_p = result.logits().double().log_softmax(1)
    assert_close(result.entropy(), -(log_p.exp() * log_p).sum(1), torch.float32)


def test_a_changed_refinement_must_fit_its_sites() -> None:
    """Engines write labels at the sites without further checks."""
    with torch.no_grad():
        result = refiner_of()(pixels())
    for name, value, words in (
        ("coarse_labels", result.coarse_labels[:, ::2, ::2].contiguous(), r"coarse_labels are \(1, 5, 7\), expected"),
        ("coarse_entropy", result.coarse_entropy[0], r"coarse_entropy are \(9, 14\), expected"),
        ("coarse_labels", result.coarse_labels.long(), r"coarse_labels are torch.int64, expected torch.uint8"),
        ("refined_logits", result.refined_logits[1:], r"refined_logits are .* expected \[N, K\]"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(result, **{name: value})


def test_asking_changes_nothing() -> None:
    result = refiner_of()(pixels())
    before = result.coarse_labels.clone(), result.coarse_entropy.clone(), result.coarse.logits.clone()
    asked = [(result.labels(), result.entropy(), result.logits()) for _ in range(2)]
    assert all(torch.equal(first, again) for first, again in zip(*asked, strict=True))
    after = result.coarse_labels, result.coarse_entropy, result.coarse.logits
    assert all(torch.equal(was, now) for was, now in zip(before, after, strict=True))


def test_other_labels_at_the_sites() -> None:
    result = refiner_of()(pixels())
    expected = torch.where(result.sites.mask(), 2, result.coarse_labels)
    assert torch.equal(result.with_sites(torch.full((30,), 2)), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(mode: Callable[[], Any]) -> None:
    refiner, image = refiner_of(), pixels(2)
    expected = refiner(image)
    with mode():
        result = refiner(image)
    assert not result.refined_logits.requires_grad
    assert torch.equal(result.labels(), expected.labels())
    assert_close(result.logits(), expected.logits())


def test_autocast() -> None:
    refiner, image, coarse = refiner_of(), pixels(2), torch.randn(2, K, 5, 7)
    expected = refiner.refine(image, coarse)
    with torch.autocast("cpu", torch.bfloat16):
        result = refiner.refine(image, coarse)
        (result.refined_logits.square().mean() + result.sparse_logits.square().mean()).backward()
    assert torch.equal(result.sites.coords, expected.sites.coords)
    assert_close(result.refined_logits, expected.refined_logits, torch.bfloat16)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in refiner.trained_parameters())


def test_a_batch_is_its_images() -> None:
    refiner, image, coarse = refiner_of(), pixels(2), torch.randn(2, K, 5, 7)
    together = refiner.refine(image, coarse)
    alone = [refiner.refine(image[b : b + 1], coarse[b : b + 1]) for b in (0, 1)]
    for name in ("labels", "entropy", "logits"):
        assert_close(getattr(together, name)(), torch.cat([getattr(result, name)() for result in alone]), torch.float32)


@pytest.mark.parametrize("down", ["paper", "cell"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2), (3, 3), (9, 14)], ids="{0[0]}x{0[1]}".format)
def test_any_size(size: tuple[int, int], down: str) -> None:
    extractor = ExtractorConfig((4, 5, 6), blocks=1, down=down)
    refiner = SparseRefiner(base_of(), RefinerConfig(selector=EVERYTHING, extractor=extractor)).eval()
    result = refiner(pixels(2, size))
    assert result.labels().shape == (2, *size)
    assert result.logits().shape == (2, K, *size)
    assert result.logits().isfinite().all()


@pytest.mark.parametrize("selector", [SOME, EVERYTHING], ids=str)
def test_input_is_left_alone(selector: Selector) -> None:
    for image in (pixels(2), torch.rand(2, 3, 9, 14)):
        coarse, valid = torch.randn(2, K, 5, 7), torch.rand(2, 9, 14) < 0.9
        before = [t.clone() for t in (image, coarse, valid)]
        refiner = refiner_of(selector)
        refiner(image)
        refiner.refine(image, coarse, valid=valid).logits()
        assert all(torch.equal(t, was) for t, was in zip((image, coarse, valid), before, strict=True))


def test_bytes_and_fractions_are_the_same_image() -> None:
    refiner, image = refiner_of(EVERYTHING), pixels(2)
    assert_close(refiner(image).logits(), refiner(image.float() / 255).logits())


def test_padding_is_never_selected() -> None:
    valid = torch.zeros(2, 9, 14, dtype=torch.bool)
    valid[0, :4, :5] = valid[1, 3:, 9:] = True
    result = refiner_of(EVERYTHING).refine(pixels(2), torch.randn(2, K, 5, 7), valid=valid)
    assert torch.equal(result.sites.mask(), valid)


def test_scores() -> None:
    """A base that gives scores: its logits are log(p), p the scores upsampled and normalised."""
    base = FrozenBase(lambda x: x[:, :K].abs(), K, BaseConfig(ratio=0.5, outputs="scores"))
    result = refiner_of(NOTHING, base)(pixels())
    log_p = (upsampled(result) / upsampled(result).sum(1, keepdim=True)).clamp_min(1e-10).log()
    assert_close(result.logits(), log_p, torch.float32)
    assert_labels(result.labels(), log_p)


def test_nearest_upsampling_goes_by_way_of_the_bases_input_size() -> None:
    base = FrozenBase(lambda x: F.avg_pool2d(x, 4), K, HALF)
    result = refiner_of(NOTHING, base, upsampling="nearest")(pixels(size=(16, 24)))
    assert result.coarse.logits.shape == (1, K, 2, 3)
    assert result.coarse.upsampling.input_size == (8, 12)
    middle = F.interpolate(result.coarse.logits, (8, 12), mode="bilinear", align_corners=False)
    expected = F.interpolate(middle, (16, 24), mode="nearest")
    assert_close(result.logits(), expected)
    assert_labels(result.labels(), expected)


# ---- features


def expected_features(result: Refinement, image: Tensor) -> dict[str, Tensor]:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in image.shape[2:])
    p = result.coarse_logits.double().softmax(1)
    return {
        "rgb": at_sites((image.double() / 255 - mean) / std, result.sites.mask()),
        "coords": torch.stack([rows[result.sites.coords[:, 1].long()], columns[result.sites.coords[:, 2].long()]], 1),
        "probabilities": p,
        "entropy": -(p * p.log()).sum(1, keepdim=True),
    }


@pytest.mark.parametrize(
    "features",
    [("rgb",), ("coords",), ("probabilities",), ("entropy",), ("entropy", "rgb", "probabilities", "coords")],
    ids=" ".join,
)
def test_features(features: tuple[str, ...]) -> None:
    config = RefinerConfig(selector=SOME, extractor=ExtractorConfig((4, 6), features=features))
    refiner = SparseRefiner(base_of(), config).eval()
    seen: list[Tensor] = []
    refiner.extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    image = pixels(2)
    expected = expected_features(refiner(image), image)
    assert_close(seen[0], torch.cat([expected[name] for name in features], dim=1), torch.float32)


# ---- training


def test_training_keeps_the_base_frozen() -> None:
    refiner = refiner_of().train()
    before = {name: value.clone() for name, value in refiner.base.state_dict().items()}
    assert not any(module.training for module in refiner.base.modules())
    result = refiner(pixels(2))
    (result.refined_logits.square().sum() + result.sparse_logits.square().sum()).backward()
    trained = {id(p) for p in refiner.trained_parameters()}
    for name, parameter in refiner.named_parameters():
        assert (id(parameter) in trained) == (not name.startswith("base."))
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    assert all(torch.equal(value, before[name]) for name, value in refiner.base.state_dict().items())


@pytest.mark.parametrize("selector", [NOTHING, Selector(budget=1)], ids=["no site", "one site"])
def test_training_on_hardly_any_site(selector: Selector) -> None:
    refiner = refiner_of(selector).train()
    result = refiner(pixels())
    (result.refined_logits.sum() + result.sparse_logits.sum()).backward()
    for parameter in refiner.trained_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


# ---- what the host waits for

READS = {"item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal"}
"""Ways from a tensor's values to the host, which waits for a GPU."""


class Unread(Tensor):
    """A tensor whose values must not be asked for, nor those of what is computed from it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            raise AssertionError(f"{func.__name__} of coarse logits")
        return super().__torch_function__(func, types, args, kwargs or {})


class Reads(TorchFunctionMode):
    """Counts reads of values by functions of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if getattr(func, "__name__", "") in READS and caller.startswith("sparserefine."):
            self.seen.append(f"{func.__name__} in {caller}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["torch", *CPU_ENGINES[-1:]])
def test_training_does_not_look_at_the_values_of_given_logits(engine: str) -> None:
    refiner, logits = refiner_of(), torch.randn(2, K, 5, 7)
    refiner.engine = always(engine_of(engine))
    for given in (logits.as_subclass(Unread), [one.as_subclass(Unread) for one in logits]):
        with pytest.raises(AssertionError, match="tolist of coarse logits"):
            refiner.eval().refine(pixels(2), given)
        result = refiner.train().refine(pixels(2), given, windows=[Window((9, 14))] * 2)
        (result.refined_logits.sum() + result.sparse_logits.sum()).backward()


def test_a_training_step_waits_once(triton: Engine) -> None:
    """For the number of sites."""
    refiner, image, logits = refiner_of().train(), pixels(2), [torch.randn(K, 5, 7), torch.randn(K, 4, 6)]
    refiner.engine, valid = always(triton), torch.ones(2, 9, 14, dtype=torch.bool)
    refiner.refine(image, logits)  # makes the tables of taps, on the CPU
    with Reads() as reads:
        refiner.refine(image, logits, valid=valid).refined_logits.sum().backward()
    assert reads.seen == ["tolist in sparserefine.engines.triton.geometry"]


def test_a_prediction_looks_at_the_values_when_it_has_waited_anyway(triton: Engine) -> None:
    """First for the number of sites; then what was found about the values is there already."""
    refiner, image = refiner_of(), pixels(2)
    refiner.engine = always(triton)
    expected = ["tolist in sparserefine.engines.triton.geometry", "tolist in sparserefine.bases.base"]
    with torch.no_grad():
        refiner(image)  # makes the tables of taps, on the CPU
        with Reads() as reads:
            logits = refiner(image).coarse.logits
        assert reads.seen == expected
        with Reads() as reads:
            refiner.refine(image / 255, [*logits])  # looks at the pixels too
        assert reads.seen == expected


@pytest.mark.parametrize("training", [False, True])
def test_bad_logits_of_the_base_are_refused(training: bool) -> None:
    """Whatever the mode: here they are seen first."""
    base = FrozenBase(lambda x: x[:, :K] / 0, K, BaseConfig("broken", ratio=0.5))
    with pytest.raises(ValueError, match="base broken: 168 of 168 coarse logits are NaN or infinite"):
        refiner_of(base=base).train(training)(pixels(2, (8, 14)))


def test_pixels_outside_0_to_1_are_refused() -> None:
    """But not in training, which makes them itself and does not wait for their values."""
    refiner, image, logits = refiner_of(), pixels(2).float(), torch.randn(2, K, 5, 7)
    refiner(image / 255)
    refiner.refine(image / 255, logits)
    words = r"image holds 0\.\.255, expected 0\.\.1 for floating point"
    with pytest.raises(ValueError, match=words):
        refiner(image)
    for given in (logits, [*logits]):
        with pytest.raises(ValueError, match=words):
            refiner.refine(image, given)
    refiner.train().refine(image, logits)


def test_bad_logits_of_several_sizes_are_counted_together() -> None:
    bad = torch.full((K, 2, 2), torch.nan)
    with pytest.raises(ValueError, match="24 of 129 coarse logits are NaN or infinite"):
        refiner_of().refine(pixels(3), [torch.randn(K, 5, 7), bad, -bad])


# ---- what is reported


def test_a_step_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    refiner, image = refiner_of(), pixels(2)
    expected = refiner(image)
    monkeypatch.delattr("time.perf_counter")
    result = refiner.step(image, expected.coarse)
    assert result.timings_ms == {}
    assert torch.equal(result.refined_logits, expected.refined_logits)
    assert result.macs == expected.macs


def test_a_plan_of_ones_own() -> None:
    """As a step's argument: here of all pixels, whatever was selected."""
    refiner, image = refiner_of(NOTHING), pixels(2)
    coarse = refiner.coarse_of(torch.randn(2, K, 5, 7), (9, 14))
    result = refiner.step(
        image,
        coarse,
        plan_of=lambda mask: refiner.engine.on(mask.device).plan(torch.ones_like(mask), refiner.extractor.spec),
    )
    assert result.density == 1


def test_logits_of_crops_are_those_of_their_windows() -> None:
    """Where the crops lie in one image."""
    refiner, logits, image = refiner_of(NOTHING), torch.randn(1, K, 5, 7), pixels(1, (10, 14))
    whole = refiner.refine(image, logits).logits()
    windows = [Window((10, 14), (2, 3)), Window((10, 14), (4, 6))]
    crops = torch.cat([image[..., 2:8, 3:11], image[..., 4:10, 6:14]])
    result = refiner.refine(crops, logits.expand(2, -1, -1, -1), windows=windows)
    assert_close(result.logits(), torch.cat([whole[..., 2:8, 3:11], whole[..., 4:10, 6:14]]))


def test_logits_of_other_sites_are_no_refinement() -> None:
    result = refiner_of()(pixels())
    with pytest.raises(ValueError, match=r"refined_logits are \(29, 3\), expected \[N, K\] = \[30, 3\]"):
        replace(result, refined_logits=result.refined_logits[:-1])


def test_timings() -> None:
    refiner = refiner_of()
    result = refiner(pixels())
    assert list(result.timings_ms) == STAGES
    assert all(ms >= 0 for ms in result.timings_ms.values())
    assert list(refiner.refine(pixels(), result.coarse.logits).timings_ms) == STAGES[1:]


def test_macs() -> None:
    """Base: a 1x1 convolution of half the image. Gate, fuser: (8 * 64 + 64) + (3 * 64 + 64 * 3) a site."""
    base = FrozenBase(torch.nn.Conv2d(3, K, 1), K, HALF)
    refiner = refiner_of(base=base)
    result = refiner(pixels(2, (8, 12)))
    plan = refiner.engine.on(torch.device("cpu")).geometry(result.sites, refiner.extractor.spec)
    assert result.macs == {
        "base": 2 * (4 * 6 * 3 * K),
        "extractor": refiner.extractor.macs(plan),
        "ensembler": 60 * (8 * 64 + 64 + 3 * 64 + 64 * 3),
    }


def test_macs_of_a_base_that_torch_cannot_see() -> None:
    base = FrozenBase(lambda x: torch.from_numpy(x.numpy() * 2), K, HALF)
    assert refiner_of(base=base)(pixels()).macs["base"] is None


# ---- refusals


@pytest.mark.parametrize("shape", [(3, 9, 14), (1, 4, 9, 14), (1, 9, 14, 3), (1, 3, 0, 14)], ids=str)
def test_wrong_image_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]") as error:
        refiner_of()(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("coarse", "words"),
    [
        (torch.zeros(1, K + 1, 5, 7), "4 classes, expected 3"),
        (torch.zeros(2, K, 5, 7), r"\(2, 3, 5, 7\), expected \[1, K, h, w\]"),
        (torch.full((1, K, 5, 7), float("nan")), "105 of 105 coarse logits are NaN or infinite"),
    ],
    ids=["classes", "batch", "NaN"],
)
def test_wrong_coarse_logits(coarse: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refiner_of().refine(pixels(), coarse)


def test_coarse_logits_of_several_sizes() -> None:
    """In training, crops of a batch come from images of different sizes."""
    refiner, image = refiner_of(), pixels(2)
    coarse = [torch.randn(K, 5, 7), torch.randn(K, 3, 4)]
    together = refiner.refine(image, coarse)
    alone = [refiner.refine(image[b : b + 1], coarse[b][None]) for b in (0, 1)]
    assert torch.equal(together.labels(), torch.cat([result.labels() for result in alone]))
    assert_close(together.refined_logits, torch.cat([result.refined_logits for result in alone]))
    assert_close(together.logits(), torch.cat([result.logits() for result in alone]))


@pytest.mark.parametrize("images", [1, 3])
def test_a_list_of_coarse_logits_for_another_batch(images: int) -> None:
    with pytest.raises(ValueError, match=rf"2 .*expected {images}|expected {images}.* 2"):
        refiner_of().refine(pixels(images), [torch.randn(K, 5, 7)] * 2)


@pytest.mark.parametrize("windows", [1, 3])
def test_windows_for_another_batch(windows: int) -> None:
    with pytest.raises(ValueError, match="window"):
        refiner_of().refine(pixels(2), torch.randn(2, K, 5, 7), windows=[Window((9, 14))] * windows)


@pytest.mark.parametrize(
    "valid",
    [torch.ones(9, 13, dtype=torch.bool), torch.ones(2, 9, 14, dtype=torch.bool), torch.ones(1, 9, 14)],
    ids=["size", "batch", "float"],
)
def test_wrong_valid_mask(valid: Tensor) -> None:
    with pytest.raises(ValueError, match="valid"):
        refiner_of().refine(pixels(), torch.randn(1, K, 5, 7), valid=valid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": Classes.numbered(K + 1)}, "4 class names for a base of 3 classes"),
        ({"config": RefinerConfig(selector=Selector(1.2))}, "threshold = 1.2 nats would select nothing"),
        ({"engine": "spconv"}, "engine 'spconv' is not known"),
    ],
    ids=["classes", "threshold", "engine"],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseRefiner(base_of(), **arguments)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"upsampling": "bicubic"}, "upsampling 'bicubic', expected 'bilinear' or 'nearest'"),
        ({"mean": (0.1, 0.2), "std": (1.0,)}, r"refiner.mean = \(0.1, 0.2\), .*expected a number for each channel"),
        ({"mean": None}, "refiner.mean = None, .*expected a number for each channel, 1 to 16, and as many in both"),
        ({"std": (0.1, 0.0, 0.2)}, r"refiner.std = \(0.1, 0.0, 0.2\); expected .*, std above 0"),
        ({"std": (0.1, "a", 0.2)}, r"refiner.std = \(0.1, 'a', 0.2\); expected a number"),
    ],
    ids=["upsampling", "two means", "no mean", "std of zero", "text"],
)
def test_bad_choices(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RefinerConfig(**choices)


def test_own_pixels_are_normalised_as_configured() -> None:
    """Thus twice the values give the same with twice the mean and twice the spread."""
    image, coarse = torch.rand(2, 3, 9, 14) / 2, torch.randn(2, K, 5, 7)
    refiner = refiner_of(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    config = replace(refiner.config, mean=(0.2, 0.4, 0.6), std=(1.0, 1.2, 1.4))
    other = SparseRefiner(refiner.base, config).eval()
    other.load_state_dict(refiner.state_dict())
    assert_close(other.refine(2 * image, coarse).logits(), refiner.refine(image, coarse).logits())


def test_the_selector_may_be_replaced() -> None:
    refiner, image = refiner_of(), pixels()
    before = refiner.config
    refiner.selector = Selector(budget=7)
    assert refiner.selector == Selector(budget=7)
    assert refiner.config == replace(before, selector=Selector(budget=7))
    assert len(refiner(image).sites) == 7
    with pytest.raises(ValueError, match=r"threshold = 1.2 nats would select nothing"):
        refiner.selector = Selector(1.2)
    assert refiner.selector == Selector(budget=7)
