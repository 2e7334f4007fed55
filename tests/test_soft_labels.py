"""The teacher's predictions in a few bytes a pixel: what is kept, and what a crop reads of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparserefine.data.batches import CropBatch
from sparserefine.data.crops import AugmentConfig, Uniform, Whole, random_crop
from sparserefine.engines.choose import get_engine
from sparserefine.images.coarse import Coarse
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.images.upsampling import Window
from sparserefine.sparse import Sites
from sparserefine.stages.gather import sample
from sparserefine.training.soft_losses import teacher_at_sites

CLASSES = [2, 3, 19, 300]


def logits_of(k: int, size: tuple[int, int] = (9, 11), scale: float = 3.0) -> Tensor:
    return scale * torch.randn(k, *size, generator=torch.Generator().manual_seed(k))


# ---- what is kept


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("k", CLASSES)
def test_the_two_largest_probabilities_and_the_sum_of_the_rest_are_kept(k: int, scale: float) -> None:
    logits = logits_of(k, scale=scale)
    found, expected = SoftLabels.of(logits, "logits").logits().softmax(0), logits.softmax(0)
    order = expected.argsort(0, descending=True)
    found, expected = found.gather(0, order), expected.gather(0, order)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=5e-4)  # what is left beside the others
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found[2:].sum(0), expected[2:].sum(0), rtol=2e-3, atol=1e-6)
    if k > 2:
        assert float((found[2:].amax(0) - found[2:].amin(0)).max()) < 1e-6
    assert torch.equal(SoftLabels.of(logits, "logits").labels(), order[0].to(torch.uint8 if k <= 255 else torch.int16))


@pytest.mark.parametrize("k", CLASSES)
def test_scores_are_normalised(k: int) -> None:
    scores = logits_of(k).exp()
    by_scores, by_logits = SoftLabels.of(7 * scores, "scores"), SoftLabels.of(scores.log(), "logits")
    torch.testing.assert_close(by_scores.logits().softmax(0), by_logits.logits().softmax(0), rtol=2e-3, atol=1e-6)
    assert torch.isfinite(SoftLabels.of(torch.zeros(k, 2, 3), "scores").logits()).all()


@pytest.mark.parametrize(("k", "nbytes"), [(2, 2), (3, 6), (19, 6), (300, 8)])
def test_bytes_of_a_pixel(k: int, nbytes: int) -> None:
    assert SoftLabels.of(logits_of(k), "logits").nbytes == nbytes * 9 * 11


@pytest.mark.parametrize("k", CLASSES)
def test_certainty_beyond_half_precision_is_finite(k: int) -> None:
    logits = torch.zeros(k, 1, 2)
    logits[1] = 1e9
    soft = SoftLabels.of(logits, "logits")
    assert torch.isfinite(soft.logits()).all()
    assert (soft.logits().softmax(0)[1] > 1 - 1e-6).all()
    assert soft.labels().tolist() == [[1, 1]]


def test_a_tie_of_two_is_the_first_class_as_everywhere() -> None:
    assert SoftLabels.of(torch.ones(2, 1, 1), "logits").labels().tolist() == [[0]]
    assert SoftLabels.of(torch.ones(4, 1, 1), "logits").labels().tolist() == [[0]]


# ---- what a crop reads


WINDOWS = [
    (Window((45.0, 55.0)), (45, 55)),
    (Window((45.0, 55.0), (13.0, 7.0)), (16, 20)),
    (Window((33.7, 58.1), (3.3, 20.9)), (16, 20)),
    (Window((9.0, 11.0), (2.0, 5.0)), (4, 3)),
    (Window((20.0, 30.0), (0.0, 0.0)), (40, 64)),  # padded
    (Window((4.5, 5.5), (1.0, 1.0)), (2, 3)),  # smaller than the prediction
]


@pytest.mark.parametrize(("window", "size"), WINDOWS)
@pytest.mark.parametrize("k", [2, 3, 19])
def test_a_part_is_at_the_pixels_what_the_whole_is(k: int, window: Window, size: tuple[int, int]) -> None:
    soft = SoftLabels.of(logits_of(k), "logits")
    part = soft.seen_by(window, size)
    rows, columns = (x.flatten() for x in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    found = part.at(rows, columns, window, size)
    assert torch.equal(found, soft.at(rows, columns, window, size))
    # And that is what the engine reads, of the same logits.
    sites = Sites.from_mask(torch.ones(1, *size, dtype=torch.bool))
    expected = sample(Coarse(soft.logits()[None], size, windows=[window]), sites, get_engine("torch"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    needed = zip((9, 11), size, window.full, strict=True)
    assert part.values[0].numel() <= math.prod(math.ceil(px * cells / full) + 2 for cells, px, full in needed)


@pytest.mark.parametrize("axes", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("k", [2, 5])
def test_a_mirrored_part_is_a_part_of_the_mirrored_whole(k: int, axes: tuple[bool, bool]) -> None:
    logits, (window, size) = logits_of(k), WINDOWS[2]
    flipped = logits.flip([axis + 1 for axis in (0, 1) if axes[axis]])
    found = SoftLabels.of(logits, "logits").seen_by(window, size, axes)
    expected = SoftLabels.of(flipped, "logits").seen_by(window, size)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.classes, expected.classes)
    assert (found.whole, found.start) == (expected.whole, expected.start)


def test_crops_see_of_the_teacher_what_they_see_of_coarse_logits() -> None:
    """Both come from one model here, so that they must be the same at all sites: resized, mirrored, padded."""
    generator = torch.Generator().manual_seed(3)
    config = AugmentConfig((40, 56), (0.4, 2.0), 1.0, flip=True, flip_vertical=True)
    crops = []
    for seed in range(12):
        height, width = 60 + seed, 70
        odds = torch.randn(1, 30, 40, generator=generator).half().float()
        logits = torch.cat([torch.zeros_like(odds), odds])
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        label = torch.zeros(height, width, dtype=torch.uint8)
        soft = SoftLabels.of(logits, "logits")
        crops.append(random_crop(Whole(image, label, logits, teacher=soft), config, Uniform(seed)))
    batch = CropBatch.of(crops, config.crop, torch.device("cpu"))
    assert batch.teacher is not None
    assert not batch.valid.all()
    sites = Sites.from_mask(batch.valid & (torch.rand(batch.valid.shape, generator=generator) < 0.3))
    expected = sample(Coarse(batch.logits, (40, 56), windows=batch.parts), sites, get_engine("torch"))
    found = teacher_at_sites(batch.teacher, batch.windows, sites)
    torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=1e-5, atol=1e-6)


def test_images_without_sites() -> None:
    soft, window = SoftLabels.of(logits_of(3), "logits"), Window((9.0, 11.0))
    mask = torch.zeros(3, 9, 11, dtype=torch.bool)
    assert teacher_at_sites([soft] * 3, [window] * 3, Sites.from_mask(mask)).shape == (0, 3)
    mask[2, 4, 5] = True
    torch.testing.assert_close(
        teacher_at_sites([soft] * 3, [window] * 3, Sites.from_mask(mask))[0], soft.logits()[:, 4, 5]
    )


def test_without_a_teacher_a_batch_has_none() -> None:
    image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    crop = random_crop(Whole(image, label, torch.zeros(2, 4, 4)), AugmentConfig((8, 8)), Uniform(0))
    assert CropBatch.of([crop, crop], (8, 8), torch.device("cpu")).teacher is None
