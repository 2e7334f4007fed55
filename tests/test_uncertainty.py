"""Labels and entropy against torch's own interpolation and the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparserefine.images.uncertainty as module
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import dense, entropy, label_dtype, sample, uncertainty
from sparserefine.images.upsampling import Upsampling, Window, entropy_limit
from support import assert_close, mask_of

SHAPES = [  # classes, coarse size, full size
    pytest.param(3, (4, 5), (9, 13), id="odd"),
    pytest.param(2, (4, 6), (16, 24), id="whole ratio"),
    pytest.param(19, (1, 1), (5, 3), id="one coarse pixel"),
    pytest.param(3, (1, 7), (1, 1), id="one pixel"),
    pytest.param(3, (9, 11), (4, 5), id="coarse larger than full"),
    pytest.param(3, (5, 5), (5, 5), id="same size"),
    pytest.param(300, (3, 2), (7, 5), id="300 classes"),
]


def log_probabilities(logits: Tensor, size: tuple[int, int], upsampling: Upsampling) -> Tensor:
    """``float64 [B, K, H, W]``: interpolate, then softmax (of scores: normalise, clip at 1e-10, softmax of the log)."""
    values = logits.double()
    if upsampling.mode == "nearest":
        values = F.interpolate(values, upsampling.input_size, mode="bilinear", align_corners=False)
        values = F.interpolate(values, size, mode="nearest-exact")
    else:
        values = F.interpolate(values, size, mode="bilinear", align_corners=False)
    if upsampling.outputs == "scores":
        values = (values / values.sum(1, keepdim=True)).nan_to_num(1 / values.shape[1]).clamp_min(1e-10).log()
    return values.log_softmax(1)


def check(labels: Tensor, entropies: Tensor, log_p: Tensor) -> None:
    """H = - sum p ln p; the label is a class of highest probability (either of two that tie within rounding)."""
    assert labels.dtype == label_dtype(log_p.shape[1])
    assert entropies.dtype == torch.float32
    assert_close(entropies, -(log_p.exp() * log_p).sum(1))
    chosen = log_p.gather(1, labels.long()[:, None])[:, 0]
    assert bool((chosen >= log_p.amax(1) - 1e-5).all())
    assert entropies.min() >= 0
    assert entropies.max() <= math.log(log_p.shape[1]) + 1e-5


def coarse_of(classes: int, size: tuple[int, int], upsampling: Upsampling, batch: int = 2) -> Tensor:
    values = 3 * torch.randn(batch, classes, *size)
    return values.exp() if upsampling.outputs == "scores" else values


@pytest.mark.parametrize("outputs", ["logits", "scores"])
@pytest.mark.parametrize(("classes", "coarse", "full"), SHAPES)
def test_bilinear(classes: int, coarse: tuple[int, int], full: tuple[int, int], outputs: str) -> None:
    upsampling = Upsampling(outputs=outputs)
    logits = coarse_of(classes, coarse, upsampling)
    check(*uncertainty(Coarse(logits, full, upsampling)), log_probabilities(logits, full, upsampling))


@pytest.mark.parametrize("outputs", ["logits", "scores"])
@pytest.mark.parametrize("input_size", [(8, 12), (7, 5), (16, 24), (40, 30)], ids="{0[0]}x{0[1]}".format)
def test_nearest_goes_by_way_of_the_input_size(input_size: tuple[int, int], outputs: str) -> None:
    upsampling = Upsampling("nearest", outputs, input_size)
    logits = coarse_of(3, (4, 6), upsampling)
    check(*uncertainty(Coarse(logits, (16, 24), upsampling)), log_probabilities(logits, (16, 24), upsampling))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_nearest_by_a_whole_factor_is_torchs_nearest(factor: int) -> None:
    """What the published code computes: bilinear to the input size, then ``mode="nearest"``."""
    logits, size = torch.randn(1, 3, 4, 6), (10, 14)
    full = (factor * size[0], factor * size[1])
    expected = F.interpolate(F.interpolate(logits, size, mode="bilinear", align_corners=False), full, mode="nearest")
    assert_close(dense(Coarse(logits, full, Upsampling("nearest", "logits", size))), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_coarse_logits_of_other_precisions(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4, 5).to(dtype)
    check(*uncertainty(Coarse(logits, (9, 13))), log_probabilities(logits, (9, 13), Upsampling()))


def test_coarse_logits_of_any_memory_layout() -> None:
    logits = torch.randn(2, 3, 4, 5)
    expected = uncertainty(Coarse(logits, (9, 13)))
    actual = uncertainty(Coarse(logits.contiguous(memory_format=torch.channels_last), (9, 13)))
    assert torch.equal(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("elements", [1, 3 * 13 * 2, 3 * 13 * 4])
def test_strips_smaller_than_the_image(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 3, 4, 5)
    labels, entropies = uncertainty(Coarse(logits, (9, 13)))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    in_strips = uncertainty(Coarse(logits, (9, 13)))
    assert torch.equal(in_strips[0], labels)
    assert_close(in_strips[1], entropies)


# ---- at the sites only


@pytest.mark.parametrize(
    "upsampling",
    [Upsampling(), Upsampling(outputs="scores"), Upsampling("nearest", input_size=(6, 7))],
    ids=["logits", "scores", "nearest"],
)
@pytest.mark.parametrize("pattern", ["none", "one", "random", "all"])
def test_sample_is_dense_read_at_the_sites(pattern: str, upsampling: Upsampling) -> None:
    mask = mask_of(pattern, (9, 13), batch=3)  # the second image has no site
    logits = coarse_of(4, (4, 5), upsampling, batch=3)
    expected = dense(Coarse(logits, (9, 13), upsampling)).permute(0, 2, 3, 1)[mask]
    actual = sample(Coarse(logits, (9, 13), upsampling), mask.nonzero().int())
    assert actual.shape == (int(mask.sum()), 4)
    assert_close(actual, expected)


@pytest.mark.parametrize(("classes", "coarse", "full"), SHAPES)
def test_dense_against_torch(classes: int, coarse: tuple[int, int], full: tuple[int, int]) -> None:
    logits = torch.randn(2, classes, *coarse)
    expected = F.interpolate(logits.double(), full, mode="bilinear", align_corners=False)
    actual = dense(Coarse(logits, full))
    assert actual.dtype == torch.float32
    assert_close(actual, expected)


def test_coarse_logits_of_several_sizes() -> None:
    logits = [torch.randn(3, 4, 5), torch.randn(3, 7, 2)]
    alone = [image[None] for image in logits]
    size = (9, 13)
    labels, entropies = uncertainty(Coarse(logits, size))
    assert torch.equal(labels, torch.cat([uncertainty(Coarse(image, size))[0] for image in alone]))
    assert_close(entropies, torch.cat([uncertainty(Coarse(image, size))[1] for image in alone]))
    expected = torch.cat([dense(Coarse(image, size)) for image in alone])
    mask = mask_of("random", size, batch=2)
    assert_close(sample(Coarse(logits, size), mask.nonzero().int()), expected.permute(0, 2, 3, 1)[mask])
    assert_close(dense(Coarse(logits, size)), expected)


# ---- windows


def grid_sampled(logits: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Pixel (i, j) lies at ((i + top + 1/2) / full height, (j + left + 1/2) / full width) of the coarse image."""
    rows, columns = (
        2 * (torch.arange(size[a], dtype=torch.float64) + window.offset[a] + 0.5) / window.full[a] - 1 for a in (0, 1)
    )
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
    return F.grid_sample(logits.double()[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_window_of_the_image_is_a_crop_of_the_whole_result(mode: str) -> None:
    upsampling = Upsampling(mode, input_size=(12, 10) if mode == "nearest" else None)
    logits = torch.randn(2, 3, 6, 5)
    labels, entropies = uncertainty(Coarse(logits, (24, 20), upsampling))
    windows = [Window((24, 20), (3, 4)), Window((24, 20), (13, 9))]
    crop_labels, crop_entropies = uncertainty(Coarse(logits, (11, 8), upsampling, windows))
    for b, (top, left) in enumerate([(3, 4), (13, 9)]):
        assert torch.equal(crop_labels[b], labels[b, top : top + 11, left : left + 8])
        assert_close(crop_entropies[b], entropies[b, top : top + 11, left : left + 8])


def test_a_window_of_a_resized_image() -> None:
    """The image was resized to 31x26, then cropped: the logits are those of the resized image, cropped."""
    logits = torch.randn(2, 3, 6, 5)
    resized = log_probabilities(logits, (31, 26), Upsampling())
    windows = [Window((31, 26), (0, 0)), Window((31, 26), (20, 15))]
    expected = torch.stack([resized[0, :, :11, :9], resized[1, :, 20:, 15:24]])
    check(*uncertainty(Coarse(logits, (11, 9), windows=windows)), expected)


def test_windows_need_not_lie_on_pixels() -> None:
    logits = torch.randn(2, 3, 6, 5)
    windows = [Window((31.7, 26.2), (0.4, 13.9)), Window((9.5, 8.25), (-2.5, -1.0))]  # the second reaches outside
    expected = torch.stack([grid_sampled(image, (11, 9), w) for image, w in zip(logits, windows, strict=True)])
    check(*uncertainty(Coarse(logits, (11, 9), windows=windows)), expected.log_softmax(1))
    mask = mask_of("random", (11, 9), batch=2)
    at_sites = sample(Coarse(logits, (11, 9), windows=windows), mask.nonzero().int())
    assert_close(at_sites, expected.permute(0, 2, 3, 1)[mask])


# ---- scores, extremes, the formula


def test_pixels_without_any_score_are_uniform() -> None:
    scores = torch.zeros(1, 4, 2, 2)
    _, entropies = uncertainty(Coarse(scores, (4, 4), Upsampling(outputs="scores")))
    assert_close(entropies, torch.full((1, 4, 4), math.log(4)))
    assert_close(dense(Coarse(scores, (4, 4), Upsampling(outputs="scores"))).softmax(1), torch.full((1, 4, 4, 4), 0.25))


def test_some_pixels_without_any_score() -> None:
    scores = torch.rand(1, 4, 2, 2)
    scores[..., 0, 0] = 0
    upsampling = Upsampling(outputs="scores")
    check(*uncertainty(Coarse(scores, (6, 6), upsampling)), log_probabilities(scores, (6, 6), upsampling))


def test_probabilities_are_clipped_at_1e_10() -> None:
    scores = torch.tensor([3.0, 0.0, 1e-12, 1.0]).view(1, 4, 1, 1)
    expected = torch.tensor([0.75, 1e-10, 1e-10, 0.25]).log().view(1, 4, 1, 1)
    assert_close(dense(Coarse(scores, (1, 1), Upsampling(outputs="scores"))), expected)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits(scale: float) -> None:
    labels, entropies = uncertainty(Coarse(scale * torch.randn(1, 5, 4, 4), (9, 9)))
    assert entropies.isfinite().all()
    assert entropies.min() >= 0
    assert labels.max() < 5


@pytest.mark.parametrize("classes", [2, 3, 19, 300])
def test_entropy_lies_between_zero_and_ln_k(classes: int) -> None:
    assert_close(entropy(torch.full((1, classes), 7.0)), torch.tensor([math.log(classes)]))
    assert entropy_limit(classes) == math.log(classes)
    certain = 200 * F.one_hot(torch.arange(classes), classes).float()
    assert entropy(certain).tolist() == [0.0] * classes
    margins = torch.linspace(5, 30, 10_000)[:, None]  # some of them round to less than zero
    assert entropy(torch.cat([margins, torch.randn(10_000, classes - 1)], dim=1)).min() >= 0


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_entropy_along_any_axis(dim: int) -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    log_p = logits.log_softmax(dim)
    assert_close(entropy(logits, dim), -(log_p.exp() * log_p).sum(dim))


def test_entropy_has_a_gradient() -> None:
    assert torch.autograd.gradcheck(entropy, (torch.randn(4, 5, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("logits", [torch.zeros(1, 3), torch.tensor([[1e4, -1e4, 0.0]])], ids=["uniform", "certain"])
def test_gradient_of_entropy_is_finite(logits: Tensor) -> None:
    logits = logits.requires_grad_()
    entropy(logits).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, torch.uint8), (255, torch.uint8), (256, torch.int16), (300, torch.int16)]
)
def test_label_dtype(classes: int, dtype: torch.dtype) -> None:
    assert label_dtype(classes) == dtype


def test_labels_above_255() -> None:
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 1
    assert torch.equal(uncertainty(Coarse(logits, (3, 3)))[0], torch.full((1, 3, 3), 299, dtype=torch.int16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "bicubic"}, "mode 'bicubic', expected 'bilinear' or 'nearest'"),
        ({"outputs": "probabilities"}, "outputs = 'probabilities', expected 'logits' or 'scores'"),
        ({"mode": "nearest"}, "needs input_size"),
    ],
    ids=str,
)
def test_bad_upsampling(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Upsampling(**arguments)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_of_equal_classes_the_first_is_the_label(classes: int) -> None:
    logits = torch.randn(1, classes, 4, 6)
    labels = uncertainty(Coarse(logits, (8, 12)))[0]
    twice = torch.cat([logits, logits], dim=1)
    assert torch.equal(uncertainty(Coarse(twice, (8, 12)))[0], labels)
    assert labels.unique().tolist() == list(range(classes))
    assert not uncertainty(Coarse(torch.zeros(1, classes, 4, 6), (8, 12)))[0].any()
