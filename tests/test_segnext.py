"""SegNeXt: its sizes and cost, its fixed bases, the files that it is loaded from, and those that it is not.

That it computes what mmsegmentation's does is in ``test_parity.py``.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sparserefine.bases.families.segnext import NMF, HamHead, SegNeXt, Size, load_segnext, segnext, segnext_l
from sparserefine.bases.macs import count_macs
from sparserefine.bases.runtimes import Runtime
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from support import CLASSIFIER, assert_close, numbers, of_mmsegmentation, saved

K = 3


def randomised(model: SegNeXt) -> SegNeXt:
    """Statistics and scales other than those of a new model, which hide the blocks: a hundredth of each is added."""
    for name, value in model.state_dict().items():
        if "running_mean" in name:
            torch.nn.init.uniform_(value, -0.1, 0.1)
        elif "running_var" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
        elif "scale" in name:
            torch.nn.init.uniform_(value, -0.2, 0.2)
    return model


@pytest.fixture(scope="module")
def model() -> SegNeXt:
    torch.manual_seed(0)
    return randomised(segnext("t", K))


@cache
def image(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- size and cost


@pytest.mark.parametrize(("size", "millions"), [("t", 4.2297), ("s", 13.8992), ("b", 27.5691), ("l", 48.7923)])
def test_parameters(size: Size, millions: float) -> None:
    with torch.device("meta"):
        model = segnext(size, 19)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-5)


@pytest.mark.parametrize(("size", "giga"), [((512, 1024), 131), ((1024, 2048), 523)])
def test_cost(size: tuple[int, int], giga: int) -> None:
    with torch.device("meta"):
        model = segnext_l(19)
    macs = count_macs(model, (1, 3, *size))
    assert macs is not None
    assert macs / 1e9 == pytest.approx(giga, abs=0.5)


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="size = 'xl', expected one of t, s, b, l"):
        segnext("xl", 19)  # type: ignore[arg-type]


# ---- forward


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (64, 37), (63, 1), (1, 1)], ids=str)
def test_output_is_an_eighth_of_any_size(model: SegNeXt, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = model(image(1, *size))
    assert logits.shape == (1, K, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    assert logits.is_contiguous()
    assert logits.isfinite().all()


def test_the_same_image_gives_the_same_bits(model: SegNeXt) -> None:
    with torch.no_grad():
        first = model(image(1, 40, 56))
        torch.manual_seed(5)
        assert torch.equal(model(image(1, 40, 56)), first)


def test_images_of_a_batch_do_not_meet_and_the_memory_format_does_not_matter(model: SegNeXt) -> None:
    images = image(2, 33, 47)
    with torch.no_grad():
        alone = torch.cat([model(one[None].to(memory_format=torch.channels_last)) for one in images])
        assert_close(model(images), alone)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_other_precisions(model: SegNeXt, dtype: torch.dtype, bound: float) -> None:
    other = segnext("t", K)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits, expected = other.to(dtype)(image(1, 64, 64).to(dtype)), model(image(1, 64, 64))
    assert logits.dtype == other.head.nmf.bases.dtype == dtype
    assert (logits.double() - expected.double()).abs().max() <= bound * expected.abs().max()


# ---- matrix factorisation


def test_bases_are_the_same_everywhere() -> None:
    """Known numbers, so that stored logits stay those of the model on other machines and with other packages."""
    torch.manual_seed(1)
    first = NMF(64).bases
    torch.manual_seed(2)
    assert torch.equal(NMF(64).bases, first)
    assert first.shape == (1, 64, 16)
    assert (first >= 0).all()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(1, 16))
    known = torch.tensor([1.0, 0.0368402, 0.8311572, 0.5747460])  # of RandomState(0); the first is 0.5488135
    torch.testing.assert_close(first[0, :4, 0] / first[0, 0, 0], known, rtol=0, atol=1e-6)


def test_bases_are_in_no_file(model: SegNeXt) -> None:
    assert not any("bases" in name for name in model.state_dict())


def test_bases_matter_and_can_be_replaced(model: SegNeXt) -> None:
    other = segnext("t", K)
    other.load_state_dict(model.state_dict())
    other.head.nmf.bases.copy_(other.head.nmf.bases.flip(1))
    with torch.no_grad():
        assert not torch.allclose(other(image(1, 40, 56)), model(image(1, 40, 56)))


def test_the_factorisation_finds_a_matrix_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(2, *size, generator=generator, dtype=torch.float64) for size in ((32, 3), (3, 48)))
    x = (left @ right).view(2, 32, 6, 8)
    with torch.no_grad():
        error, plain = (NMF(32, steps=steps).double()(x).sub(x).norm() / x.norm() for steps in (200, 0))
    assert error < 0.02 < plain


def test_dark_features_are_finite() -> None:
    """All zero after the ReLU: nothing is divided by nothing."""
    assert NMF(32)(torch.zeros(1, 32, 4, 4)).eq(0).all()


class Head(torch.nn.Module):
    """SegNeXt's head, narrow, on features that are made of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = HamHead(9, 32, K)

    def forward(self, image: Tensor) -> Tensor:
        return self.head([image, F.avg_pool2d(image, 2), F.avg_pool2d(image, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_take_the_head(name: Literal["onnxruntime", "openvino"]) -> None:
    """OpenVINO 2026.4 crashes where all its group norms are torch's."""
    for package in ("onnxruntime", "onnxscript") if name == "onnxruntime" else ("openvino",):
        pytest.importorskip(package, reason=f"base.runtime = {name}")
    torch.manual_seed(0)
    head = Head().eval()
    with torch.no_grad():
        expected = head(image(1, 9, 12))
    error = (Runtime(name, head)(image(1, 9, 12)) - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_files_of_mmsegmentation(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in of_mmsegmentation("segnext_t").items()}
    extra = {"auxiliary_head.conv_seg.weight": torch.ones(19, 1)}
    classes = Classes(tuple(f"name {k}" for k in range(19)), tuple((k, 2 * k, 3 * k) for k in range(19)))
    meta = {"dataset_meta": {"classes": classes.names, "palette": [list(colour) for colour in classes.palette]}}
    loaded = load_segnext("t", saved(tmp_path / "file.pth", {"meta": meta, "state_dict": {**tensors, **extra}}))
    assert isinstance(loaded.model, SegNeXt)
    assert not loaded.model.training
    assert loaded.num_classes == 19
    assert loaded.classes == classes
    assert (loaded.mean, loaded.std, loaded.outputs) == (IMAGENET_MEAN, IMAGENET_STD, "logits")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    weights = {v.view(-1)[0].item() for k, v in tensors.items() if k.endswith(("weight", "bias", "_1", "_2"))}
    assert numbers(loaded.model) == weights


def test_files_of_the_authors(tmp_path: Path) -> None:
    """Their depthwise convolution is in a module of its own, of the same name."""
    tensors = of_mmsegmentation("segnext_t")
    theirs = {name.replace("mlp.dwconv.", "mlp.dwconv.dwconv."): value for name, value in tensors.items()}
    assert theirs.keys() != tensors.keys()
    loaded = [load_segnext("t", saved(tmp_path / "file.pth", {"state_dict": state})) for state in (theirs, tensors)]
    first, second = (x.model.state_dict() for x in loaded if isinstance(x.model, SegNeXt))
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def test_class_names_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    content = {"meta": {"CLASSES": ["road", "sky"]}, "state_dict": of_mmsegmentation("segnext_t", K)}
    with pytest.warns(UserWarning, match=r"file.pth: has 2 class names for a model of 3"):
        loaded = load_segnext("t", saved(tmp_path / "file.pth", content))
    assert (loaded.num_classes, loaded.classes) == (K, None)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_round_trip_in_our_own_names(tmp_path: Path, model: SegNeXt, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    loaded = load_segnext("t", path)
    with torch.no_grad():
        assert torch.equal(loaded.model(image(1, 40, 56)), model(image(1, 40, 56)))
    assert (loaded.num_classes, loaded.classes) == (K, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone.block3.4.mlp.fc2.bias": None}, r"1 missing: stages\.2\.blocks\.4\.mlp\.3\.bias$"),
        ({"backbone.norm5.weight": torch.ones(1)}, r"1 unexpected: backbone\.norm5\.weight$"),
        ({"backbone.norm1.bias": torch.ones(31)}, r"1 of another shape: backbone\.norm1\.bias is 31, expected 32$"),
        (
            {CLASSIFIER: None},
            rf"not a SegNeXt, .* neither of {CLASSIFIER}, head\.classifier\.weight; it has \d+ tensors",
        ),
    ],
    ids=["missing", "extra", "another shape", "no head"],
)
def test_damaged_files(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    tensors = {name: value for name, value in {**of_mmsegmentation("segnext_t"), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=rf"file\.pth: .*{words}"):
        load_segnext("t", saved(tmp_path / "file.pth", tensors))


def test_a_block_too_few(tmp_path: Path) -> None:
    tensors = {name: value for name, value in of_mmsegmentation("segnext_t").items() if "block2.2." not in name}
    with pytest.raises(ValueError, match=r"does not fit SegNeXt, .* missing: stages\.1\.blocks\.2\."):
        load_segnext("t", saved(tmp_path / "file.pth", tensors))


def test_another_size_is_named(tmp_path: Path, model: SegNeXt) -> None:
    words = "has the blocks of segnext_{}, expected those of segnext_{}"
    with pytest.raises(ValueError, match=words.format("l", "t")):
        load_segnext("t", saved(tmp_path / "l.pth", of_mmsegmentation("segnext_l")))
    with pytest.raises(ValueError, match=words.format("t", "b")):
        load_segnext("b", saved(tmp_path / "t.pth", model.state_dict()))


def test_other_models(tmp_path: Path) -> None:
    tensors = {
        re.sub("backbone.block", "backbone.layers.", name): value
        for name, value in of_mmsegmentation("segnext_t").items()
    }
    with pytest.raises(ValueError, match=r"file\.pth: not a SegNeXt, it lacks blocks"):
        load_segnext("t", saved(tmp_path / "file.pth", tensors))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, expected a weights file"):
        load_segnext("t", tmp_path / "none.pth")
