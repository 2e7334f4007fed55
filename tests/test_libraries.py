"""Loaders for torchvision, timm and segmentation_models.pytorch, tested with small stand-ins for these packages."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families import libraries
from sparserefine.bases.loaded import LoadedModel
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from support import assert_close

K = 4
FULL = BaseConfig(ratio=1.0)
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "segmentation_models_pytorch": "segmentation-models-pytorch"}
OPEN: dict[str, Callable[[], LoadedModel]] = {
    "torchvision": lambda: libraries.torchvision("fcn", "weights.pth", K),
    "timm": lambda: libraries.timm("segmenter", "weights.pth", K),
    "segmentation_models_pytorch": lambda: libraries.smp("folder"),
}


def pixels(*size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, *(size or (6, 8))), dtype=torch.uint8)


def normalised(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """The definition, in float32."""
    return (image.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def stored(state: Mapping[str, Tensor], path: Path) -> Path:
    """Writes a state dict, in the format that its suffix says."""
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save(dict(state), path)
    return path


# ---- stand-ins


class Segmenter(nn.Module):
    """Half-size logits of a convolution and a classifier, brought to the input's size, in a mapping."""

    def __init__(self, classes: int, aux: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 5, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(5)
        self.classifier = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU(), nn.Conv2d(5, classes, 1))
        if aux:
            self.aux_classifier = nn.Sequential(nn.Conv2d(5, classes, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.classifier(self.norm(self.backbone(x)))
        return {"out": F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)}


class TwoHeads(Segmenter):
    """Two layers, not one, have as many rows as there are classes."""

    def __init__(self, classes: int, aux: bool = False) -> None:
        super().__init__(classes)
        self.low_classifier = nn.Conv2d(3, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)["out"] + self.low_classifier(x)}


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class OneSize(Segmenter):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert x.shape[-2:] == (10, 12), f"input {tuple(x.shape[-2:])} does not match model (10, 12)"
        return super().forward(x)


@pytest.fixture
def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for torchvision; returns the list of the calls of ``get_model``."""
    calls: list[dict[str, Any]] = []
    builders = {"fcn_small": Segmenter, "fcn_large": Segmenter, "lraspp": TwoHeads}

    def get_model(name: str, **config: Any) -> nn.Module:
        calls.append({"name": name, **config})
        return builders[name](config["num_classes"] or 21, bool(config.get("aux_loss")))

    def list_models(module: Any = None) -> list[str]:
        return [*builders] if module is segmentation else [*builders, "resnet"]

    segmentation = ModuleType("torchvision.models.segmentation")
    models = SimpleNamespace(segmentation=segmentation, get_model=get_model, list_models=list_models)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    return calls


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for timm; returns the list of the calls of ``create_model``."""
    calls: list[dict[str, Any]] = []
    builders = {"segmenter": Segmenter, "classifier": Classifier, "one_size": OneSize, "sized": OneSize}

    def create_model(model_name: str, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
        calls.append({"name": model_name, "pretrained": pretrained, "num_classes": num_classes})
        model = builders[model_name](num_classes or 1000)
        if model_name in ("classifier", "sized"):
            model.pretrained_cfg = {"input_size": (3, 10, 12), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        return model

    package = SimpleNamespace(
        create_model=create_model, is_model=lambda name: name in builders, list_models=lambda: [*builders]
    )
    monkeypatch.setitem(sys.modules, "timm", package)
    return calls


class Smp(nn.Module):
    """What the tests need of a model of smp: one convolution, a stride, an activation, and a head for pictures."""

    def __init__(
        self,
        encoder_name: str = "resnet",
        encoder_weights: str | None = None,
        in_channels: int = 3,
        classes: int = 1,
        activation: str | None = None,
        aux_params: dict[str, Any] | None = None,
        encoder_stride: int = 32,
        decoder_divisible: bool = True,
        decoder_shrink: int = 1,
        img_size: int | None = None,
    ) -> None:
        super().__init__()
        assert encoder_weights is None, "would be downloaded"
        self.encoder = nn.Module()
        self.encoder.output_stride = encoder_stride
        self.conv = nn.Conv2d(in_channels, classes, 3, padding=1)
        self.dropout = nn.Dropout()
        self.requires_divisible_input_shape = decoder_divisible
        self.activation, self.labels, self.shrink = activation, aux_params is not None, decoder_shrink

    def forward(self, x: Tensor) -> Any:
        h, w = x.shape[-2:]
        if self.requires_divisible_input_shape and (h % self.encoder.output_stride or w % self.encoder.output_stride):
            raise RuntimeError(f"Wrong input shape height={h}, width={w}.")
        y = F.avg_pool2d(self.dropout(self.conv(x)), self.shrink)
        y = {
            "sigmoid": torch.sigmoid,
            "softmax2d": lambda v: v.softmax(1),
            "logsoftmax": lambda v: v.log_softmax(1),
        }.get(self.activation or "", lambda v: v)(y)
        return (y, y.mean((2, 3))) if self.labels else y


class Dpt(Smp):
    """As smp's DPT, it says that it takes multiples of the encoder's stride, and takes multiples of twice that only."""

    def forward(self, x: Tensor) -> Any:
        assert x.shape[-2] % (2 * self.encoder.output_stride) == 0
        return super().forward(x)


@pytest.fixture
def fake_smp(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for smp; returns the list of what is asked of ``get_preprocessing_params``."""
    asked: list[Any] = []

    def from_pretrained(name: str, *args: Any, strict: bool = True, **kwargs: Any) -> nn.Module:
        config = json.loads((Path(name) / "config.json").read_text())
        model = {"Smp": Smp, "DPT": Dpt}[config.pop("_model_class")](**{**config, **kwargs}).train()
        print("Loading weights")
        model.load_state_dict(load_file(Path(name) / "model.safetensors"), strict=strict)
        return model

    def get_preprocessing_params(encoder_name: str, pretrained: str = "imagenet") -> dict[str, Any]:
        asked.append((encoder_name, pretrained))
        if encoder_name == "offline":
            raise OSError("cannot reach the hub\nTraceback")
        bgr = {"input_space": "BGR"} if "bgr" in encoder_name else {}
        whole = {"input_range": [0, 255], "mean": [100, 110, 120], "std": [50, 51, 52]} if "255" in encoder_name else {}
        return {
            "input_space": "RGB",
            "input_range": [0, 1],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            **bgr,
            **whole,
        }

    package = ModuleType("segmentation_models_pytorch")
    package.from_pretrained = from_pretrained
    package.encoders = SimpleNamespace(get_preprocessing_params=get_preprocessing_params)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", package)
    return asked


def saved_smp(folder: Path, **config: Any) -> Smp:
    """Writes what ``save_pretrained`` would."""
    model = Smp(**{k: v for k, v in config.items() if k != "encoder_weights"}).eval()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_model_class": "Smp", **config}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


# ---- packages


class Forbidding:
    """A finder of modules for which an import of these packages fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in PACKAGES:
            raise self.error


def forbid(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    for package in PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Forbidding(error), *sys.meta_path])


def test_importing_the_loaders_imports_none_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, RuntimeError("imported"))
    monkeypatch.delitem(sys.modules, "sparserefine.bases.families.libraries")
    assert "torchvision" in runpy.run_module("sparserefine.bases.families.libraries")


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    pip = PACKAGES[package]
    start, end = f"{pip} is not installed; `pip install {pip}`", f"in the version that fits torch {torch.__version__}"
    with pytest.raises(ImportError, match=f"^{re.escape(start)}.*{re.escape(end)}$"):
        OPEN[package]()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nTraceback"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
        ModuleNotFoundError("No module named 'PIL'", name="PIL"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("package", PACKAGES)
def test_broken_package(package: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, error)
    with pytest.raises(ImportError) as caught:
        OPEN[package]()
    message = str(caught.value)
    first_line = str(error).splitlines()[0]
    assert message.startswith(
        f"{PACKAGES[package]} does not work here ({first_line}); `pip install {PACKAGES[package]}"
    )
    assert "torchvision" in message.partition("pip install")[2]
    assert "\n" not in message


# ---- torchvision


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("asked", [None, K, K + 3])
@pytest.mark.parametrize("name", ["fcn_small", "lraspp"])
def test_torchvision_model(
    name: str, asked: int | None, suffix: str, fake_torchvision: list[dict[str, Any]], tmp_path: Path
) -> None:
    """It is the model of the file, of as many classes as that has, whatever the data has."""
    model = {"fcn_small": Segmenter, "lraspp": TwoHeads}[name](K).eval()
    model.norm.running_mean += 1
    loaded = libraries.torchvision(name, stored(model.state_dict(), tmp_path / f"w{suffix}"), asked)
    assert (loaded.num_classes, loaded.mean, loaded.std) == (K, IMAGENET_MEAN, IMAGENET_STD)
    assert loaded.outputs == "logits"
    assert not any(module.training for module in loaded.model.modules())
    image = pixels()
    with torch.no_grad():
        expected = model(normalised(image))["out"]
    assert_close(FrozenBase(loaded, config=FULL)(image), expected)
    for call in fake_torchvision:
        number = call.pop("num_classes")
        assert number in (asked, K)
        assert call == {"name": name, "weights": None, "weights_backbone": None, "aux_loss": False}


def test_torchvision_auxiliary_head_is_left_out(fake_torchvision: list[Any], tmp_path: Path) -> None:
    model = Segmenter(K, aux=True)
    loaded = libraries.torchvision("fcn_small", stored(model.state_dict(), tmp_path / "w.pth"), K)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("aux")}
    assert kept.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(v, kept[k]) for k, v in loaded.model.state_dict().items())


def test_torchvision_model_of_other_classes_than_the_data(fake_torchvision: list[Any], tmp_path: Path) -> None:
    weights = stored(Segmenter(K).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"4 classes.* 3\b"):
        FrozenBase(libraries.torchvision("fcn_small", weights, 3), 3, FULL)


@pytest.mark.parametrize("count", [K, K + 1])
@pytest.mark.parametrize("loader", [libraries.torchvision, libraries.timm], ids=["torchvision", "timm"])
def test_class_names_of_the_file(
    loader: Any, count: int, fake_torchvision: list[Any], fake_timm: list[Any], tmp_path: Path
) -> None:
    """Names that do not fit the model are ignored, with a warning."""
    meta = {"classes": [f"name {k}" for k in range(count)]}
    torch.save({"state_dict": Segmenter(K).state_dict(), "meta": meta}, tmp_path / "w.pth")
    name = "fcn_small" if loader is libraries.torchvision else "segmenter"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = loader(name, tmp_path / "w.pth", K)
    if count == K:
        assert loaded.classes.names == ("name 0", "name 1", "name 2", "name 3")
        assert not told
    else:
        assert loaded.classes is None
        assert [str(w.message) for w in told] == [
            f"{tmp_path / 'w.pth'}: has 5 class names for a model of 4; they are ignored"
        ]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("backbone.bias"), r"backbone\.bias"),
        (lambda s: s.update({"neck.weight": torch.zeros(2)}), r"neck\.weight"),
        (lambda s: s.update({"backbone.weight": torch.zeros(5, 3, 5, 5)}), r"backbone\.weight"),
        (lambda s: s.update({"backbone.weight": torch.zeros(6, 3, 3, 3), "norm.bias": torch.zeros(7)}), r"norm\.bias"),
        (lambda s: s.update({"aux_head.weight": torch.zeros(2)}), r"aux_head\.weight"),
    ],
    ids=["missing", "extra", "other shape", "other widths", "like an auxiliary head"],
)
@pytest.mark.parametrize("loader", [libraries.torchvision, libraries.timm], ids=["torchvision", "timm"])
def test_weights_of_another_model(
    loader: Any, spoil: Any, words: str, fake_torchvision: list[Any], fake_timm: list[Any], tmp_path: Path
) -> None:
    state = Segmenter(K).state_dict()
    spoil(state)
    name = "fcn_small" if loader is libraries.torchvision else "segmenter"
    with pytest.raises(ValueError, match=words):
        loader(name, stored(state, tmp_path / "w.pth"), K)


@pytest.mark.parametrize("loader", [libraries.torchvision, libraries.timm], ids=["torchvision", "timm"])
def test_no_weights(loader: Any, fake_torchvision: list[Any], fake_timm: list[Any], tmp_path: Path) -> None:
    name = "fcn_small" if loader is libraries.torchvision else "segmenter"
    with pytest.raises(FileNotFoundError, match=r"w\.pth"):
        loader(name, tmp_path / "w.pth", K)


@pytest.mark.parametrize("name", ["fcn_smal", "resnet", "nothing like it"])
def test_unknown_torchvision_model(name: str, fake_torchvision: list[Any]) -> None:
    """Classifiers that torchvision has are unknown too."""
    with pytest.raises(ValueError, match=f"torchvision:{name}: not a segmentation model.* its 3 names are .*fcn_small"):
        libraries.torchvision(name, "w.pth", K)


# ---- timm


@pytest.mark.parametrize("asked", [None, K, K + 3])
def test_timm_model(asked: int | None, fake_timm: list[dict[str, Any]], tmp_path: Path) -> None:
    model = Segmenter(K).eval()
    loaded = libraries.timm("segmenter", stored(model.state_dict(), tmp_path / "w.pth"), asked)
    image = pixels()
    with torch.no_grad():
        expected = model(normalised(image))["out"]
    assert_close(FrozenBase(loaded, config=FULL)(image), expected)
    assert loaded.num_classes == K
    assert {(call["name"], call["pretrained"]) for call in fake_timm} == {("segmenter", False)}


def test_timm_normalisation_and_size_are_of_the_model(fake_timm: list[Any], tmp_path: Path) -> None:
    model = OneSize(K).eval()
    loaded = libraries.timm("sized", stored(model.state_dict(), tmp_path / "w.pth"), None)
    assert (loaded.num_classes, loaded.mean, loaded.std) == (K, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    image = pixels(10, 12)
    with torch.no_grad():
        expected = model(normalised(image, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))["out"]
    assert_close(FrozenBase(loaded, config=FULL)(image), expected)


def test_timm_model_that_does_not_tell_its_size(fake_timm: list[Any], tmp_path: Path) -> None:
    """It cannot be tried, so its class count is that of the data; used at another size, its own error shows."""
    loaded = libraries.timm("one_size", stored(OneSize(K).state_dict(), tmp_path / "w.pth"), K)
    assert loaded.num_classes is None
    base = FrozenBase(loaded, K, FULL)
    assert base(pixels(10, 12)).shape == (2, K, 10, 12)
    with pytest.raises(AssertionError, match="does not match model"):
        base(pixels(6, 8))


def test_timm_classifier_is_refused(fake_timm: list[Any], tmp_path: Path) -> None:
    weights = stored(Classifier(K).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"timm:classifier: its output is \(1, 4\), expected \[1, K, h, w\].*smp.*tu-"):
        libraries.timm("classifier", weights, K)


def test_unknown_timm_model(fake_timm: list[Any]) -> None:
    with pytest.raises(
        ValueError, match="timm:segmentor: timm has no such model; the closest of its 4 names are segmenter"
    ):
        libraries.timm("segmentor", "w.pth", K)


# ---- one output channel


@pytest.mark.parametrize("asked", [None, 1, 2])
@pytest.mark.parametrize("loader", [libraries.torchvision, libraries.timm], ids=["torchvision", "timm"])
def test_one_channel_becomes_two_classes(
    loader: Any, asked: int | None, fake_torchvision: list[Any], fake_timm: list[Any], tmp_path: Path
) -> None:
    model = Segmenter(1).eval()
    name = "fcn_small" if loader is libraries.torchvision else "segmenter"
    base = FrozenBase(loader(name, stored(model.state_dict(), tmp_path / "w.pth"), asked), config=FULL)
    image = pixels()
    with torch.no_grad():
        z = model(normalised(image))["out"]
    assert base.num_classes == 2
    assert base.classes is not None
    assert base.classes.names == ("background", "foreground")
    assert_close(base(image).softmax(1)[:, 1:], z.sigmoid())


# ---- smp


@pytest.mark.parametrize("size", [(32, 64), (33, 40), (1, 1), (31, 96)], ids=str)
@pytest.mark.parametrize("stride", [32, 8])
def test_smp_model_at_any_size(stride: int, size: tuple[int, int], fake_smp: list[Any], tmp_path: Path) -> None:
    """Its output is that for the image with zeros added right and bottom after normalisation, at the image's pixels."""
    model = saved_smp(tmp_path / "m", classes=K, encoder_stride=stride)
    loaded = libraries.smp(tmp_path / "m")
    assert (loaded.num_classes, loaded.outputs, loaded.mean) == (K, "logits", IMAGENET_MEAN)
    assert not any(module.training for module in loaded.model.modules())
    image = pixels(*size)
    padded = torch.zeros(2, 3, 96, 96)
    padded[..., : size[0], : size[1]] = normalised(image)
    with torch.no_grad():
        expected = model(padded)[..., : size[0], : size[1]]
    output = FrozenBase(loaded, config=FULL)(image)
    assert_close(output, expected)
    assert output.is_contiguous()


def test_smp_model_that_takes_any_size_is_not_padded(fake_smp: list[Any], tmp_path: Path) -> None:
    model = saved_smp(tmp_path / "m", classes=K, decoder_divisible=False, decoder_shrink=2)
    image = pixels(10, 6)
    with torch.no_grad():
        expected = model(normalised(image))
    output = FrozenBase(libraries.smp(tmp_path / "m"), config=FULL)(image)
    assert output.shape == (2, K, 5, 3)
    assert_close(output, expected)


def test_smp_output_smaller_than_the_input_stays_in_place(fake_smp: list[Any], tmp_path: Path) -> None:
    """Quarter-size output of a padded image: what it says of a pixel is found at that pixel."""
    model = saved_smp(tmp_path / "m", classes=K, decoder_shrink=4)
    image = pixels(30, 50)
    padded = F.pad(normalised(image), (0, 14, 0, 2))
    with torch.no_grad():
        small = model(padded)
    expected = F.interpolate(small.double(), (32, 64), mode="bilinear", align_corners=False)[..., :30, :50]
    assert_close(FrozenBase(libraries.smp(tmp_path / "m"), config=FULL)(image), expected, torch.float32)
    divisible = pixels(32, 64)
    assert FrozenBase(libraries.smp(tmp_path / "m"), config=FULL)(divisible).shape == (2, K, 8, 16)


@pytest.mark.parametrize("activation", [None, "identity", "logsoftmax", "softmax2d", "sigmoid"])
def test_smp_activation(activation: str | None, fake_smp: list[Any], tmp_path: Path) -> None:
    model = saved_smp(tmp_path / "m", classes=K, activation=activation)
    loaded = libraries.smp(tmp_path / "m")
    assert loaded.outputs == ("scores" if activation in ("softmax2d", "sigmoid") else "logits")
    image = pixels(32, 32)
    with torch.no_grad():
        expected = model(normalised(image))
    assert_close(FrozenBase(loaded, config=FULL)(image), expected)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_smp_binary_model(activation: str | None, fake_smp: list[Any], tmp_path: Path) -> None:
    model = saved_smp(tmp_path / "m", classes=1, activation=activation)
    loaded = libraries.smp(tmp_path / "m")
    assert (loaded.num_classes, loaded.classes) == (2, libraries.FOREGROUND)
    image = pixels(20, 32)
    with torch.no_grad():
        z = model(F.pad(normalised(image), (0, 0, 0, 12)))[..., :20, :]
    p = z if activation else z.sigmoid()
    output = FrozenBase(loaded, config=FULL)(image)
    assert_close(output if loaded.outputs == "scores" else output.softmax(1), torch.cat([1 - p, p], 1))
    assert loaded.outputs == ("scores" if activation else "logits")


def test_smp_dpt(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K, encoder_stride=16)
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"Smp"', '"DPT"'))
    assert FrozenBase(libraries.smp(tmp_path / "m"), config=FULL)(pixels(40, 20)).shape == (2, K, 40, 20)


def test_nothing_is_printed(fake_smp: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is for results."""
    saved_smp(tmp_path / "m", classes=K)
    libraries.smp(tmp_path / "m")
    assert capsys.readouterr().out == ""


def test_smp_classification_head_is_ignored(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K, aux_params={"classes": 2})
    assert FrozenBase(libraries.smp(tmp_path / "m"), config=FULL)(pixels(20, 20)).shape == (2, K, 20, 20)


@pytest.mark.parametrize(
    ("encoder", "mean", "std"),
    [
        ("resnet", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ("resnet-255", (100 / 255, 110 / 255, 120 / 255), (50 / 255, 51 / 255, 52 / 255)),
        ("bgr", (0.3, 0.4, 0.5), (0.4, 0.3, 0.2)),
        ("bgr-255", (120 / 255, 110 / 255, 100 / 255), (52 / 255, 51 / 255, 50 / 255)),
    ],
)
def test_smp_normalisation_is_of_the_encoder(
    encoder: str, mean: tuple[float, ...], std: tuple[float, ...], fake_smp: list[Any], tmp_path: Path
) -> None:
    """The model sees what smp's own preprocessing makes: channels swapped first, then scaled, then normalised."""
    model = saved_smp(tmp_path / "m", classes=K, encoder_name=encoder, encoder_weights="imagenet")
    loaded = libraries.smp(tmp_path / "m")
    assert fake_smp == [(encoder, "imagenet")]
    assert loaded.mean == pytest.approx(mean)
    assert loaded.std == pytest.approx(std)
    image = pixels(32, 32)
    seen = normalised(image, mean, std)
    with torch.no_grad():
        expected = model(seen.flip(1) if "bgr" in encoder else seen)
    assert_close(FrozenBase(loaded, config=FULL)(image), expected)


def test_smp_encoder_without_pretrained_weights_has_no_normalisation(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K, encoder_name="resnet", encoder_weights=None)
    assert libraries.smp(tmp_path / "m").mean == IMAGENET_MEAN
    assert fake_smp == []


def test_smp_model_of_other_channels(fake_smp: list[Any], tmp_path: Path) -> None:
    """Its encoder was trained on RGB, and has no normalisation for them."""
    saved_smp(tmp_path / "m", classes=K, in_channels=4, encoder_name="resnet", encoder_weights="imagenet")
    loaded = libraries.smp(tmp_path / "m")
    assert (loaded.channels, loaded.mean, loaded.std) == (4, (0.5,) * 4, (0.25,) * 4)
    assert FrozenBase(loaded, config=FULL)(torch.zeros(1, 4, 32, 32)).shape == (1, K, 32, 32)


def test_smp_normalisation_that_cannot_be_had_is_told(
    fake_smp: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_smp(tmp_path / "m", classes=K, encoder_name="offline", encoder_weights="imagenet")
    loaded = libraries.smp(tmp_path / "m")
    assert (loaded.mean, loaded.std) == (IMAGENET_MEAN, IMAGENET_STD)
    (message,) = caplog.messages
    assert "offline (imagenet)" in message
    assert "(cannot reach the hub)" in message
    assert "base.mean and base.std" in message
    assert "HF_HUB_OFFLINE=1" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"activation": "argmax2d"}, "activation = 'argmax2d' gives no class scores.*remove it"),
        ({"activation": "tanh"}, "activation = 'tanh' gives no class scores"),
        (
            {"activation": "softmax2d", "classes": 1},
            "activation = 'softmax2d' is constant for one class.*use 'sigmoid'",
        ),
        ({"in_channels": 17}, "takes 17 channels, expected 1 to 16"),
        ({"decoder_width": 7}, r"cannot be loaded \(TypeError: .*width"),
    ],
    ids=str,
)
def test_smp_model_that_cannot_be_a_base(
    config: dict[str, Any], words: str, fake_smp: list[Any], tmp_path: Path
) -> None:
    saved_smp(tmp_path / "m", classes=K)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"_model_class": "Smp", "classes": K, **config}))
    with pytest.raises(ValueError, match=words):
        libraries.smp(tmp_path / "m")


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_path": "own.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "own.pth"}},
        {"pretrained_cfg_overlay": {"url": "http://own"}},
        {"cache_dir": "."},
        {"state_dict": {}},
        {"config": {"checkpoint_path": "own.pth"}},
        {"kwargs": {"checkpoint_path": "own.pth"}},
        {"encoder_name": "tu-hf-hub:someone/net"},
        {"encoder_name": "tu-hf_hub:someone/net"},
        {"encoder_name": "tu-local-dir:/somewhere"},
        {"encoder_name": "tu-resnet18\n"},
    ],
    ids=str,
)
def test_smp_model_from_elsewhere_is_refused(
    config: dict[str, Any], fake_smp: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before smp comes to see it."""
    monkeypatch.delattr(sys.modules["segmentation_models_pytorch"], "from_pretrained")
    ((key, value),) = config.items()
    (tmp_path / "config.json").write_text(json.dumps({"_model_class": "Smp", "classes": K, **config}))
    with pytest.raises(ValueError, match=rf"config\.json: {key} = {re.escape(repr(value))} is refused"):
        libraries.smp(tmp_path)


def test_smp_settings_of_timm_that_are_harmless(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K, encoder_name="tu-vit_small_patch16_224.augreg_in21k", img_size=64)
    assert libraries.smp(tmp_path / "m").num_classes == K


def test_identity_is_of_the_settings_too() -> None:
    """What the wrapper does to input and output is no weight."""
    model = nn.Conv2d(3, 1, 1)
    ways: list[dict[str, Any]] = [
        {},
        {"multiple": 32},
        {"bgr": True},
        {"foreground": "logits"},
        {"foreground": "scores"},
    ]
    found = [FrozenBase(libraries.Adapted(model, "m", **way), 2, FULL).identity for way in (*ways, {})]
    assert len(set(found)) == len(ways)
    assert found[0] == found[-1]


def test_smp_weights_of_another_model(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K)
    save_file(Smp(classes=K + 1).state_dict(), tmp_path / "m" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"smp:.*cannot be loaded \(RuntimeError: .*: size mismatch for conv.*save_pretrained"
    ):
        libraries.smp(tmp_path / "m")


def test_smp_weights_that_are_not_finite(fake_smp: list[Any], tmp_path: Path) -> None:
    state = saved_smp(tmp_path / "m", classes=K).state_dict()
    name = next(iter(state))
    state[name] = torch.full_like(state[name], torch.inf)
    save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"base smp:.* values of {re.escape(name)} are NaN or infinite"):
        libraries.smp(tmp_path / "m")


def test_smp_folder_with_what_is_no_file(fake_smp: list[Any], tmp_path: Path) -> None:
    saved_smp(tmp_path / "m", classes=K)
    (tmp_path / "m" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: is a FIFO"):
        libraries.smp(tmp_path / "m")


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": 3}'])
def test_smp_configuration_of_another_library(text: str, fake_smp: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json(: not readable as JSON|: holds list| has no _model_class)"):
        libraries.smp(tmp_path)


def test_smp_folder_that_is_none(fake_smp: list[Any], tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "nowhere", "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no .*config\.json; expected a folder"):
            libraries.smp(name)


def test_smp_hub_id(fake_smp: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration is asked of the hub; what goes wrong there is told in one line."""
    monkeypatch.chdir(tmp_path)

    def hf_hub_download(repo_id: str, filename: str) -> str:
        raise OSError(f"{repo_id}/{filename}: no network\nTraceback")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download))
    with pytest.raises(FileNotFoundError, match=r"hub \(owner/model/config.json: no network\)$"):
        libraries.smp("owner/model")
