"""The teacher: which model it is, whole images and windows of them, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.bases.other import other_config
from sparserefine.engines.choose import get_engine
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.training import teacher as module
from sparserefine.training.forecast import Forecast
from sparserefine.training.teacher import Teacher, teacher_labels
from sparserefine.training.teacher_config import TeacherConfig

CPU = torch.device("cpu")


@pytest.fixture
def teacher_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Teacher]:
    """Makes a teacher of a model given in Python."""

    def made(model: nn.Module, config: TeacherConfig, classes: int = 3) -> Teacher:
        def load(base: BaseConfig, of: Classes, **_: str) -> FrozenBase:
            return FrozenBase(model, classes, base)

        monkeypatch.setattr(module, "load_base", load)
        return Teacher(config, BaseConfig(ratio=0.25), Classes.numbered(classes), CPU)

    return made


# ---- which model


def test_the_teacher_is_the_base_at_full_resolution() -> None:
    base = BaseConfig("unet:a", ratio=0.25, mean=(0.1, 0.2, 0.3), class_map=(0, 1, 1))
    assert TeacherConfig().base_config(base) == replace(base, ratio=1.0)
    assert TeacherConfig(size=(64, 32)).base_config(base) == replace(base, ratio=None, size=(64, 32))


def test_another_model_of_the_same_kind_has_the_bases_settings() -> None:
    base = BaseConfig("unet:a", size=(32, 32), mean=(0.1, 0.2, 0.3), class_map=(0, 1, 1), outputs="scores")
    assert other_config(base, "unet:b", ratio=0.5) == replace(base, name="unet:b", ratio=0.5, size=None)
    other = other_config(base, "hf:b", ratio=0.5)
    assert other == BaseConfig("hf:b", ratio=0.5)
    assert other_config(base, "hf:b", ratio=0.5, class_map="map.yaml").class_map == "map.yaml"
    assert TeacherConfig("hf:b", class_map=(1, 0)).base_config(base) == BaseConfig("hf:b", ratio=1.0, class_map=(1, 0))


def test_what_changes_predictions_changes_the_identity(tmp_path: Any) -> None:
    for name in "ab":
        save_unet(UNet(2, (4,)), tmp_path / name)
    base = BaseConfig(f"unet:{tmp_path / 'a'}", ratio=0.25)

    def identity(**options: Any) -> str:
        return Teacher(TeacherConfig(**options), base, Classes.numbered(2), CPU).identity

    same = identity()
    assert identity(source="stored", folder="x", overlap=64) == same
    others = [
        {"ratio": 0.5},
        {"size": (32, 32)},
        {"name": f"unet:{tmp_path / 'b'}"},
        {"window": 512},
        {"window": 512, "overlap": 64},
    ]
    assert len({same, *(identity(**options) for options in others)}) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": None}, "teacher.name = None, expected the name of a base"),
        ({"ratio": 0.0}, "teacher.ratio = 0.0, expected more than 0 and at most 1"),
        ({"size": (0, 32)}, r"teacher.size = \(0, 32\), expected at least 1 pixel"),
        ({"source": "disk"}, "teacher.source = 'disk', expected 'stored' or 'live'"),
        ({"source": "stored"}, "teacher.source = 'stored' needs teacher.folder"),
        ({"window": 500}, "teacher.window = 500, expected a multiple of 32"),
        ({"window": -32}, "teacher.window = -32, expected a whole number from 0"),
        ({"window": 512, "overlap": 32}, "teacher.overlap = 32, expected a multiple of 64"),
        ({"window": 256}, "teacher.overlap = 256, expected less than teacher.window = 256"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TeacherConfig(**options)


# ---- windows


class Strided(nn.Module):
    """Two convolutions that see 8 pixels beyond their own cell of ``stride`` pixels, at most."""

    def __init__(self, stride: int, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 4, 2 * stride - 1, stride, stride - 1)
        self.second = nn.Conv2d(4, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 5 * self.second(self.first(x).relu())
        return result


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(130, 300), (300, 130), (96, 96), (97, 129), (160, 224), (60, 70), (255, 257)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_windows_agree_with_the_whole_image(
    stride: int, size: tuple[int, int], teacher_of: Callable[..., Teacher]
) -> None:
    model = Strided(stride)
    whole = teacher_of(model, TeacherConfig()).predict(noise(*size))
    windows = teacher_of(model, TeacherConfig(window=96, overlap=64)).predict(noise(*size))
    assert windows.whole == whole.whole == whole.values.shape[1:]
    assert windows.start == (0, 0)
    # A convolution of another size may sum in another order.
    torch.testing.assert_close(windows.logits().softmax(0), whole.logits().softmax(0), rtol=0, atol=2e-3)
    assert float((windows.labels() != whole.labels()).float().mean()) < 1e-3


def test_windows_of_a_resized_input(teacher_of: Callable[..., Teacher]) -> None:
    model = Strided(2, classes=2)
    whole = teacher_of(model, TeacherConfig(ratio=0.5), 2).predict(noise(300, 270))
    windows = teacher_of(model, TeacherConfig(ratio=0.5, window=96, overlap=64), 2).predict(noise(300, 270))
    assert windows.whole == whole.whole == (75, 68)
    torch.testing.assert_close(windows.logits().softmax(0), whole.logits().softmax(0), rtol=0, atol=2e-3)


def test_windows_without_overlap_differ_at_their_borders_only(teacher_of: Callable[..., Teacher]) -> None:
    model = Strided(1)
    whole = teacher_of(model, TeacherConfig()).predict(noise(96, 192)).logits()
    windows = teacher_of(model, TeacherConfig(window=96, overlap=0)).predict(noise(96, 192)).logits()
    wrong = ((windows.softmax(0) - whole.softmax(0)).abs() > 2e-3).any(0).any(0).nonzero().flatten()
    assert wrong.tolist() == [95, 96]


@pytest.mark.parametrize("length", [1, 95, 96, 97, 128, 160, 191, 192, 193, 1000])
@pytest.mark.parametrize("overlap", [0, 64])
def test_each_pixel_counts_in_one_window(length: int, overlap: int) -> None:
    windows = module._windows(length, 96, overlap)
    pixels = [pixel for _, kept in windows for pixel in range(*kept)]
    assert pixels == list(range(length))
    for (first, end), (kept, kept_end) in windows:
        assert first % 32 == 0
        assert end - first < 96 + 32
        assert kept == 0 or kept - first >= overlap // 2
        assert kept_end == length or end - kept_end >= overlap // 2


def test_an_output_that_no_window_fits_is_refused(teacher_of: Callable[..., Teacher]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(20))
    teacher = teacher_of(model, TeacherConfig(window=96, overlap=64))
    with pytest.raises(ValueError, match=r"a window of 96 pixels became 20 cells, expected one for each 1, 2, 4, 8"):
        teacher.predict(noise(160, 96))


# ---- memory


class Full(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory"),
    ],
)
@pytest.mark.parametrize(("window", "cure"), [(0, "teacher.window 1024"), (96, "teacher.window less than 96")])
def test_no_memory_names_windows_as_the_cure(
    error: Exception, window: int, cure: str, teacher_of: Callable[..., Teacher]
) -> None:
    teacher = teacher_of(Full(error), TeacherConfig(window=window, overlap=64))
    with pytest.raises(MemoryError, match=rf"an input of 100 x 120 pixels does not fit into memory; .*{cure}"):
        teacher.predict(noise(100, 120))


def test_other_errors_are_their_own(teacher_of: Callable[..., Teacher]) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        teacher_of(Full(RuntimeError("something else")), TeacherConfig()).predict(noise(10, 12))


# ---- labels


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("size", [(9, 11), (36, 44), (20, 31)])
def test_labels_of_the_teacher_are_those_of_its_logits(k: int, size: tuple[int, int]) -> None:
    soft = SoftLabels.of(torch.randn(k, 9, 11, generator=torch.Generator().manual_seed(k)), "logits")
    engine = get_engine("torch")
    expected = engine.uncertainty(Coarse(soft.logits()[None], size))[0][0]
    assert torch.equal(teacher_labels(soft, size, engine), expected)


# ---- the forecast


def test_the_forecast_is_told_after_the_first_image(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    forecast = Forecast("predictions", 40, tmp_path)
    forecast.after(2_000_000, 3.0)
    forecast.after(1, 1.0)
    assert capsys.readouterr().err == f"predictions, 40 images: 80.00 MB in {tmp_path}, about 2.0 minutes\n"
    Forecast("predictions", 1000).after(10**12, 0.0)
    assert "1000000.00 GB in memory, about 0.0 minutes; WARNING: only " in capsys.readouterr().err
