"""The frozen base: what goes in, what comes out, what is refused; the built-in U-Net and bases by name."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, load_unet, save_unet
from sparserefine.bases.load import load_base
from sparserefine.images.coarse import LARGEST_LOGIT
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from sparserefine.images.resize import resize
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.selector import Selector
from support import assert_close

K = 3
PLAIN = BaseConfig(ratio=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
Output = namedtuple("Output", ["loss", "logits"])


def identity(x: Tensor) -> Tensor:
    return x


def seen_by(config: BaseConfig, image: Tensor) -> Tensor:
    """The model's input."""
    return FrozenBase(identity, K, config)(image)


def unet(**arguments: Any) -> UNet:
    return UNet(K, (4, 8), **arguments).eval()


def pixels(batch: int = 2, size: tuple[int, int] = (6, 8)) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


# ---- what the model sees


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        (0.5, (6, 8), (3, 4)),
        (0.5, (7, 9), (4, 4)),  # 3.5 and 4.5 round to the even neighbour
        (1.0, (7, 9), (7, 9)),
        (0.25, (1, 1), (1, 1)),
        (0.01, (10, 300), (1, 3)),
    ],
)
def test_ratio_sets_the_input_size(ratio: float, size: tuple[int, int], expected: tuple[int, int]) -> None:
    config = BaseConfig(ratio=ratio)
    assert seen_by(config, pixels(size=size)).shape == (2, 3, *expected)
    assert FrozenBase(identity, K, config).input_size(*size) == expected


@pytest.mark.parametrize("size", [(1, 1), (6, 8), (301, 7)])
def test_fixed_input_size(size: tuple[int, int]) -> None:
    assert seen_by(BaseConfig(size=(5, 9)), pixels(size=size)).shape == (2, 3, 5, 9)


def test_pixels_are_normalised() -> None:
    image = pixels()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert_close(seen_by(BaseConfig(ratio=1.0), image), (image.double() / 255 - mean) / std, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [BaseConfig(ratio=1.0), BaseConfig(ratio=0.5), BaseConfig(size=(4, 9))], ids=str)
def test_bytes_and_fractions_are_the_same_image(config: BaseConfig, dtype: torch.dtype) -> None:
    image = pixels()
    assert_close(seen_by(config, image), seen_by(config, image.to(dtype) / 255))


@pytest.mark.parametrize(("length", "out"), [(12, 6), (12, 4), (13, 5), (5, 5), (1, 1)])
def test_downsizing_is_an_antialiased_bilinear_resize(length: int, out: int) -> None:
    """y[i] = sum_j a[i, j] x[j] / sum_j a[i, j] with a = max(0, 1 - |j + 1/2 - (i + 1/2) s| / s), s = length / out."""
    s = length / out
    i, j = torch.arange(out, dtype=torch.float64)[:, None], torch.arange(length, dtype=torch.float64)
    a = (1 - (j + 0.5 - (i + 0.5) * s).abs() / s).clamp_min(0)
    a /= a.sum(1, keepdim=True)
    image = torch.rand(2, 3, length, length)
    assert_close(resize(image, (out, out)), a @ image.double() @ a.T, torch.float32)


@pytest.mark.parametrize("config", [BaseConfig(ratio=1.0), BaseConfig(ratio=0.5)], ids=str)
def test_the_model_sees_a_contiguous_float32_tensor(config: BaseConfig) -> None:
    channels_last = torch.rand(2, 6, 8, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    seen = seen_by(config, channels_last)
    assert seen.is_contiguous()
    assert seen.dtype == torch.float32


def test_image_is_left_alone() -> None:
    for image in (pixels(), pixels().float() / 255):
        before = image.clone()
        FrozenBase(lambda x: x.mul_(2), K, PLAIN)(image)
        assert torch.equal(image, before)


# ---- what the model returns


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: x, id="tensor"),
        pytest.param(lambda x: (x, "auxiliary"), id="tuple"),
        pytest.param(lambda x: [x], id="list"),
        pytest.param(lambda x: {"logits": x, "loss": None}, id="logits in a mapping"),
        pytest.param(lambda x: {"aux": x + 1, "out": x}, id="out in a mapping"),
        pytest.param(lambda x: SimpleNamespace(logits=x), id="object"),
        pytest.param(lambda x: Output(None, x), id="named tuple"),
    ],
)
@pytest.mark.parametrize("kind", ["module", "callable"])
def test_output_forms(kind: str, wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(x)

    image = pixels()
    base = FrozenBase(Wrapped() if kind == "module" else wrap, K, PLAIN)
    assert_close(base(image), image.float() / 255)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "returned NoneType"),
        ({"masks": 1, "boxes": 2}, r"returned dict with keys \['boxes', 'masks'\]"),
        ((), "returned tuple"),
        ("text", "returned str"),
        (SimpleNamespace(logits=7), "returned SimpleNamespace"),
    ],
    ids=str,
)
def test_unknown_output_is_refused(output: Any, words: str) -> None:
    base = FrozenBase(lambda x: output, K, BaseConfig("my model", ratio=1.0))
    with pytest.raises(TypeError, match=f"base my model: {words}, expected a tensor"):
        base(pixels())


def with_bad_values(shape: tuple[int, ...], *bad: float) -> Tensor:
    values = torch.zeros(shape)
    values.view(-1)[: len(bad)] = torch.tensor(bad)
    return values


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, K + 1, 3, 4), "4 classes, expected 3"),
        (torch.zeros(2, 1, 3, 4), "1 classes, expected 3"),
        (torch.zeros(1, K, 3, 4), r"output is \(1, 3, 3, 4\), expected \[2, K, h, w\]"),
        (torch.zeros(2, K, 12), r"output is \(2, 3, 12\), expected \[2, K, h, w\]"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"output is \(2, 3, 4\), expected \[2, K, h, w\]"),
        (with_bad_values((2, K, 3, 4), float("nan")), "1 of 72 coarse logits are NaN or infinite"),
        (with_bad_values((2, K, 3, 4), float("inf"), -float("inf")), "2 of 72 coarse logits are NaN or infinite"),
    ],
    ids=["more classes", "one class", "batch", "flat", "labels", "NaN", "infinite"],
)
def test_bad_output_is_refused(output: Tensor, words: str) -> None:
    base = FrozenBase(lambda x: output, K, BaseConfig("my model", ratio=1.0))
    with pytest.raises(ValueError, match=f"base my model: {words}"):
        base(pixels())


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e300, torch.float64, "2 of 72 coarse logits are NaN or infinite in float32"),
        (float("nan"), torch.float64, "2 of 72 coarse logits are NaN or infinite;"),
        (3.4e38, torch.float32, r"coarse logits reach 3\.4e\+38, expected at most 1e\+30"),
        (-3.4e38, torch.float32, r"coarse logits reach 3\.4e\+38, expected at most 1e\+30"),
        (1e31, torch.bfloat16, r"coarse logits reach 9\.983e\+30, expected at most 1e\+30"),
    ],
)
@pytest.mark.parametrize("outputs", ["logits", "scores"])
def test_logits_are_judged_as_they_are_used(value: float, dtype: torch.dtype, words: str, outputs: str) -> None:
    """In float32, and by what upsampling and softmax survive."""
    output = with_bad_values((2, K, 3, 4), 0, 0).to(dtype)
    output[1, 0, :1, :2] = value
    config = BaseConfig("my model", ratio=1.0, outputs=outputs)
    base = FrozenBase(lambda x: output, K, config)
    with pytest.raises(ValueError, match=f"base my model: {words}"):
        base(pixels())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_logits_are_fine(dtype: torch.dtype) -> None:
    output = with_bad_values((2, K, 3, 4), 6e4, -6e4).to(dtype)
    assert FrozenBase(lambda x: output, K, BaseConfig(ratio=1.0))(pixels()) is output


def test_the_largest_logits_survive_what_is_done_with_them() -> None:
    """Two neighbours of opposite sign, upsampled, their entropy taken, and blended by large weights."""
    corner = LARGEST_LOGIT * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    refiner = SparseRefiner(FrozenBase(identity, K, PLAIN), RefinerConfig(selector=Selector(budget=99)))
    with torch.no_grad():
        for parameter in refiner.ensembler.parameters():
            parameter.fill_(10.0)
        result = refiner.eval().refine(pixels(1), torch.stack([corner, -corner, 0 * corner])[None])
    for values in (result.coarse_entropy, result.refined_logits, result.logits(), result.entropy()):
        assert bool(values.isfinite().all())


def test_integers_are_no_logits() -> None:
    base = FrozenBase(lambda x: (x > 0.5).long(), K, BaseConfig("my model", ratio=1.0))
    with pytest.raises(ValueError, match=r"base my model: .*int64"):
        base(pixels())


def test_negative_scores_are_refused() -> None:
    scores = with_bad_values((2, K, 3, 4), -0.25)
    base = FrozenBase(lambda x: scores, K, BaseConfig("my model", ratio=1.0, outputs="scores"))
    with pytest.raises(ValueError, match=r"base my model: outputs='scores' but the smallest is -0.25"):
        base(pixels())
    assert torch.equal(FrozenBase(lambda x: scores.abs(), K, base.config)(pixels()), scores.abs())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 6, 8), r"\(3, 6, 8\), expected \[B, 3, H, W\]"),
        (torch.zeros(1, 4, 6, 8), r"\(1, 4, 6, 8\)"),
        (torch.zeros(1, 6, 8, 3), r"\(1, 6, 8, 3\)"),
        (torch.zeros(0, 3, 6, 8), r"\(0, 3, 6, 8\)"),
        (torch.zeros(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 6, 8, dtype=torch.long), "torch.int64, expected uint8, or floating point"),
        (torch.zeros(1, 3, 6, 8, dtype=torch.bool), "torch.bool, expected uint8, or floating point"),
    ],
    ids=["3 axes", "4 channels", "channels last", "no image", "no pixel", "integers", "booleans"],
)
def test_bad_image_is_refused(image: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FrozenBase(identity, K, PLAIN)(image)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 255, r"image holds 0\.\.255, expected 0\.\.1 for floating point; divide it by 255, or pass uint8"),
        (-2.1, 2.6, r"image holds -2\.1\.\.2\.6"),
        (-0.5, 0.5, r"image holds -0\.5\.\.0\.5"),
        (0, float("inf"), r"image holds 0\.\.inf"),
        (0, float("nan"), "image holds NaN"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_pixels_outside_0_to_1_are_refused(low: float, high: float, words: str, dtype: torch.dtype) -> None:
    image = torch.full((2, 3, 6, 8), 0.5, dtype=torch.float64)
    image[1, 2, 3, 4:6] = torch.tensor([low, high])
    base = FrozenBase(identity, K, PLAIN)
    words = words if dtype in (torch.float32, torch.float64) else words.split("..")[0][:12]  # halves round
    with pytest.raises(ValueError, match=words):
        base(image.to(dtype))
    output, check = base.begin(image.to(dtype))
    assert output.shape == (2, 3, 6, 8)
    with pytest.raises(ValueError, match=words):
        check()


def test_pixels_that_rounding_moved_are_fine() -> None:
    """As resizing does it."""
    image = torch.full((1, 3, 6, 8), 1 + 1e-6)
    image[0, 0, 0, 0] = -1e-6
    FrozenBase(identity, K, PLAIN)(image)


# ---- frozen


def test_stays_frozen_inside_a_module_that_trains() -> None:
    model = unet().train()
    parent = nn.ModuleDict({"base": FrozenBase(model, K, PLAIN), "head": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in (True, False, True):
        parent.train(mode)
        assert not any(module.training for module in parent["base"].modules())
        assert not any(p.requires_grad for p in parent["base"].parameters())
    parent["base"](pixels())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parent["head"].training
    assert all(p.requires_grad for p in parent["head"].parameters())


@pytest.mark.parametrize("kind", ["module", "callable"])
def test_no_gradient_is_recorded(kind: str) -> None:
    weight = torch.randn(K, 3, 1, 1, requires_grad=True)
    base = FrozenBase(unet() if kind == "module" else lambda x: F.conv2d(x, weight), K, PLAIN)
    output = base(torch.rand(1, 3, 4, 4, requires_grad=True))
    assert not output.requires_grad
    assert output.grad_fn is None


# ---- cost


@pytest.mark.parametrize("kind", ["module", "callable"])
def test_macs_against_a_hand_count(kind: str) -> None:
    """A 3x3 convolution from 3 to K channels on half of 6x8 pixels."""
    conv = nn.Conv2d(3, K, 3, padding=1)
    base = FrozenBase(conv if kind == "module" else lambda x: conv(x), K, BaseConfig(ratio=0.5))
    assert base.macs(6, 8) == 3 * 4 * K * 27
    assert base.macs(12, 8) == 6 * 4 * K * 27


def test_macs_of_a_fixed_input_size() -> None:
    base = FrozenBase(nn.Conv2d(3, K, 1), K, BaseConfig(size=(5, 7)))
    assert base.macs(6, 8) == base.macs(600, 800) == 5 * 7 * K * 3


def test_macs_of_what_cannot_run_on_the_meta_device() -> None:
    class Dependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, K, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.mean()) < 1e9 else x

    assert FrozenBase(Dependent(), K, PLAIN).macs(6, 8) == 6 * 8 * K * 3


def test_macs_that_torch_cannot_see() -> None:
    assert FrozenBase(lambda x: torch.from_numpy(x.numpy() * 2), K, PLAIN).macs(6, 8) is None


# ---- identity


def test_identity_is_that_of_the_weights_and_the_configuration() -> None:
    model = unet()
    copy = unet()
    copy.load_state_dict(model.state_dict())
    base = FrozenBase(model, K, BaseConfig(ratio=0.5))
    assert base.identity == FrozenBase(copy, K, BaseConfig(ratio=0.5)).identity
    assert base.identity == FrozenBase(copy, K, BaseConfig("a name of the same thing", ratio=0.5)).identity
    with torch.no_grad():
        copy.head.bias[0] += 1e-6
    assert base.identity != FrozenBase(copy, K, BaseConfig(ratio=0.5)).identity


@pytest.mark.parametrize(
    "other",
    [
        BaseConfig(ratio=0.25),
        BaseConfig(size=(3, 4)),
        BaseConfig(ratio=0.5, mean=(0.0, 0.0, 0.0)),
        BaseConfig(ratio=0.5, std=(1.0, 1.0, 1.0)),
        BaseConfig(ratio=0.5, outputs="scores"),
    ],
    ids=str,
)
def test_identity_changes_with(other: BaseConfig) -> None:
    model = unet()
    assert FrozenBase(model, K, BaseConfig(ratio=0.5)).identity != FrozenBase(model, K, other).identity


def test_identity_changes_with_running_statistics() -> None:
    model = unet()
    before = FrozenBase(model, K, PLAIN).identity
    model.down[0][1].running_mean += 1
    assert FrozenBase(model, K, PLAIN).identity != before


def test_identity_of_a_function_is_the_same_in_the_next_process() -> None:
    assert hex(id(identity)) not in FrozenBase(identity, K, PLAIN).identity


# ---- configuration


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either ratio or size.*ratio=None, size=None"),
        ({"ratio": 0.5, "size": (4, 4)}, r"either ratio or size.*ratio=0.5, size=\(4, 4\)"),
        ({"ratio": 0.0}, "base.ratio = 0.0"),
        ({"ratio": 1.5}, "base.ratio = 1.5"),
        ({"ratio": float("nan")}, "base.ratio = nan"),
        ({"size": (0, 4)}, r"base.size = \(0, 4\)"),
        ({"ratio": 0.5, "std": (1.0, 0.0, 1.0)}, r"base.std = \(1.0, 0.0, 1.0\)"),
        ({"ratio": 0.5, "outputs": "masks"}, "base.outputs = 'masks', expected 'logits' or 'scores'"),
    ],
    ids=str,
)
def test_bad_configuration(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BaseConfig(**arguments)


@pytest.mark.parametrize("classes", [0, 1])
def test_one_channel_is_no_segmentation_into_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes = {classes}, expected at least 2.*zeros_like"):
        FrozenBase(identity, classes, PLAIN)


# ---- the built-in U-Net


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (7, 5), (8, 16)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("planes", [(4,), (4, 8), (2, 3, 4, 5)], ids=str)
def test_unet_takes_any_size(planes: tuple[int, ...], size: tuple[int, int]) -> None:
    output = UNet(K, planes).eval()(torch.randn(2, 3, *size))
    assert output.shape == (2, K, *size)
    assert output.isfinite().all()


def test_unet_pads_with_zeros() -> None:
    model, image = unet(), torch.randn(1, 3, 7, 5)
    assert_close(model(image), model(F.pad(image, (0, 1, 0, 1)))[..., :7, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unet_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = unet(), tmp_path / "deep" / "unet.safetensors"
    model.down[0][1].running_mean += 0.1
    save_unet(model, path, dtype=dtype)
    found = load_unet(path)
    assert (found.num_classes, found.planes, found.training) == (K, (4, 8), False)
    for name, value in model.state_dict().items():
        stored = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
        assert found.state_dict()[name].dtype == value.dtype
        assert torch.equal(found.state_dict()[name], stored), name
    assert [p.name for p in path.parent.iterdir()] == ["unet.safetensors"]


def foreign(path: Path, kind: str) -> None:
    """Writes a file that is not, or no longer, a stored U-Net."""
    whole = path.with_name("whole")
    save_unet(unet(), whole)
    architecture = json.dumps({"num_classes": K, "planes": [4, 8]})
    if kind == "text":
        path.write_text("weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(whole.read_bytes()[:-100])
    elif kind == "of another program":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "header is not JSON":
        save_file({"weight": torch.zeros(2)}, path, metadata={"unet": "{"})
    elif kind == "unknown architecture":
        save_file({"weight": torch.zeros(2)}, path, metadata={"unet": json.dumps({"depth": 4})})
    elif kind == "tensors missing":
        save_file({"weight": torch.zeros(2)}, path, metadata={"unet": architecture})
    elif kind == "tensors of other shapes":
        tensors = UNet(K, (5, 8)).state_dict()
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"unet": architecture})
    else:
        wrong = {"classes": (10**9, [4, 8]), "channels": (K, [4, 10**9]), "levels": (K, [4] * 10**5), "text": (K, "48")}
        classes, planes = wrong[kind.removeprefix("architecture of too many ").removeprefix("architecture of ")]
        header = {"unet": json.dumps({"num_classes": classes, "planes": planes})}
        save_file({"weight": torch.zeros(2)}, path, metadata=header)


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "empty",
        "cut short",
        "of another program",
        "header is not JSON",
        "unknown architecture",
        "tensors missing",
        "tensors of other shapes",
        "architecture of too many classes",
        "architecture of too many channels",
        "architecture of too many levels",
        "architecture of text",
    ],
)
def test_other_files_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    foreign(path, kind)
    with pytest.raises(ValueError, match=r"weights\.safetensors") as error:
        load_unet(path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


def test_a_unet_larger_than_its_file_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, devices = tmp_path / "weights.safetensors", set()
    header = {"unet": json.dumps({"num_classes": K, "planes": [4, 60_000]})}
    save_file({"weight": torch.zeros(2)}, path, metadata=header)
    make = UNet.__init__

    def noted(self: UNet, *arguments: Any) -> None:
        make(self, *arguments)
        devices.update(parameter.device.type for parameter in self.parameters())

    monkeypatch.setattr(UNet, "__init__", noted)
    with pytest.raises(ValueError, match="does not fit"):
        load_unet(path)
    assert devices == {"meta"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_a_unet_that_is_not_finite_is_not_stored(value: float, tmp_path: Path) -> None:
    model = unet()
    with torch.no_grad():
        model.head.bias[0] = value  # the last is more than half precision holds
    with pytest.raises(ValueError, match=r"1 of 3 values of head\.bias are NaN or infinite"):
        save_unet(model, tmp_path / "unet.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file, expected a safetensors file"):
        load_unet(tmp_path / "nowhere.safetensors")


# ---- bases by name


@pytest.mark.parametrize("name", ["", "unet", "unet:", "resnet50:weights.pth", "python:os", "python:a:b:c", "hf"])
def test_unknown_base_lists_what_is_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"unet:<file>.*python:<module>:<callable>") as error:
        load_base(BaseConfig(name, ratio=0.5), K)
    assert repr(name) in str(error.value)


def test_unet_by_name(tmp_path: Path) -> None:
    model = unet()
    save_unet(model, tmp_path / "unet.safetensors")
    image = pixels()
    expected = FrozenBase(model, K, PLAIN)(image)
    whole_path = BaseConfig(f"unet:{tmp_path / 'unet.safetensors'}", 1.0, mean=PLAIN.mean, std=PLAIN.std)
    in_folder = BaseConfig("unet:unet.safetensors", 1.0, mean=PLAIN.mean, std=PLAIN.std)
    assert_close(load_base(whole_path, K)(image), expected)
    assert_close(load_base(in_folder, K, folder=tmp_path)(image), expected)
    with pytest.raises(ValueError, match=r"unet\.safetensors: 3 classes, the data has 4"):
        load_base(whole_path, K + 1)


def test_missing_weights_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_base(BaseConfig("unet:nowhere.safetensors", ratio=0.5), K, folder=tmp_path)


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on the path that notes that it ran."""
    (tmp_path / "some_factory.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_name('ran').touch()\n"
        "def build():\n"
        "    return lambda x: x * 2\n"
        "NUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "some_factory", raising=False)
    return tmp_path


def test_python_base_runs_only_with_trust(factory_module: Path) -> None:
    config = BaseConfig("python:some_factory:build", 1.0, mean=PLAIN.mean, std=PLAIN.std)
    with pytest.raises(ValueError, match="python:some_factory:build: runs code; pass trust_base=True"):
        load_base(config, K, trust_base=False)
    assert not (factory_module / "ran").exists()
    image = pixels()
    assert_close(load_base(config, K, trust_base=True)(image), image.float() / 255 * 2)


@pytest.mark.parametrize("name", ["python:no_such_module_here:build", "python:some_factory:nothing", "python::build"])
def test_python_base_that_does_not_exist(name: str, factory_module: Path) -> None:
    with pytest.raises(ValueError, match=f"base {name}: .*expected 'python:<module>:<callable returning a model>'"):
        load_base(BaseConfig(name, ratio=0.5), K)


def test_python_base_that_is_not_callable(factory_module: Path) -> None:
    with pytest.raises(ValueError, match="base python:some_factory:NUMBER: "):
        load_base(BaseConfig("python:some_factory:NUMBER", ratio=0.5), K)


def test_python_base_may_be_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\nMODEL = nn.Conv2d(3, 3, 1)\ndef nothing():\n    return None\n"
    (tmp_path / "ready_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "ready_model", raising=False)
    assert load_base(BaseConfig("python:ready_model:MODEL", ratio=1.0), K)(pixels()).shape[1] == K
    with pytest.raises(ValueError, match="python:ready_model:nothing: returned NoneType, expected a model"):
        load_base(BaseConfig("python:ready_model:nothing", ratio=1.0), K)


def test_identity_sees_what_is_no_weight() -> None:
    def base(settings: str = "", value: float = 0.0) -> FrozenBase:
        model = nn.Conv2d(3, K, 1)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        model.register_buffer("unstored", torch.tensor([value]), persistent=False)
        model.settings = settings
        return FrozenBase(model, K, PLAIN)

    assert base().identity == base().identity
    assert base("flipped").identity != base().identity
    assert base(value=1.0).identity != base().identity


def test_no_name_is_no_base() -> None:
    with pytest.raises(ValueError, match=r"base\.name = None, expected the name"):
        BaseConfig(None, ratio=0.5)  # type: ignore[arg-type]  # what null in YAML gives
