"""Numbers of a training configuration: finite and bounded, and refused by name before anything is allocated."""

from __future__ import annotations

import math
from typing import Any

import psutil
import pytest
import torch

from sparserefine import BaseConfig, Config
from sparserefine.data.crops import AugmentConfig
from sparserefine.data.readers.config import DataConfig
from sparserefine.training.config import CrossFit, LogitsConfig, TrainingConfig, check_batch_fits

FLOATS = (
    "lr",
    "clip",
    "weight_decay",
    "warmup",
    "dice",
    "teacher_weight",
    "temperature",
    "ema",
    "boundary_weight",
    "deep_supervision",
    "cache_gb",
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"training\.{name} = {value}, expected a finite number, (more than|at least) 0"
    ):
        TrainingConfig(**{name: value})


def test_no_float_is_forgotten() -> None:
    assert {name for name, value in vars(TrainingConfig()).items() if isinstance(value, float)} == set(FLOATS)


WHOLE = {
    "steps": (1, 1_000_000_000),
    "batch": (1, 65_536),
    "accumulate": (1, 65_536),
    "val_every": (1, 1_000_000_000),
    "seed": (0, 2**32 - 1),
    "workers": (0, 1024),
    "pictures": (0, 1000),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_bounded(name: str) -> None:
    low, high = WHOLE[name]
    for value in (low, high):
        assert getattr(TrainingConfig(**{"batch": 1, name: value}), name) == value
    for bad in (low - 1, high + 1, 1.5, math.nan):
        with pytest.raises(
            ValueError, match=rf"training\.{name} = {bad}, expected a whole number from {low} to {high}"
        ):
            TrainingConfig(**{name: bad})


def test_no_whole_number_is_forgotten() -> None:
    values = vars(TrainingConfig()).items()
    assert {name for name, value in values if isinstance(value, int) and not isinstance(value, bool)} == set(WHOLE)


def test_crops_a_step_are_bounded() -> None:
    with pytest.raises(ValueError, match=r"batch = 1024, training\.accumulate = 65: 66560 crops a step.*at most 65536"):
        TrainingConfig(batch=1024, accumulate=65)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"crop": (0, 5)}, r"augment\.crop = 0, expected a whole number from 1 to 16384"),
        ({"crop": (100_000, 100_000)}, r"augment\.crop = 100000, expected a whole number from 1 to 16384"),
        ({"crop": (8192, 8193)}, r"augment\.crop = \(8192, 8193\): 67117056 pixels, expected at most 67108864"),
        ({"scale": (math.nan, 1.0)}, r"augment\.scale = nan, expected a finite number"),
        ({"scale": (1.0, math.inf)}, r"augment\.scale = inf, expected a finite number"),
        (
            {"scale": (1e-320, 1.0)},
            r"augment\.scale = 1e-320, expected a finite number, at least 0\.01 and at most 100",
        ),
        ({"scale": (2.0, 1.0)}, r"augment\.scale = \(2\.0, 1\.0\), expected the smaller factor first"),
        ({"max_class_share": math.nan}, r"augment\.max_class_share = nan"),
    ],
)
def test_augmentation_is_bounded(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**bad)


def test_real_crops_are_accepted() -> None:
    for crop in ((512, 1024), (1024, 2048), (8192, 8192), (16_384, 4096)):
        assert AugmentConfig(crop).crop == crop


@pytest.mark.parametrize("entry", [{"split": "", "base": "unet:x"}, {"split": "train", "base": " "}])
def test_crossfit_without_a_name(entry: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"logits\.crossfit: (split|base) is empty"):
        CrossFit(**entry)


def test_stored_logits_need_a_folder() -> None:
    with pytest.raises(ValueError, match=r"logits\.source = 'stored' needs logits\.folder"):
        LogitsConfig("stored", " ")


# ---- memory


def config(crop: tuple[int, int], *, base: BaseConfig | None = None, **training: Any) -> Config:
    base = base or BaseConfig("unet:x", ratio=0.5)
    training_config = TrainingConfig(device="cpu", **training)
    data = DataConfig(name="folder", root="data")
    return Config(data, base, "run", augment=AugmentConfig(crop), training=training_config)


@pytest.fixture(autouse=True)
def _eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"total": 8 * 10**9})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_the_papers_batch_fits() -> None:
    check_batch_fits(config((512, 1024), batch=32), 19)


def test_a_batch_that_no_memory_holds_is_refused() -> None:
    # 11 bytes a pixel, and 19 float32 at 1/64 of its sides: 1/32 of the base's input.
    expected = 16 * (11 + 4 * 19 / 64**2) * 8192 * 8192 / 1e9
    words = (
        rf"training\.batch = 16 crops of 8192 x 8192 pixels .* {expected:.1f} GB, the memory of cpu is 8\.0 GB; take"
    )
    with pytest.raises(ValueError, match=words):
        check_batch_fits(config((8192, 8192), batch=16), 19)


def test_batches_that_wait_count() -> None:
    check_batch_fits(config((4096, 4096), batch=8, workers=2), 2)
    with pytest.raises(ValueError, match=r"with 16 workers: .*the machine's memory is 8\.0 GB"):
        check_batch_fits(config((4096, 4096), batch=8, workers=16), 2)


def test_logits_of_a_large_base_count() -> None:
    base = BaseConfig("unet:x", size=(4096, 4096))
    check_batch_fits(config((64, 64), base=base, batch=8), 1000)  # 65 MB each at a stride of 32
    with pytest.raises(ValueError, match=r"the memory of cpu is 8\.0 GB"):
        check_batch_fits(config((64, 64), base=base, batch=256), 1000)


def test_the_memory_of_a_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("sparserefine.training.config.device_named", lambda name: gpu)
    properties = type("Properties", (), {"total_memory": 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with pytest.raises(ValueError, match=r"the memory of cuda is 1\.0 GB"):
        check_batch_fits(config((4096, 4096), batch=8), 2)
