"""Images of 1 to 16 channels through the whole method: base, features and context on every engine, crops, training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import K, context_of, expected_of, network
from projects import write_short_project
from sparserefine import BaseConfig, ExtractorConfig, FrozenBase, RefinerConfig, Selector, SparseRefiner
from sparserefine.bases.families.unet import UNet, load_unet, save_unet
from sparserefine.bases.load import load_base
from sparserefine.bases.loaded import LoadedModel
from sparserefine.bases.other import other_config
from sparserefine.bases.refined import refined
from sparserefine.data.batches import CropBatch
from sparserefine.data.crops import AugmentConfig, Crop, Uniform, Whole, random_crop
from sparserefine.data.readers.dataset import Dataset, Example
from sparserefine.files.image_config import ImageConfig
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import default_normalisation
from sparserefine.images.pictures import overlay, shrink, sites_picture
from sparserefine.sparse import Sites
from sparserefine.studies.assess import assess
from sparserefine.studies.evaluate import evaluate
from sparserefine.training.teacher import Teacher
from sparserefine.training.teacher_config import TeacherConfig
from support import ENGINES, KERNEL_ENGINES, assert_close, at_sites, device_of, engine_of, mask_of

SIZE = (20, 28)
CONTEXT = ExtractorConfig((4, 6), features=("rgb", "coords", "probabilities", "entropy"), context=True)


def image_of(channels: int, size: tuple[int, int] = SIZE, batch: int = 1) -> Tensor:
    """Random pixels, which begin with the same channels, however many there are."""
    random = torch.Generator().manual_seed(5)
    return torch.stack(
        [torch.randint(0, 256, (batch, *size), generator=random, dtype=torch.uint8) for _ in range(channels)], dim=1
    )


def base_of(channels: int, **settings: Any) -> FrozenBase:
    torch.manual_seed(1)
    mean, std = default_normalisation(channels)
    config = BaseConfig(ratio=0.5, **{"mean": mean, "std": std, **settings})
    return FrozenBase(UNet(3, (4, 8), channels), 3, config)


def config_of(channels: int, **settings: Any) -> RefinerConfig:
    mean, _ = default_normalisation(channels)
    return RefinerConfig(**{"selector": Selector(0.0, 90), "extractor": CONTEXT, "mean": mean, **settings})


def refiner_of(channels: int, engine: str = "torch", base: FrozenBase | None = None, **settings: Any) -> SparseRefiner:
    torch.manual_seed(2)
    refiner = SparseRefiner(base or base_of(channels), config_of(channels, **settings), engine=engine)
    for parameter in refiner.trained_parameters():  # nothing is at its start: the maps of the context are zero there
        nn.init.normal_(parameter, std=0.3)
    return refiner.eval()


# ---- how many channels


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_mean_or_std_says_how_many_and_the_other_follows(channels: int) -> None:
    by_mean, by_std = RefinerConfig(mean=(0.3,) * channels), RefinerConfig(std=(0.2,) * channels)
    assert by_mean.std == (0.25,) * channels
    assert by_std.mean == (0.5,) * channels
    assert by_mean.channels == by_std.channels == channels
    assert RefinerConfig().channels == 3
    assert not by_mean.rgb


@pytest.mark.parametrize(("bands", "rgb"), [(None, True), ((4, 3, 2), False), ((1,), False), ((5, 4, 3, 2), False)])
def test_bands_of_files_say_how_many(bands: tuple[int, ...] | None, rgb: bool) -> None:
    config, count = RefinerConfig(images=ImageConfig(bands=bands)), len(bands or "RGB")
    assert (config.mean, config.std) == default_normalisation(count)
    assert config.channels == count
    assert config.rgb is rgb
    assert replace(config, mean=(0.1,) * count).std == config.std
    with pytest.raises(ValueError, match=r"images.bands = \[1, 2\]: 2 channels, mean and std have numbers for 4"):
        RefinerConfig(images=ImageConfig(bands=(1, 2)), mean=(0.1,) * 4, std=(0.2,) * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,) * 17}, "expected a number for each channel, 1 to 16"),
        ({"mean": ()}, "expected a number for each channel, 1 to 16"),
        ({"mean": (0.5,) * 4, "std": (0.2,) * 5}, "as many in both"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [RefinerConfig, BaseConfig])
def test_normalisations_that_fit_no_image_are_refused(config: Any, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings, **({"ratio": 0.5} if config is BaseConfig else {}))


@pytest.mark.parametrize(("channels", "other"), [(1, 3), (4, 3), (3, 4), (3, 1)])
def test_an_image_of_other_channels_is_refused(channels: int, other: int) -> None:
    refiner, image = refiner_of(channels), image_of(other)
    match = rf"image is \(1, {other}, 20, 28\), expected \[B, {channels}, H, W\] .*: it has {other} channels?; give"
    with pytest.raises(ValueError, match=match):
        refiner(image)
    with pytest.raises(ValueError, match=match):
        refiner.refine(image, torch.zeros(1, 3, 10, 14))


# ---- the base


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 4])
def test_base_sees_all_channels_normalised(channels: int, dtype: torch.dtype) -> None:
    mean, std = tuple(0.1 * i + 0.2 for i in range(channels)), tuple(0.1 * i + 0.3 for i in range(channels))
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x.new_zeros(len(x), 2, *x.shape[2:])

    base, image = FrozenBase(model, 2, BaseConfig(ratio=0.5, mean=mean, std=std)), image_of(channels)
    base(image if dtype == torch.uint8 else image.float() / 255)
    small = F.interpolate(image.float() / 255, (10, 14), mode="bilinear", antialias=True)
    expected = (small - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    assert_close(seen[0], expected)
    assert base.macs(*SIZE) is None
    assert base_of(channels).macs(*SIZE) > 0


@pytest.mark.parametrize(("bands", "channels"), [((3, 2, 1), 4), ((1, 1, 1), 1), ((4,), 6), ((1, 2, 3), 3)], ids=str)
def test_bands_are_what_the_base_sees(bands: tuple[int, ...], channels: int) -> None:
    base, image = base_of(len(bands), bands=bands), image_of(channels)
    expected = base_of(len(bands))(image[:, [band - 1 for band in bands]])
    assert torch.equal(base(image), expected)
    assert base.identity != base_of(len(bands)).identity  # stored logits of one are not those of the other
    assert base.identity != base_of(len(bands), bands=(2,) * len(bands)).identity
    refiner_of(channels, base=base)(image)


def test_identity_without_bands_is_the_former_one() -> None:
    """Logits stored by former versions stay valid."""
    base = FrozenBase(_zeros, 2, BaseConfig(ratio=0.5))
    assert base.identity == "test_channels._zeros:" + _former_identity(base)


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 2, *x.shape[2:])


def _former_identity(base: FrozenBase) -> str:
    import hashlib

    c = base.config
    return hashlib.sha256(repr((c.ratio, c.size, c.mean, c.std, c.outputs, 2, c.class_map)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("channels", "settings", "message"),
    [
        (4, {}, r"takes 3 channels, images have 4; .* base.bands: \[1, 2, 3\], counted from 1"),
        (1, {}, r"takes 3 channels, images have 1; .* base.bands: \[1, 1, 1\]"),
        (2, {"bands": (1, 2, 3)}, r"bands = \[1, 2, 3\], but images have 2 channels"),
    ],
)
def test_an_rgb_model_needs_bands_for_other_images(channels: int, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseRefiner(base_of(3, **settings), config_of(channels))
    with pytest.raises(ValueError, match=r"base\.bands"):
        base_of(3, **settings)(image_of(channels))


def test_a_one_channel_model_never_gets_a_mix() -> None:
    with pytest.raises(ValueError, match=r"takes 1 channel, images have 3; .*base.bands: \[1\]"):
        SparseRefiner(base_of(1), config_of(3))
    assert torch.equal(base_of(1, bands=(2,))(image_of(3)), base_of(1)(image_of(3)[:, 1:2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": (0,)}, r"base.bands = \(0,\), expected the channels .* from 1 to 16"),
        ({"bands": ()}, r"base.bands = \(\), expected"),
        ({"bands": (17,)}, r"expected the channels"),
        ({"bands": (1, 2), "mean": (0.5,)}, r"2 of them, base.mean and base.std have 1 channel; expected as many"),
    ],
    ids=str,
)
def test_bands_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseConfig(ratio=0.5, **settings)


def test_a_model_that_knows_its_channels_is_believed() -> None:
    known = LoadedModel(_zeros, 2, channels=3)
    with pytest.raises(ValueError, match=r"takes 3 channels, but base.mean, base.std or base.bands have 4"):
        FrozenBase(known, 2, BaseConfig(ratio=0.5, mean=(0.5,) * 4))
    assert FrozenBase(LoadedModel(_zeros, 2), 2, BaseConfig(ratio=0.5, bands=(1, 2))).mean == (0.5, 0.5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_unet_file_holds_its_channels(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = UNet(2, (4, 8), channels).eval(), tmp_path / "unet.safetensors"
    save_unet(model, path)
    assert load_unet(path).in_channels == channels
    base = load_base(BaseConfig(f"unet:{path}", ratio=0.5))
    assert (base.mean, base.std) == default_normalisation(channels)
    assert base(image_of(channels)).shape == (1, 2, 10, 14)
    if channels != 3:
        with pytest.raises(ValueError, match=rf"takes {channels} channels?, but base.mean, .* have 3"):
            load_base(BaseConfig(f"unet:{path}", ratio=0.5, mean=(0.5,) * 3))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_refiner_as_a_base(channels: int) -> None:
    inner = refiner_of(channels)
    base = FrozenBase(refined(inner), config=BaseConfig(ratio=0.5))
    image = image_of(channels)
    small = F.interpolate(image.float(), (10, 14), mode="bilinear", antialias=True) / 255
    assert_close(base(image), inner(small).logits())
    refiner_of(channels, base=base)(image)


def test_a_refiner_as_a_base_of_images_that_are_read_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    base = FrozenBase(refined(refiner_of(3, images=ImageConfig(range="12bit"))), config=BaseConfig(ratio=0.5))
    refiner_of(3, base=base, images=ImageConfig(range=(0, 1000), exif="ignore"))
    assert "a refiner of images with bands None, range 12bit; these have bands None, range (0.0, 1000.0)" in caplog.text
    caplog.clear()
    refiner_of(3, base=base, images=ImageConfig(range=(0, 4095), exif="ignore"))
    assert not caplog.text


def test_bands_of_another_model_for_the_same_images() -> None:
    """Of the same kind it sees what the base sees, unless it is told otherwise; then it has its own normalisation."""
    base = BaseConfig("unet:a", ratio=0.5, mean=(0.1, 0.2, 0.3), bands=(3, 2, 1))
    assert other_config(base, "unet:b", ratio=1.0).bands == (3, 2, 1)
    assert other_config(base, "hf:b", ratio=1.0) == BaseConfig("hf:b", ratio=1.0)
    assert other_config(base, "unet:b", ratio=1.0, bands=(1, 2)) == BaseConfig("unet:b", ratio=1.0, bands=(1, 2))
    assert other_config(base, "unet:b", ratio=1.0, bands=(4, 1, 2)).mean == base.mean


def test_the_teacher_sees_bands_in_windows() -> None:
    """Float pixels too: they are in 0..1 already."""
    image, labels = image_of(4, (96, 160))[0].float() / 255, Classes.numbered(2)
    settings = TeacherConfig(ratio=0.75, window=64, overlap=0, bands=(2, 4))
    teacher = object.__new__(Teacher)
    teacher.config, teacher._device = settings, torch.device("cpu")
    own = settings.base_config(BaseConfig(ratio=0.5))
    assert own.bands == (2, 4)
    torch.manual_seed(0)
    teacher.model = FrozenBase(nn.Conv2d(2, 2, 1), 2, own, classes=labels)
    whole = replace(settings, window=0)
    in_windows = teacher.predict(image)
    teacher.config = whole
    assert_close(in_windows.logits(), teacher.predict(image).logits(), torch.float16)


# ---- engines


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 4, 16])
@pytest.mark.parametrize("engine", ENGINES)
def test_pixels(engine: str, channels: int, dtype: torch.dtype) -> None:
    image, mask, device = image_of(channels, batch=3).to(dtype), mask_of("random", SIZE, 3), device_of(engine)
    scale, shift = torch.rand(channels), torch.randn(channels)
    sites = Sites.from_mask(mask.to(device))
    actual = engine_of(engine).pixels(image.to(device), sites.coords, scale.to(device), shift.to(device))
    expected = at_sites(image.double() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), mask)
    assert_close(actual.cpu(), expected, torch.float32)


@pytest.mark.parametrize("channels", [1, 4, 16])
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_packed_networks_take_any_inputs(engine: str, channels: int) -> None:
    net, device = network((8, 12), context=channels + K, inputs=channels), device_of(engine)
    mask, run = mask_of("random", (9, 7), batch=2).to(device), engine_of(engine)
    x = torch.randn(int(mask.sum()), channels)
    expected = expected_of(net, x, mask)
    net = net.to(device)
    plan = run.plan(mask, net.spec)
    with torch.no_grad():
        packed = run.prepare(net)
        assert packed is not None
        actual = packed(x.to(device), plan, context_of(net, plan))
    assert_close(actual.cpu(), expected, torch.float32)


@pytest.mark.parametrize("channels", [1, 4, 16])
@torch.no_grad()
def test_8_bits(channels: int) -> None:
    """The stem is not rounded, so its inputs change nothing in the rest."""
    refiner, image = refiner_of(channels), image_of(channels)
    refiner.quantize([image])
    exact = refiner(image)
    rounded = SparseRefiner(refiner.base, refiner.config, engine="cpu-int8").eval()
    rounded.quantize([image])
    rounded.load_state_dict(refiner.state_dict())
    logits = rounded(image).sparse_logits
    assert 0 < float((logits - exact.sparse_logits).norm()) <= 0.1 * float(exact.sparse_logits.norm())


# ---- weights


@pytest.mark.parametrize("channels", [1, 4])
def test_save_and_load(channels: int, tmp_path: Path) -> None:
    refiner, image = refiner_of(channels), image_of(channels)
    refiner.save_pretrained(tmp_path / "refiner")
    again = SparseRefiner.from_pretrained(tmp_path / "refiner", engine="torch")
    assert again.config == refiner.config
    assert torch.equal(again(image).logits(), refiner(image).logits())


def test_bands_are_stored_only_where_there_are_some(tmp_path: Path) -> None:
    """Former versions know no bands; they read refiners that have none."""
    for name, bands in (("with", (3, 1, 2)), ("without", None)):
        base = base_of(3, bands=bands)
        refiner_of(3, base=base).save_pretrained(tmp_path / name)
        stored = json.loads((tmp_path / name / "config.json").read_text())["base"]
        assert stored.get("bands") == (list(bands) if bands else None)
        assert ("bands" in stored) == (bands is not None)
        assert SparseRefiner.from_pretrained(tmp_path / name).base.identity == base.identity


@pytest.mark.parametrize(("former", "now"), [(3, 4), (4, 1)])
def test_warm_start_with_other_channels(former: int, now: int, tmp_path: Path) -> None:
    there, refiner = refiner_of(former), refiner_of(now)
    there.save_pretrained(tmp_path / "former")
    for parameter in refiner.trained_parameters():
        nn.init.normal_(parameter)
    before, stored = {k: v.clone() for k, v in refiner.trained_state().items()}, there.trained_state()
    report = str(refiner.start_from(tmp_path / "former"))
    assert f"stem ({former} -> {now} channels), context ({former} -> {now} channels)" in report
    for name, tensor in refiner.trained_state().items():
        if name == "extractor.stem.weight":
            assert torch.equal(tensor[:, :now], before[name][:, :now])  # the image's channels begin anew
            assert torch.equal(tensor[:, now:], stored[name][:, former:])
        else:
            assert torch.equal(tensor, (before if name.startswith("extractor.context") else stored)[name]), name


# ---- crops


def whole_of(image: Tensor, name: str = "") -> Whole:
    return Whole(image, torch.zeros(image.shape[1:], dtype=torch.uint8), torch.zeros(2, 5, 7), name)


def cropped(image: Tensor, uniform: Uniform, *, rgb: bool = True, **settings: Any) -> tuple[Crop, Tensor]:
    config = AugmentConfig((16, 24), max_class_share=1.0, **settings)
    crop = random_crop(whole_of(image), config, uniform, rgb=rgb)
    return crop, CropBatch.of([crop], config.crop, torch.device("cpu")).image


@pytest.mark.parametrize("channels", [1, 4])
def test_crops_of_both_dtypes_show_the_same(channels: int) -> None:
    image = image_of(channels, (60, 80))[0]
    image = F.interpolate(image[None], (30, 40), mode="bilinear", antialias=True)[0]  # smooth, nothing is cut off
    for seed in range(6):
        _, as_bytes = cropped(image, Uniform(seed))
        _, as_floats = cropped(image.float() / 255, Uniform(seed))
        assert as_bytes.dtype == torch.uint8
        assert as_bytes.shape == as_floats.shape == (1, channels, 16, 24)
        assert as_floats.min() >= 0
        assert as_floats.max() <= 1
        assert float((as_bytes.float() / 255 - as_floats).abs().max()) <= 1.5 / 255


@pytest.mark.parametrize(("channels", "rgb"), [(1, True), (4, True), (3, False), (16, False)])
def test_without_colours_brightness_and_contrast_change_all_channels_alike(channels: int, rgb: bool) -> None:
    changed = 0
    for seed in range(8):
        crop, _ = cropped(image_of(channels)[0], Uniform(seed), rgb=rgb)
        gain, offset = crop.colour[0, 0], crop.colour[0, -1]
        assert 0.5 <= float(gain) <= 1.5
        assert -32 <= float(offset) <= 32
        assert torch.equal(crop.colour[:, :-1], gain * torch.eye(channels))
        assert bool((crop.colour[:, -1] == offset).all())
        changed += float(gain) != 1 or float(offset) != 0
    assert changed
    crop, _ = cropped(image_of(3)[0], Uniform(3))
    assert not torch.equal(crop.colour[:, :-1], crop.colour[0, 0] * torch.eye(3))  # hue and saturation mix RGB


def test_a_batch_of_both_dtypes_is_in_floats_and_one_of_other_channels_refused() -> None:
    config = AugmentConfig((16, 24), (1.0, 1.0), 1.0, flip=False, photometric=False)
    image = image_of(4)[0]
    crops = [random_crop(whole_of(one, f"image {i}"), config, Uniform(7)) for i, one in enumerate((image, image / 255))]
    batch = CropBatch.of(crops, config.crop, torch.device("cpu")).image
    assert batch.dtype == torch.float32
    assert_close(batch[0], batch[1])
    other = random_crop(whole_of(image_of(1)[0], "grey"), config, Uniform(7))
    with pytest.raises(ValueError, match="grey: 1 channel, image 0 has 4; expected as many in all images"):
        CropBatch.of([crops[0], other], config.crop, torch.device("cpu"))


# ---- pictures and studies


@pytest.mark.parametrize(("channels", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (4, (0, 1, 2))])
def test_pictures_show_three_bands(channels: int, shown: tuple[int, ...]) -> None:
    image = image_of(channels)[0]
    view = image[list(shown)]
    assert torch.equal(shrink(image, 100), view)
    assert torch.equal(shrink(image.float() / 255, 100), view)
    labels, classes = torch.ones(SIZE, dtype=torch.uint8), Classes.numbered(2)
    assert torch.equal(overlay(image, labels, classes), overlay(view, labels, classes))
    assert torch.equal(sites_picture(image, labels > 0), sites_picture(view, labels > 0))


@pytest.mark.parametrize("channels", [1, 4])
def test_evaluate_and_assess(channels: int) -> None:
    refiner, image = refiner_of(channels), image_of(channels)[0]
    label = torch.randint(0, 3, SIZE, dtype=torch.uint8)
    dense = FrozenBase(UNet(3, (4, 8), channels), 3, replace(refiner.base.config, ratio=1.0))
    assert evaluate(refiner, [(image, label)], dense=dense).images == 1
    assert evaluate(refiner, [(image.float() / 255, label)]).images == 1
    assert assess(refiner, [("one", image, label)], dense).images == ("one",)


def test_benchmark(tmp_path: Path) -> None:
    from sparserefine.studies.benchmark.measure import benchmark
    from sparserefine.studies.benchmark.records import BaseEntry, Settings

    save_unet(UNet(3, (4, 8), 4), tmp_path / "unet.safetensors")
    entry = BaseEntry(f"unet:{tmp_path / 'unet.safetensors'}", (16, 24))
    settings = Settings((entry,), size=(32, 48), densities=(0.1,), presets=("slim",), rounds=1, device="cpu")
    report = benchmark(settings)
    assert not report.left_out
    assert len(report.records) == 1


# ---- training


def with_channels(monkeypatch: pytest.MonkeyPatch, channels: int, *, floats: bool) -> None:
    """Makes readers deliver images of so many channels: red, green and blue, and these again."""
    example = Dataset.example

    def replaced(self: Dataset, index: int) -> Example:
        image, label, valid = example(self, index)
        image = image.repeat(6, 1, 1)[:channels]
        return Example(image.float() / 255 if floats else image, label, valid)

    monkeypatch.setattr(Dataset, "example", replaced)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "floats", "bands"), [(1, False, None), (4, True, None), (4, False, (3, 2, 1))])
def test_two_steps_of_training_and_what_follows(
    channels: int, floats: bool, bands: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparserefine.commands.main import main

    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    with_channels(monkeypatch, channels, floats=floats)
    seen = 3 if bands else channels
    save_unet(UNet(2, (4, 8), seen), tmp_path / "base.safetensors")
    options = ["--mean", json.dumps([0.5] * channels), "--extractor.context", "true"]
    options += ["--base.bands", json.dumps(bands)] if bands else []
    short = ["--training.steps", "2", "--training.val_every", "2", "--training.pictures", "1"]
    stored = ["--logits.source", "stored", "--logits.folder", "logits"]
    assert main(["logits", "config.yaml", *stored, *options]) == 0
    assert main(["train", "config.yaml", *stored, *short, *options]) == 0
    assert main(["evaluate", "config.yaml", "--refiner", "run/best", *options]) == 0
    assert SparseRefiner.from_pretrained("run/best").config.channels == channels
