"""HRNet-W48: its size and cost, the files that it is loaded from, and those that it is not.

That it computes what mmsegmentation's does is in ``test_parity.py``.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparserefine.bases.families.hrnet import HRNet, hrnet_w48, load_hrnet_w48
from sparserefine.bases.macs import count_macs
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from support import CLASSIFIER, numbers, of_mmsegmentation, saved


@pytest.fixture(scope="module")
def model() -> HRNet:
    """Numbers that half precision has: 264 MB of them, so that one model serves every test."""
    torch.manual_seed(0)
    model = hrnet_w48(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.half().float()


def test_parameters() -> None:
    with torch.device("meta"):
        model = HRNet(19)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(65.86, abs=0.005)


@pytest.mark.parametrize(("size", "giga"), [((512, 1024), 187), ((1024, 2048), 748)])
def test_cost(size: tuple[int, int], giga: int) -> None:
    with torch.device("meta"):
        model = hrnet_w48(19)
    macs = count_macs(model, (1, 3, *size))
    assert macs is not None
    assert macs / 1e9 == pytest.approx(giga, abs=0.5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 37), (63, 1), (1, 1)], ids=str)
def test_output_is_a_quarter_of_any_size(model: HRNet, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = model(torch.rand(1, 3, *size))
    assert logits.shape == (1, 3, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert logits.isfinite().all()


def test_images_of_a_batch_do_not_meet_and_the_memory_format_does_not_matter(model: HRNet) -> None:
    images = torch.rand(2, 3, 33, 40)
    with torch.no_grad():
        both = model(images)
        alone = torch.cat([model(image[None].to(memory_format=torch.channels_last)) for image in images])
    assert both.is_contiguous()
    torch.testing.assert_close(alone, both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_files_of_mmsegmentation(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in of_mmsegmentation("hrnet_w48").items()}
    extra = {"auxiliary_head.conv_seg.weight": torch.ones(19, 1)}
    classes = Classes(tuple(f"name {k}" for k in range(19)), tuple((k, 2 * k, 3 * k) for k in range(19)))
    meta = {"CLASSES": classes.names, "PALETTE": [list(colour) for colour in classes.palette]}
    loaded = load_hrnet_w48(saved(tmp_path / "file.pth", {"meta": meta, "state_dict": {**tensors, **extra}}))
    assert isinstance(loaded.model, HRNet)
    assert not loaded.model.training
    assert loaded.num_classes == 19
    assert loaded.classes == classes
    assert (loaded.mean, loaded.std, loaded.outputs) == (IMAGENET_MEAN, IMAGENET_STD, "logits")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    weights = {v.view(-1)[0].item() for k, v in tensors.items() if k.endswith(("weight", "bias"))}
    assert numbers(loaded.model) == weights


def test_class_names_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    content = {"meta": {"CLASSES": ["road", "sky"]}, "state_dict": of_mmsegmentation("hrnet_w48", 3)}
    with pytest.warns(UserWarning, match=r"file.pth: has 2 class names for a model of 3"):
        loaded = load_hrnet_w48(saved(tmp_path / "file.pth", content))
    assert (loaded.num_classes, loaded.classes) == (3, None)
    assert loaded.model(torch.rand(1, 3, 32, 32)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_round_trip_in_our_own_names(tmp_path: Path, model: HRNet, suffix: str) -> None:
    image = torch.rand(1, 3, 32, 48)
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    path = tmp_path / f"file.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    del state  # 130 MB
    loaded = load_hrnet_w48(path)
    path.unlink()  # 130 MB, and the weights are in memory
    with torch.no_grad():
        assert torch.equal(loaded.model(image), model(image))
    assert (loaded.num_classes, loaded.classes) == (3, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone.stage3.2.fuse_layers.2.0.1.0.weight": None}, r"1 missing: stages\.1\.2\.fuse\.2\.0\.1\.0\.weight$"),
        ({"backbone.stage5.weight": torch.ones(1)}, r"1 unexpected: backbone\.stage5\.weight$"),
        ({"backbone.bn1.bias": torch.ones(32)}, r"1 of another shape: backbone\.bn1\.bias is 32, expected 64$"),
        ({CLASSIFIER: None}, rf"not an HRNet-W48, it has neither of {CLASSIFIER}, head\.3\.weight"),
    ],
    ids=["missing", "extra", "another shape", "no head"],
)
def test_files_of_other_models(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    tensors = {name: value for name, value in {**of_mmsegmentation("hrnet_w48"), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=rf"file\.pth: .*{words}"):
        load_hrnet_w48(saved(tmp_path / "file.pth", tensors))


def test_a_narrower_hrnet_is_refused(tmp_path: Path) -> None:
    """HRNet-W18 has the same names: every shape but those of the first stage differs."""

    def narrow(value: Tensor) -> Tensor:
        sizes = [{48: 18, 96: 36, 192: 72, 384: 144, 720: 270}.get(n, n) for n in value.shape]
        return value.new_ones(()).expand(sizes)

    path = saved(tmp_path / "w18.pth", {name: narrow(value) for name, value in of_mmsegmentation("hrnet_w48").items()})
    with pytest.raises(
        ValueError, match=r"w18.pth: does not fit HRNet, .* of another shape: .* is 18x\d+x3x3, expected 48x"
    ):
        load_hrnet_w48(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, expected a weights file"):
        load_hrnet_w48(tmp_path / "none.pth")
