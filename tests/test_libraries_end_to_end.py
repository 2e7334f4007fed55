"""Every way to name a base, from a stored refiner to label images on disk, as a user runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparserefine import (
    BaseConfig,
    ExtractorConfig,
    RefinerConfig,
    Selector,
    SparseRefiner,
    load_base,
    read_image,
    read_label,
)
from sparserefine.bases.load import BASE_NAMES
from sparserefine.bases.runtimes import NEEDS
from sparserefine.commands.main import main
from test_libraries import Segmenter, fake_smp, fake_timm, fake_torchvision, saved_smp, stored  # noqa: F401 (fixtures)
from test_predict import photo

K, SIZE = 3, (64, 96)


class Net(nn.Module):
    """Stride 2, K classes; exports everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, K, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.b(self.a(image).relu())


def unet_file(folder: Path) -> str:
    from sparserefine.bases.families.unet import UNet, save_unet

    save_unet(UNet(K, (4, 8)), folder / "unet.safetensors")
    return f"unet:{folder / 'unet.safetensors'}"


def hrnet_file(folder: Path) -> str:
    """66 million numbers in a small file: each row of a convolution is one number, repeated."""
    from sparserefine.bases.families.hrnet import HRNet

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in HRNet(K).state_dict().items()}
    state = {name: torch.tensor(float(not name.endswith(("bias", "mean")))).expand(n) for name, n in shapes.items()}
    for name, shape in shapes.items():
        if len(shape) == 4:
            state[name] = (torch.randn(shape[0], 1, 1, 1) / shape[1:].numel()).expand(shape)
    torch.save(state, folder / "hrnet.pth")
    return f"hrnet_w48:{folder / 'hrnet.pth'}"


def segnext_file(folder: Path) -> str:
    from sparserefine.bases.families.segnext import segnext

    torch.save({"state_dict": segnext("t", K).state_dict()}, folder / "segnext.pth")
    return f"segnext_t:{folder / 'segnext.pth'}"


def segformer_folder(folder: Path) -> str:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
        id2label=dict(enumerate(("road", "car", "sky"))),
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder / "segformer")
    return f"hf:{folder / 'segformer'}"


def mask2former_folder(folder: Path) -> str:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy", reason="Mask2Former needs scipy")
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=5,
        num_labels=K,
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "mask2former")
    return f"hf:{folder / 'mask2former'}"


def onnx_file(folder: Path) -> str:
    pytest.importorskip("onnxruntime")
    helper, numpy_helper = pytest.importorskip("onnx.helper"), pytest.importorskip("onnx.numpy_helper")
    import onnx

    net = Net()
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in net.state_dict().items()]
    nodes = [
        helper.make_node("Conv", ["image", "a.weight", "a.bias"], ["x"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "b.weight", "b.bias"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, "h", "w"])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, K, "h2", "w2"])
    model = helper.make_model(
        helper.make_graph(nodes, "net", [image], [logits], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 10  # as old as the opset; ONNX Runtime reads no newer ones than it knows
    onnx.save(model, folder / "net.onnx")
    return f"onnx:{folder / 'net.onnx'}"


def python_module(folder: Path) -> str:
    (folder / "base_module.py").write_text(
        "from test_libraries_end_to_end import Net\ndef build():\n    return Net()\n"
    )
    return "python:base_module:build"


def torchvision_file(folder: Path) -> str:
    return f"torchvision:fcn_small:{stored(Segmenter(K).state_dict(), folder / 'torchvision.pth')}"


def timm_file(folder: Path) -> str:
    return f"timm:segmenter:{stored(Segmenter(K).state_dict(), folder / 'timm.safetensors')}"


def smp_folder(folder: Path) -> str:
    saved_smp(folder / "smp", classes=K)
    return f"smp:{folder / 'smp'}"


def refiner_folder(folder: Path) -> str:
    config = RefinerConfig(selector=Selector(budget=50), extractor=ExtractorConfig((4, 8)))
    base = load_base(BaseConfig(unet_file(folder), ratio=0.5), K)
    SparseRefiner(base, config).save_pretrained(folder / "inner")
    return f"refiner:{folder / 'inner'}"


BASES: dict[str, Callable[[Path], str]] = {
    "unet": unet_file,
    "hrnet_w48": hrnet_file,
    "segnext_<t, s, b or l>": segnext_file,
    "hf": segformer_folder,
    "hf of scores": mask2former_folder,
    "onnx": onnx_file,
    "python": python_module,
    "torchvision": torchvision_file,
    "timm": timm_file,
    "smp": smp_folder,
    "refiner": refiner_folder,
}
STAND_INS = {"torchvision": "fake_torchvision", "timm": "fake_timm", "smp": "fake_smp"}
"""Fixtures of test_libraries.py for packages that are not installed here."""


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules are found in the folder of the test, and forgotten after it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("base_module", None)


def stored_refiner(name: str, folder: Path) -> Tensor:
    """Stores a refiner and a photograph; the labels of the one for the other."""
    base = load_base(BaseConfig(name, size=SIZE), K)
    config = RefinerConfig(selector=Selector(budget=100), extractor=ExtractorConfig((4, 8)))
    refiner = SparseRefiner(base, config).eval()
    refiner.save_pretrained(folder / "refiner")
    with torch.no_grad():
        return refiner(read_image(photo(folder / "a.png", *SIZE))[None]).labels()[0]


def test_every_kind_is_here() -> None:
    assert {name.partition(":")[0] for name in BASE_NAMES} == {name.split(" of ")[0] for name in BASES}


@pytest.mark.parametrize("family", BASES)
def test_predict_with_base(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if family in STAND_INS:
        request.getfixturevalue(STAND_INS[family])
    expected = stored_refiner(BASES[family](tmp_path), tmp_path)
    arguments = [str(tmp_path / "a.png"), "--refiner", str(tmp_path / "refiner"), "--out", str(tmp_path / "out")]
    trust = ["--trust_base"] if family == "python" else []
    assert main(["predict", *arguments, *trust, "--device", "cpu"]) == 0
    assert torch.equal(read_label(tmp_path / "out" / "a.png"), expected)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_predict_with_runtime(runtime: str, tmp_path: Path) -> None:
    for package in NEEDS[runtime]:
        pytest.importorskip(package, reason=f"base.runtime = {runtime}")
    expected = stored_refiner(python_module(tmp_path), tmp_path)
    arguments = [str(tmp_path / "a.png"), "--refiner", str(tmp_path / "refiner"), "--out", str(tmp_path / "out")]
    assert main(["predict", *arguments, "--trust_base", "--runtime", runtime, "--device", "cpu"]) == 0
    assert (read_label(tmp_path / "out" / "a.png") == expected).float().mean() > 0.99


def test_runtime_belongs_to_the_machine_and_is_not_stored(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    config = BaseConfig(python_module(tmp_path), size=SIZE, runtime="openvino")
    SparseRefiner(load_base(config, K)).save_pretrained(tmp_path / "refiner")
    found = SparseRefiner.from_pretrained(tmp_path / "refiner", trust_base=True)
    assert found.base.config.runtime is None
    with pytest.raises(ValueError, match=r"give the runtime to the base, BaseConfig\(runtime="):
        SparseRefiner.from_pretrained(tmp_path / "refiner", base=found.base, runtime="openvino")
