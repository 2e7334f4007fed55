"""Training crops: image, label and coarse logits must stay in register through resize, crop, flip and padding."""

import pytest
import torch

from sparserefine.data.crops import AugmentConfig, CropBatch, CropDataset, EpochSampler, Uniform, random_crop
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import dense


def ramps(height, width):
    """Two planes that rise linearly from 0 to 1 over the image, read at pixel centres; bilinear sampling keeps them."""
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    return torch.stack([rows[:, None].expand(height, width), columns[None].expand(height, width)])


def seen_logits(crop):
    """The crop's coarse logits at each of its pixels."""
    coarse = Coarse(crop.logits[None], tuple(crop.label.shape), windows=[crop.window])
    rows, columns = (axis.taps() for axis in coarse.axes(0))
    along = torch.lerp(crop.logits[:, rows.low], crop.logits[:, rows.high], rows.weight[:, None])
    return torch.lerp(along[..., columns.low], along[..., columns.high], columns.weight)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (1.9, 2.0), (0.5, 2.0)])
@pytest.mark.parametrize("crop", [(40, 56), (64, 64), (200, 30)])
def test_window_of_logits_shows_what_the_image_shows(scale, crop):
    height, width = 120, 160
    ramp = ramps(height, width)
    image = torch.cat([ramp, ramp[:1]]).mul(255).round().to(torch.uint8)
    config = AugmentConfig(crop, scale, 1.0, flip=True, flip_vertical=True, photometric=False)
    for seed in range(6):
        result = random_crop(image, torch.zeros(height, width, dtype=torch.uint8), ramps(30, 40), config, Uniform(seed))
        assert result.image.shape == (3, *crop)
        # Coarse pixels are 4 px: at the border the ramp is clamped by up to half of one, 1/60 of the range.
        difference = (seen_logits(result) - result.image[:2].float() / 255).abs()[:, result.valid]
        assert difference.max() < 0.03
        assert difference.mean() < 0.006


def test_label_moves_with_the_image():
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(90, 110, generator=generator) < 0.3).to(torch.uint8)
    image = (label * 200).expand(3, 90, 110).contiguous()
    config = AugmentConfig((48, 64), (1.0, 1.0), 1.0, flip=True, flip_vertical=True, photometric=False)
    for seed in range(8):
        crop = random_crop(image, label, torch.zeros(2, 9, 11), config, Uniform(seed))
        assert torch.equal(crop.image[0] > 100, crop.label == 1)


def test_padding_is_ignored_and_invalid():
    image, label = torch.full((3, 20, 30), 7, dtype=torch.uint8), torch.ones(20, 30, dtype=torch.uint8)
    config = AugmentConfig((64, 64), (1.0, 1.0), 1.0, photometric=False)
    crop = random_crop(image, label, torch.zeros(2, 5, 8), config, Uniform(0))
    assert crop.valid.sum() == 600
    assert (crop.label[~crop.valid] == IGNORE).all()
    assert (crop.label[crop.valid] == 1).all()


def test_crop_avoids_one_class_where_it_can():
    label = torch.zeros(40, 400, dtype=torch.uint8)
    label[:, 370:] = 1  # only crops at the right end hold both classes in fair shares
    image, logits = torch.zeros(3, 40, 400, dtype=torch.uint8), torch.zeros(2, 10, 100)
    free = AugmentConfig((40, 60), (1.0, 1.0), 1.0, photometric=False)
    strict = AugmentConfig((40, 60), (1.0, 1.0), 0.75, photometric=False)

    def mixed(config):
        crops = [random_crop(image, label, logits, config, Uniform(seed)) for seed in range(60)]
        return sum(0.25 <= float((crop.label == 1).float().mean()) <= 0.75 for crop in crops)

    assert mixed(strict) > 2 * mixed(free)


def test_photometric_changes_the_image_only():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 2, (40, 40), generator=generator, dtype=torch.uint8)
    config = AugmentConfig((40, 40), (1.0, 1.0), 1.0, flip=False)
    crops = [random_crop(image, label, torch.zeros(2, 10, 10), config, Uniform(seed)) for seed in range(5)]
    assert all(torch.equal(crop.label, label) for crop in crops)
    assert sum(not torch.equal(crop.image, image) for crop in crops) >= 3


@pytest.fixture
def dataset(tmp_path):
    from PIL import Image

    samples = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (50, 60 + i, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        Image.fromarray((pixels[..., 0] > 128).to(torch.uint8).numpy()).save(tmp_path / f"{i}_label.png")
        samples.append(Sample(str(i), tmp_path / f"{i}.png", tmp_path / f"{i}_label.png"))
    return Dataset(tuple(samples), Classes.numbered(2))


def test_crops_are_numbered(dataset):
    """Crop i is the same in any run, so that resuming goes on where it stopped; an epoch visits every image."""

    def crops():
        return CropDataset(dataset, lambda i, size: torch.full((2, 5, 6), float(i)), AugmentConfig((32, 32)), 3, 1.0)

    first, second = crops(), crops()
    for index in (0, 7, 100):
        assert torch.equal(first[index].image, second[index].image)
        assert first[index].window == second[index].window
        assert first[index].name == str(int(first[index].logits[0, 0, 0]))  # of the sample that it is cut from
    assert {float(first[i].logits[0, 0, 0]) for i in range(3)} == {0.0, 1.0, 2.0}
    sampler = EpochSampler(4)
    sampler.set_epoch(2)
    assert list(sampler) == [8, 9, 10, 11]


def test_cache_respects_its_size(dataset):
    crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5, 6), AugmentConfig((32, 32)), 0, 1.3e-5)
    for i in range(6):
        crops[i]
    assert len(crops._cache) == 1


def test_batch_keeps_logits_of_differing_sizes(dataset):
    crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5 + i, 6), AugmentConfig((32, 32)), 0, 1.0)
    batch = CropBatch.collate([crops[i] for i in range(3)])
    assert batch.image.shape == (3, 3, 32, 32)
    assert {item.shape[1] for item in batch.logits} == {5, 6, 7}
    assert sorted(batch.names) == ["0", "1", "2"]
    assert batch.to(torch.device("cpu")).names == batch.names
    assert dense(Coarse(batch.logits[0][None], (8, 8))).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    "bad", [{"crop": (0, 5)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"max_class_share": 0.0}]
)
def test_bad_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AugmentConfig(**bad)
