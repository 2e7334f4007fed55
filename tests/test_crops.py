"""Training crops: image, label and coarse logits must stay in register through resize, crop, flip and padding."""

import threading
from dataclasses import replace

import pytest
import torch

from sparserefine.data.batches import CropBatch
from sparserefine.data.crops import AugmentConfig, CropDataset, EpochSampler, Uniform, Whole, random_crop
from sparserefine.data.focus import Focus
from sparserefine.data.loader import CropLoader
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.files.images import ImageError
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import dense
from sparserefine.images.upsampling import Upsampling


def ramps(height, width):
    """Two planes that rise linearly from 0 to 1 over the image, read at pixel centres; bilinear sampling keeps them."""
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    return torch.stack([rows[:, None].expand(height, width), columns[None].expand(height, width)])


def made(image, label, logits, config, uniform, focus=None, **options):
    """One random crop, as a batch of one."""
    crop = random_crop(Whole(image, label, logits, focus=focus), config, uniform, **options)
    return CropBatch.of([crop], config.crop, torch.device("cpu"))


def seen_logits(batch):
    """The first crop's coarse logits at each of its pixels."""
    return dense(Coarse(batch.logits[:1], tuple(batch.label.shape[1:]), windows=batch.parts[:1]))[0]


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (1.9, 2.0), (0.5, 2.0)])
@pytest.mark.parametrize("crop", [(40, 56), (64, 64), (200, 30)])
def test_window_of_logits_shows_what_the_image_shows(scale, crop):
    height, width = 120, 160
    ramp = ramps(height, width)
    image = torch.cat([ramp, ramp[:1]]).mul(255).round().to(torch.uint8)
    config = AugmentConfig(crop, scale, 1.0, flip=True, flip_vertical=True, photometric=False)
    for seed in range(6):
        result = made(image, torch.zeros(height, width, dtype=torch.uint8), ramps(30, 40), config, Uniform(seed))
        assert result.image.shape == (1, 3, *crop)
        # Coarse pixels are 4 px: at the border the ramp is clamped by up to half of one, 1/60 of the range.
        difference = (seen_logits(result) - result.image[0, :2].float() / 255).abs()[:, result.valid[0]]
        assert difference.max() < 0.03
        assert difference.mean() < 0.006


def test_label_moves_with_the_image():
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(90, 110, generator=generator) < 0.3).to(torch.uint8)
    image = (label * 200).expand(3, 90, 110).contiguous()
    config = AugmentConfig((48, 64), (1.0, 1.0), 1.0, flip=True, flip_vertical=True, photometric=False)
    for seed in range(8):
        crop = made(image, label, torch.zeros(2, 9, 11), config, Uniform(seed))
        assert torch.equal(crop.image[:, 0] > 100, crop.label == 1)


def test_padding_is_ignored_and_invalid():
    image, label = torch.full((3, 20, 30), 7, dtype=torch.uint8), torch.ones(20, 30, dtype=torch.uint8)
    config = AugmentConfig((64, 64), (1.0, 1.0), 1.0, photometric=False)
    crop = made(image, label, torch.zeros(2, 5, 8), config, Uniform(0))
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
        crops = [made(image, label, logits, config, Uniform(seed)) for seed in range(60)]
        return sum(0.25 <= float((crop.label == 1).float().mean()) <= 0.75 for crop in crops)

    assert mixed(strict) > 2 * mixed(free)


def test_photometric_changes_the_image_only():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 2, (40, 40), generator=generator, dtype=torch.uint8)
    config = AugmentConfig((40, 40), (1.0, 1.0), 1.0, flip=False)
    crops = [made(image, label, torch.zeros(2, 10, 10), config, Uniform(seed)) for seed in range(5)]
    assert all(torch.equal(crop.label[0], label) for crop in crops)
    assert sum(not torch.equal(crop.image[0], image) for crop in crops) >= 3


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
    crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5 + i, 6), AugmentConfig((32, 32), (0.5, 0.5)), 0, 1.0)
    batch = CropBatch.of([crops[i] for i in range(3)], (32, 32), torch.device("cpu"))
    assert batch.image.shape == (3, 3, 32, 32)
    assert {item.shape[1] for item in batch.logits} == {5, 6, 7}
    assert sorted(batch.names) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "bad", [{"focus": 1.5}, {"crop": (0, 5)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"max_class_share": 0.0}]
)
def test_bad_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AugmentConfig(**bad)


@pytest.mark.parametrize("scale", [(0.6, 0.6), (1.0, 1.0), (1.7, 1.7)])
def test_the_part_of_the_logits_gives_what_the_whole_gives(scale):
    generator = torch.Generator().manual_seed(1)
    image, label = torch.zeros(3, 120, 160, dtype=torch.uint8), torch.zeros(120, 160, dtype=torch.uint8)
    logits = torch.randn(2, 37, 51, generator=generator)
    config = AugmentConfig((32, 40), scale, 1.0, flip_vertical=True)
    for seed in range(12):
        part, whole = (made(image, label, logits, config, Uniform(seed), whole_logits=kept) for kept in (False, True))
        assert part.logits[0].numel() < whole.logits[0].numel() == logits.numel()
        torch.testing.assert_close(seen_logits(part), seen_logits(whole), rtol=0, atol=1e-5)


def test_resize_and_colours_are_those_of_floats():
    """In float64 from the definition: resize, affine map, rounding; a rounded value between makes 1 or 2 of 255."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (3, 90, 110), generator=generator, dtype=torch.uint8)
    config = AugmentConfig((60, 60), (0.8, 0.8), 1.0, flip=False)
    changed = 0
    for seed in range(6):
        whole = Whole(image, torch.zeros(90, 110, dtype=torch.uint8), torch.zeros(2, 9, 11))
        crop = random_crop(whole, config, Uniform(seed))
        result = CropBatch.of([crop], config.crop, torch.device("cpu"))
        pixels = torch.nn.functional.interpolate(
            crop.image[None].double(), crop.size, mode="bilinear", antialias=True, align_corners=False
        )[0]
        colour = crop.colour.double()
        changed += not torch.equal(colour[:, :3], torch.eye(3, dtype=torch.float64))
        expected = torch.einsum("ij,jhw->ihw", colour[:, :3], pixels) + colour[:, 3, None, None]
        assert (result.image[0].double() - expected.clamp(0, 255)).abs().max() < 2.5
    assert changed > 2


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (17, 1), (1, 17)], ids=str)
def test_a_single_column_or_row(size):
    """torch resizes uint8 to a single column wrongly."""
    image = torch.randint(0, 256, (3, 30, 40), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    whole = Whole(image, torch.zeros(30, 40, dtype=torch.uint8), torch.zeros(2, 9, 11))
    config = AugmentConfig(size, (0.02, 0.02), 1.0, flip=False, photometric=False)
    crop = replace(random_crop(whole, config, Uniform(0)), size=size)
    result = CropBatch.of([crop], size, torch.device("cpu")).image.double()
    pixels = crop.image[None].double()
    expected = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    assert (result - expected).abs().max() < 1.5


def test_crops_around_uncertain_pixels():
    """All of them show the only uncertain spot; at half of the crops, about half do."""
    image, label = torch.zeros(3, 400, 400, dtype=torch.uint8), torch.zeros(400, 400, dtype=torch.uint8)
    logits = torch.tensor([5.0, -5.0])[:, None, None].repeat(1, 100, 100)
    logits[:, 70:72, 20:23] = 0
    focus = Focus(0.5, Upsampling())(logits)
    assert focus.tolist() == [7020, 7021, 7022, 7120, 7121, 7122]

    def shown(share):
        config = AugmentConfig((80, 80), (0.8, 1.25), 1.0, flip_vertical=True, focus=share)
        crops = [made(image, label, logits, config, Uniform(seed), focus=focus) for seed in range(60)]
        return sum(bool((seen_logits(crop)[0] == 0).any()) for crop in crops)

    assert shown(1.0) == 60
    assert 20 < shown(0.5) < 45
    assert shown(0.0) < 10
    nowhere = AugmentConfig((80, 80), focus=1.0)
    made(image, label, logits, nowhere, Uniform(0), focus=focus[:0])  # nothing is uncertain: anywhere


def test_threads_give_the_same_crops_in_order(dataset):
    def epoch(threads):
        crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5, 6), AugmentConfig((32, 32)), 0, 1.0)
        loader = CropLoader(crops, 2, 5, threads)
        loader.sampler.set_epoch(3)
        assert len(loader) == 5
        return [CropBatch.of(batch, (32, 32), torch.device("cpu")) for batch in loader]

    alone, together = epoch(0), epoch(3)
    assert len(alone) == len(together) == 5
    for one, other in zip(alone, together, strict=True):
        assert one.names == other.names
        assert one.windows == other.windows
        assert torch.equal(one.image, other.image)


def test_an_image_that_cannot_be_read_ends_the_epoch(dataset):
    dataset.samples[1].image.write_bytes(b"no image")
    crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5, 6), AugmentConfig((32, 32)), 0, 1.0)
    with pytest.raises(ImageError, match=r"1\.png"):
        list(CropLoader(crops, 2, 9, 2))


def test_an_epoch_that_is_not_read_to_its_end_leaves_no_thread(dataset):
    crops = CropDataset(dataset, lambda i, size: torch.zeros(2, 5, 6), AugmentConfig((32, 32)), 0, 1.0)
    batches = iter(CropLoader(crops, 2, 50, 2))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crops")]
