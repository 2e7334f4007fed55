"""Models of transformers as bases: each family, saved tiny and random, against transformers' own processing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families import hf as hf_module
from sparserefine.bases.families.hf import hf
from sparserefine.bases.families.hf_model import HfModel, semantic_scores, window_starts
from sparserefine.bases.load import load_base
from sparserefine.bases.macs import count_macs
from sparserefine.images.classes import CITYSCAPES, wheel
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD
from support import assert_close

T = pytest.importorskip("transformers", reason="the loader hf needs transformers")
pytest.importorskip("scipy", reason="Mask2Former and its like need scipy")

K, SIDE = 5, 64
STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {
    **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": SIDE, "patch_size": 16},
}
BEIT = {**VIT, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True, "auxiliary_channels": 8}
EOMT = {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16},
    **{"num_blocks": 2, "num_queries": 40, "num_register_tokens": 2},
}


def swin() -> Any:
    return T.SwinConfig(
        out_features=STAGES, embed_dim=12, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4, image_size=SIDE
    )


def convnext() -> Any:
    return T.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=STAGES)


def segformer(**more: Any) -> Any:
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    config = T.SegformerConfig(**{"num_labels": K, "decoder_hidden_size": 16, **sizes, **more})
    return T.SegformerForSemanticSegmentation(config)


def upernet(backbone: Any, channels: int) -> Any:
    aux = {"auxiliary_in_channels": channels, "auxiliary_channels": 8}
    return T.UperNetForSemanticSegmentation(
        T.UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=K, **aux)
    )


def dpt() -> Any:
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return T.DPTForSemanticSegmentation(T.DPTConfig(num_labels=K, is_hybrid=False, **neck, **VIT))


def mobilevit() -> Any:
    sizes = {"hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2, "aspp_out_channels": 8}
    return T.MobileViTForSemanticSegmentation(T.MobileViTConfig(num_labels=K, image_size=SIDE, **sizes))


def mobilevit_v2() -> Any:
    sizes = {"width_multiplier": 0.25, "base_attn_unit_dims": [32, 48, 64], "n_attn_blocks": [1, 1, 1]}
    config = T.MobileViTV2Config(num_labels=K, image_size=SIDE, aspp_out_channels=8, **sizes)
    return T.MobileViTV2ForSemanticSegmentation(config)


def mask2former() -> Any:
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4, "encoder_feedforward_dim": 32}
    config = T.Mask2FormerConfig(backbone_config=swin(), num_labels=K, num_queries=6, **sizes, **layers)
    return T.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> Any:
    layers = {"decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    decoder = T.DetrConfig(d_model=32, num_queries=6, **layers)
    config = T.MaskFormerConfig(
        backbone_config=swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=K
    )
    return T.MaskFormerForInstanceSegmentation(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "segformer": segformer,
    "upernet swin": lambda: upernet(swin(), 48),
    "upernet convnext": lambda: upernet(convnext(), 16),
    "dpt": dpt,
    "beit": lambda: T.BeitForSemanticSegmentation(T.BeitConfig(num_labels=K, **BEIT)),
    "data2vec": lambda: T.Data2VecVisionForSemanticSegmentation(T.Data2VecVisionConfig(num_labels=K, **BEIT)),
    "mobilevit": mobilevit,
    "mobilevit v2": mobilevit_v2,
    "mobilenet_v2": lambda: T.MobileNetV2ForSemanticSegmentation(
        T.MobileNetV2Config(num_labels=K, depth_multiplier=0.25)
    ),
    "mask2former": mask2former,
    "maskformer": maskformer,
    "eomt": lambda: T.EomtForUniversalSegmentation(T.EomtConfig(num_labels=K, **EOMT)),
}
MASKS = ("mask2former", "maskformer", "eomt")


class Saved:
    """A tiny random model in a folder; the model itself is as it was saved."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(sum(map(ord, name)))
        self.model, self.folder = FAMILIES[name]().eval(), folder
        with torch.no_grad():  # outputs that differ from pixel to pixel, where these fade to 0 as they come
            for key, value in self.model.named_parameters():
                if value.dim() > 1 and name.startswith(("dpt", "mobile")):
                    nn.init.kaiming_normal_(value)
                elif value.dim() > 1 and key.startswith(
                    ("mask_head", "class_predictor", "upscale_block", "decode_head")
                ):
                    value.mul_(3)
            if name.startswith("mobile"):  # and statistics of an image, so that no layer fades
                for module in self.model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = None
                self.model.train()(noise(4, 3, SIDE, SIDE))
                self.model.eval()
        self.model.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def of(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp("hf"))
        return made[name]

    return of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A SegFormer that a test may spoil."""
    torch.manual_seed(0)
    segformer().eval().save_pretrained(tmp_path)
    return tmp_path


def processor(name: str, **settings: Any) -> Any:
    """Without torchvision: the class on PIL, which has a name of its own since transformers 5."""
    kind = getattr(T, f"{name}ImageProcessorPil", None) or getattr(T, f"{name}ImageProcessor")
    try:
        return kind(**settings)
    except ImportError:  # transformers 5.20 refuses even that one
        pytest.skip(f"transformers {T.__version__} makes no {kind.__name__} without torchvision")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def pixels(height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def run(model: Any, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def independent_scores(output: Any) -> np.ndarray:
    """The formula of MaskFormer, pixel by pixel in float64."""
    classes = output.class_queries_logits.double().numpy()
    masks = output.masks_queries_logits.double().numpy()
    p = np.exp(classes) / np.exp(classes).sum(-1, keepdims=True)
    inside = 1 / (1 + np.exp(-masks))
    return sum(p[:, q, :-1, None, None] * inside[:, q, None] for q in range(p.shape[1]))


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_gives_what_the_model_gives(name: str, saved: Callable[[str], Saved]) -> None:
    loaded, image = hf(saved(name).folder), noise(2, 3, SIDE, SIDE)
    found = run(loaded.model, image)
    output = run(saved(name).model, image.flip(1) if name.startswith("mobilevit") else image)
    assert loaded.num_classes == K
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.shape[:2] == (2, K)
    assert loaded.outputs == ("scores" if name in MASKS else "logits")
    if name not in MASKS:
        assert_close(found, output.logits)
    elif name != "eomt":  # it enlarges masks: compared below
        assert_close(found, torch.tensor(independent_scores(output)).float())
    assert float(found.std()) > 0.01  # not all the same, which would compare equal to much


@pytest.mark.parametrize("name", FAMILIES)
def test_macs_are_counted_without_running(name: str, saved: Callable[[str], Saved]) -> None:
    model = hf(saved(name).folder).model
    assert isinstance(model, nn.Module)
    devices = []
    model.register_forward_pre_hook(lambda _, inputs: devices.append(inputs[0].device.type))
    macs = count_macs(model, (1, 3, SIDE, SIDE))
    assert devices == ["meta"]  # or it would have been run for want of that
    assert macs is not None
    assert macs > 500_000


@pytest.mark.filterwarnings("ignore")  # what tracing says of transformers' branches
@pytest.mark.parametrize("name", ["segformer", "dpt", "beit", "mask2former", "eomt"])
def test_is_traced(name: str, saved: Callable[[str], Saved]) -> None:
    """As exporters do: on one image, then compared on another."""
    model, image = hf(saved(name).folder).model, noise(1, 3, SIDE, SIDE)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.zeros_like(image), check_trace=False)
    assert_close(run(traced, image), run(model, image))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("data2vec", "eomt", "beit", "dpt")])
def test_any_size(name: str, saved: Callable[[str], Saved]) -> None:
    found = run(hf(saved(name).folder).model, noise(1, 3, 50, 100))
    assert found.isfinite().all()
    assert found.shape[2] < found.shape[3]


@pytest.mark.parametrize("size", [(32, 64), (64, 128), (160, 96), (32, 128)], ids=str)
def test_dpt_takes_multiples_of_its_patch(size: tuple[int, int], saved: Callable[[str], Saved]) -> None:
    found = run(hf(saved("dpt").folder).model, noise(1, 3, *size))
    assert found.shape == (1, K, *size)


def test_dpt_places_its_patches(saved: Callable[[str], Saved]) -> None:
    """Of a wide image, a change at the right end changes the right quarter most."""
    model, image = hf(saved("dpt").folder).model, noise(1, 3, 64, 256)
    other = image.clone()
    other[..., -32:] += 2
    change = (run(model, other) - run(model, image)).abs().sum((0, 1, 2))
    assert int(change.argmax()) >= 192


@pytest.mark.skipif(int(T.__version__.split(".")[0]) < 5, reason="BEiT takes its own size only before transformers 5")
def test_beit_takes_multiples_of_its_patch(saved: Callable[[str], Saved]) -> None:
    assert run(hf(saved("beit").folder).model, noise(1, 3, 32, 128)).shape == (1, K, 8, 32)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("dpt", (50, 100), r"dpt: input is 50x100, expected multiples of 32; give base.size = \(64, 96\)"),
        ("beit", (50, 100), r"beit: input is 50x100, expected multiples of 16; give base.size = \(48, 96\)"),
        ("data2vec", (32, 128), r"input is 32x128, this model takes 64x64 only; give base.size = \(64, 64\)"),
        ("eomt", (48, 96), r"input is 48x96, its shorter side has to be 64; give base.size = \(64, 128\)"),
        ("eomt", (96, 72), r"input is 96x72, its shorter side has to be 64; give base.size = \(85, 64\)"),
    ],
)
def test_other_sizes_are_refused(name: str, size: tuple[int, int], words: str, saved: Callable[[str], Saved]) -> None:
    with pytest.raises(ValueError, match=words):
        run(hf(saved(name).folder).model, noise(1, 3, *size))


class Square(nn.Module):
    """Stands for a transformer of a library version that knows square images only: any error, or a wrong grid."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error
        self.config = T.BeitConfig(num_labels=K, **VIT)

    def forward(self, image: Tensor, return_dict: bool) -> Any:
        if self.error and image.shape[-1] != SIDE:
            raise self.error
        return T.modeling_outputs.SemanticSegmenterOutput(logits=torch.zeros(1, K, 16, 16))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("size"), None], ids=str)
def test_a_square_model_says_its_size(error: Exception | None) -> None:
    model = HfModel(Square(error))
    assert run(model, noise(1, 3, SIDE, SIDE)).shape == (1, K, 16, 16)
    with pytest.raises(ValueError, match=r"beit: input is 32x128, this model takes 64x64 only; give base.size"):
        run(model, noise(1, 3, 32, 128))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate a shape of 8 bytes"),
        RuntimeError("Invalid buffer size: 40.00 GB"),
        MemoryError("no more"),
        RuntimeError("Expected all tensors to be on the same device"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_what_is_no_matter_of_size_is_told_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run(HfModel(Square(error)), noise(1, 3, 32, 128))
    assert caught.value is error


# ---- against transformers' post-processing


@pytest.mark.parametrize("name", ["Segformer", "Beit", "DPT"])
def test_labels_of_logits(name: str, saved: Callable[[str], Saved]) -> None:
    one, image = saved(name.lower()), noise(1, 3, SIDE, SIDE)
    (expected,) = processor(name).post_process_semantic_segmentation(run(one.model, image), [(SIDE, SIDE)])
    assert len(expected.unique()) > 1
    large = F.interpolate(run(hf(one.folder).model, image), (SIDE, SIDE), mode="bilinear", align_corners=False)
    assert torch.equal(large.argmax(1)[0], expected)


def test_scores_of_maskformer(saved: Callable[[str], Saved]) -> None:
    one, image = saved("maskformer"), noise(1, 3, SIDE, SIDE)
    expected = processor("MaskFormer").post_process_semantic_segmentation(run(one.model, image))
    found = run(hf(one.folder).model, image)
    assert torch.equal(found.argmax(1)[0], expected[0])


def test_scores_of_mask2former(saved: Callable[[str], Saved]) -> None:
    """Its processor enlarges the masks to 384x384 first; done here too, the scores are the same."""
    output = run(saved("mask2former").model, noise(1, 3, SIDE, SIDE))
    (expected,) = processor("Mask2Former").post_process_semantic_segmentation(output)
    found = semantic_scores(output.class_queries_logits, output.masks_queries_logits, (384, 384))
    assert torch.equal(found.argmax(1)[0], expected)


@pytest.mark.parametrize("chance", [0.0, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 100), (150, 64), (64, 192)], ids=str)
def test_windows_of_eomt(size: tuple[int, int], chance: float, tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    model = saved("eomt").model
    before = model.attn_mask_probs.clone()
    model.attn_mask_probs.fill_(chance)
    try:
        model.save_pretrained(tmp_path)
        theirs = processor("Eomt", do_split_image=True, size={"shortest_edge": SIDE, "longest_edge": None})
        theirs.save_pretrained(tmp_path)
        image = pixels(*size)
        inputs = theirs(images=image[0].numpy(), do_resize=False, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
    finally:
        model.attn_mask_probs.copy_(before)
    (labels,) = theirs.post_process_semantic_segmentation(output, [size])
    windows = torch.tensor(independent_scores(_enlarged(output)))
    starts = [int(start) for _, start, _ in output.patch_offsets]
    expected, cover = torch.zeros(K, *size).double(), torch.zeros(size)
    for window, start in zip(windows, starts, strict=True):
        part = (
            (slice(start, start + SIDE), slice(None))
            if size[0] > size[1]
            else (slice(None), slice(start, start + SIDE))
        )
        expected[(slice(None), *part)] += window
        cover[part] += 1
    found = FrozenBase(hf(tmp_path), config=BaseConfig(ratio=1.0))(image)
    assert_close(found[0], (expected / cover).float())
    assert (found.argmax(1)[0] == labels).float().mean() > 0.999  # sums in another order


def _enlarged(output: Any) -> Any:
    masks = F.interpolate(output.masks_queries_logits, (SIDE, SIDE), mode="bilinear")
    return type(output)(class_queries_logits=output.class_queries_logits, masks_queries_logits=masks)


def test_eomt_saved_amid_its_training_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["eomt"]()
    model.attn_mask_probs[1] = 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attn_mask_probs = \[1.0, 0.5\], expected 0 or 1"):
        hf(tmp_path)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 60))
def test_windows_cover_all_and_stay_inside(extra: int, side: int) -> None:
    length = side + extra - 1
    starts = window_starts(length, side)
    assert (starts[0], starts[-1]) == (0, length - side)
    assert all(0 <= b - a <= side for a, b in pairwise(starts))
    assert len(starts) == -(-length // side)


@pytest.mark.parametrize("queries", [1, 32, 33, 70])
def test_scores_at_a_size_do_not_depend_on_the_number_of_queries(queries: int) -> None:
    classes, masks = noise(2, queries, K + 1), noise(2, queries, 6, 8)
    whole = semantic_scores(classes, F.interpolate(masks, (12, 20), mode="bilinear"))
    assert_close(semantic_scores(classes, masks, (12, 20)), whole)


@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_scores_stay_finite(value: float) -> None:
    classes = torch.full((1, 3, K + 1), 0.0)
    classes[..., -1] = 1e4  # all queries say "no object"
    scores = semantic_scores(classes, torch.full((1, 3, 4, 4), value))
    assert scores.isfinite().all()
    assert (scores >= 0).all()


def test_mask2former_without_auxiliary_loss(tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    """Its own forward fails so: it keeps the states that the classes come from for the loss only."""
    one, image = saved("mask2former"), noise(1, 3, SIDE, SIDE)
    one.model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", use_auxiliary_loss=False)
    assert_close(run(hf(tmp_path).model, image), run(hf(one.folder).model, image))


# ---- normalisation


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Segformer", {}),
        ("Segformer", {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]}),
        ("Segformer", {"do_normalize": False}),
        ("Segformer", {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]}),
        ("Segformer", {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]}),
        ("Segformer", {"do_rescale": False, "do_normalize": False}),
        ("DPT", {}),
        ("Beit", {}),
        ("MobileViT", {}),
        ("MobileViT", {"do_flip_channel_order": False}),
        ("Mask2Former", {"size_divisor": 0}),
    ],
    ids=str,
)
def test_normalisation_is_the_processors(
    name: str, settings: dict[str, Any], tmp_path: Path, saved: Callable[[str], Saved]
) -> None:
    theirs, image, model = processor(name, **settings), pixels(), saved(name.lower()).model
    model.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    keep = {"do_resize": False, "do_center_crop": False} if name in ("Beit", "MobileViT") else {"do_resize": False}
    inputs = theirs(images=image[0].permute(1, 2, 0).numpy(), return_tensors="pt", **keep)["pixel_values"]
    output = run(model, inputs.float())
    expected = output.logits if hasattr(output, "logits") else torch.tensor(independent_scores(output)).float()
    found = FrozenBase(hf(tmp_path), config=BaseConfig(ratio=1.0))(image)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_processor_of_transformers_5(folder: Path) -> None:
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    edit(folder / "preprocessor_config.json", image_mean=[0.0] * 3, image_std=[1.0] * 3)
    edit(folder / "processor_config.json", image_processor=settings, processor_class="Any")
    loaded = hf(folder)
    assert loaded.mean == pytest.approx((0.1, 0.2, 0.3))
    assert loaded.std == pytest.approx((0.4, 0.5, 0.6))


def test_one_number_for_all_channels(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", image_mean=0.5, image_std=0.25)
    loaded = hf(folder)
    assert loaded.mean == pytest.approx((0.5, 0.5, 0.5))
    assert loaded.std == pytest.approx((0.25, 0.25, 0.25))


def test_no_processor_means_imagenet_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sparserefine"):
        loaded = hf(folder)
    assert (loaded.mean, loaded.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert "has no normalisation; using ImageNet's" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\], expected a number or 3"),
        ({"image_mean": "half"}, "image_mean = 'half', expected a number or 3"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean = .*, expected a number or 3"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std = \[0.5, 0.0, 0.5\], expected a number above 0 or 3"),
        ({"image_std": {"r": 1}}, "image_std = .*, expected a number above 0 or 3"),
        ({"rescale_factor": 0}, "rescale_factor = 0, expected a number above 0"),
        ({"rescale_factor": None}, "rescale_factor = None, expected a number above 0"),
    ],
    ids=str,
)
def test_strange_normalisation_is_refused(settings: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / "preprocessor_config.json", **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {words}"):
        hf(folder)


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    expected = run(hf(folder).model, noise(1, 3, SIDE, SIDE))
    segformer_half = T.SegformerForSemanticSegmentation.from_pretrained(folder).half()
    segformer_half.save_pretrained(folder)
    found = run(hf(folder).model, noise(1, 3, SIDE, SIDE))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    model = T.SegformerForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"1 of \d+ values of decode_head\.classifier\.bias are NaN or infinite"):
        hf(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "generation_config.json"])
def test_what_is_no_file_is_not_opened(name: str, folder: Path) -> None:
    """By whichever library: opening a FIFO would wait for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}: is a FIFO"):
        hf(folder)


# ---- classes


def named(folder: Path, names: list[str], **more: Any) -> Any:
    edit(folder / "config.json", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **more)
    return hf(folder).classes


def test_names_and_colours(folder: Path) -> None:
    assert hf(folder).classes is None  # LABEL_0 and so on
    found = named(folder, list("abcde"))
    assert found.names == tuple("abcde")
    assert found.palette == tuple(wheel(k) for k in range(K))
    colours = [[k, 2 * k, 255] for k in range(K)]
    assert named(folder, list("abcde"), palette=colours).palette == tuple(map(tuple, colours))


def test_a_class_without_a_name(folder: Path) -> None:
    names = {0: "a", 1: "b", 2: "c", 3: "d", 7: "e"}
    edit(folder / "config.json", id2label=names, label2id={n: i for i, n in names.items()})
    found = hf(folder).classes
    assert found is not None
    assert found.names == ("a", "b", "c", "d", "class 4")


@pytest.mark.parametrize("palette", [[[1, 2, 3]], [[1, 2, 300]] * K, [[1, 2]] * K, "blue", {"a": 1}], ids=str)
def test_strange_palette_is_left_out(palette: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert named(folder, list("abcde"), palette=palette).palette == tuple(wheel(k) for k in range(K))
    assert "palette is not 5 colours" in caplog.text


def test_palette_of_the_processor(folder: Path) -> None:
    colours = [[k, 0, 0] for k in range(K)]
    edit(folder / "preprocessor_config.json", palette=colours, image_mean=0.5, image_std=0.5)
    assert named(folder, list("abcde")).palette == tuple(map(tuple, colours))


def test_cityscapes_colours_in_any_order_and_case(tmp_path: Path) -> None:
    segformer(num_labels=19).save_pretrained(tmp_path)
    assert named(tmp_path, list(CITYSCAPES.names)) == CITYSCAPES
    found = named(tmp_path, [name.title() for name in reversed(CITYSCAPES.names)])
    assert found.names[0] == "Bicycle"
    assert found.palette == CITYSCAPES.palette[::-1]
    assert dict(zip(CITYSCAPES.names, CITYSCAPES.palette, strict=True))["car"] == (0, 0, 142)


# ---- what is refused


def test_missing_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["decode_head.classifier.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of Segformer.*decode_head\.classifier\.weight.*random"):
        hf(folder)


def test_a_backbone_alone_is_refused(folder: Path) -> None:
    """A checkpoint of the encoder, with a configuration that claims the head."""
    model = T.SegformerForSemanticSegmentation.from_pretrained(folder)
    model.segformer.save_pretrained(folder)
    edit(folder / "config.json", architectures=["SegformerForSemanticSegmentation"])
    with pytest.raises(ValueError, match=r"lacks \d+ weights of Segformer.*decode_head.*another task"):
        hf(folder)


def test_a_head_of_another_class_count_is_refused(folder: Path) -> None:
    edit(folder / "config.json", id2label=dict(enumerate("abc")), label2id={c: i for i, c in enumerate("abc")})
    with pytest.raises(ValueError, match=r"2 weights have other shapes .* decode_head\.classifier\.bias"):
        hf(folder)


def test_an_auxiliary_head_may_be_missing(tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    one, image = saved("upernet swin"), noise(1, 3, SIDE, SIDE)
    one.model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("auxiliary_head")}
    save_file(tensors, path, metadata={"format": "pt"})
    assert_close(run(hf(tmp_path).model, image), run(hf(one.folder).model, image))
    first, second = (FrozenBase(hf(tmp_path), config=BaseConfig(ratio=1.0)) for _ in range(2))
    assert first.identity == second.identity  # transformers draws that head at random


@pytest.mark.parametrize("name", ["upernet swin", "dpt", "beit", "data2vec"])
def test_an_auxiliary_head_is_dropped(name: str, saved: Callable[[str], Saved]) -> None:
    assert any(key.startswith("auxiliary_head") for key in saved(name).model.state_dict())
    model = hf(saved(name).folder).model
    assert isinstance(model, nn.Module)
    assert not any("auxiliary_head" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("architectures", "words"),
    [
        (
            ["SegformerForImageClassification"],
            r"architectures = \['SegformerForImageClassification'\]; expected one of .*Bei",
        ),
        (["OneFormerForUniversalSegmentation"], "expected one of .*Mask2FormerForUniversalSegmentation"),
        (["AutoModelForSemanticSegmentation"], "expected one of .*UperNetForSemanticSegmentation"),
        (["DetrForSegmentation"], "expected one of .*EomtForUniversalSegmentation"),
        (["Sapiens2ForSemanticSegmentation"], r"\['Sapiens2ForSemanticSegmentation'\]; expected one of .*Segformer"),
        ([], r"architectures = \[\]; expected one of"),
        (None, "architectures = None; expected one of"),
        ("SegformerForSemanticSegmentation", "expected one of"),
        ([3], "expected one of"),
    ],
    ids=str,
)
def test_other_tasks_are_refused(architectures: Any, words: str, folder: Path) -> None:
    edit(folder / "config.json", architectures=architectures)
    with pytest.raises(ValueError, match=words):
        hf(folder)


def test_a_model_that_this_transformers_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_module, "_LOGITS", ("NewForSemanticSegmentation",))
    edit(folder / "config.json", architectures=["NewForSemanticSegmentation"])
    with pytest.raises(ValueError, match=r"which transformers \d.* does not have; expected one of New"):
        hf(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_broken_configuration(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not readable as JSON|holds )"):
        hf(folder)


def test_configuration_that_makes_no_model(folder: Path) -> None:
    edit(folder / "config.json", hidden_sizes=[8, 7, 16, 16], num_attention_heads=[1, 2, 2, 2], depths="many")
    with pytest.raises(ValueError, match=r"cannot load a SegformerForSemanticSegmentation from it"):
        hf(folder)


@pytest.mark.parametrize("content", [b"", b"weights", None], ids=["empty", "text", "cut short"])
def test_broken_weights(content: bytes | None, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(
        ValueError, match=r"transformers cannot load a SegformerForSemanticSegmentation from it"
    ) as error:
        hf(folder)
    assert "\n" not in str(error.value)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in it; expected model\.safetensors or pytorch_model\.bin"):
        hf(folder)


def test_other_channels_are_refused(tmp_path: Path) -> None:
    segformer(num_channels=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 4 channels, expected 3"):
        hf(tmp_path)


def test_state_dict_without_code_is_read(folder: Path) -> None:
    expected = run(hf(folder).model, noise(1, 3, SIDE, SIDE))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_close(run(hf(folder).model, noise(1, 3, SIDE, SIDE)), expected)


def test_pickled_code_is_not_run(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    torch.save({"weight": Harm()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load a"):
        hf(folder)
    assert not (folder / "ran").exists()


def test_attention_code_of_a_part_is_not_fetched(tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    saved("upernet swin").model.save_pretrained(tmp_path)
    backbone = json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    edit(tmp_path / "config.json", backbone_config={**backbone, "attn_implementation": "someone/kernel"})
    model: Any = hf(tmp_path).model
    assert model.config.backbone_config._attn_implementation != "someone/kernel"


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    edit(folder / "config.json", attn_implementation="someone/kernel")
    assert run(hf(folder).model, noise(1, 3, SIDE, SIDE)).shape == (1, K, 16, 16)
    edit(folder / "config.json", auto_map={"AutoModel": "own.Model", "AutoConfig": "own.Config"})
    with pytest.raises(ValueError, match=r"config\.json: auto_map = .* never run; remove this line"):
        hf(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone_config": {"auto_map": {"AutoBackbone": "own.Net"}}}, "auto_map = .*own.Net"),
        ({"decoders": [{"auto_map": {"AutoBackbone": "own.Net"}}]}, "auto_map = .*own.Net"),
        ({"backbone_kwargs": {"trust_remote_code": True}}, "backbone_kwargs = .*trust_remote_code.*backbone_config"),
        ({"backbone": "someone/net", "backbone_config": None}, "backbone = 'someone/net' is not in the checkpoint"),
        (
            {"backbone_config": {"backbone": "hf-hub:someone/net"}},
            "backbone = 'hf-hub:someone/net' is not in the checkpoint",
        ),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone = True, expected none; save the model with its"),
    ],
    ids=str,
)
def test_a_backbone_from_elsewhere_is_refused(
    settings: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers comes to see it."""
    monkeypatch.setattr(T.SegformerForSemanticSegmentation, "from_pretrained", None)
    edit(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=rf"config\.json: {words}"):
        hf(folder)


def test_a_backbone_of_its_own_is_not_refused(tmp_path: Path) -> None:
    """What transformers 4 writes where there is nothing to tell."""
    model = mask2former()
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", backbone=None, backbone_kwargs={}, use_pretrained_backbone=False, auto_map=None)
    assert hf(tmp_path).num_classes == K


def test_identity_is_of_the_settings_too(tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    """Settings that change the outputs and no weight: of the processor, of the configuration, of EoMT's attention."""

    def identity(folder: Path) -> str:
        return FrozenBase(hf(folder), config=BaseConfig(ratio=1.0, mean=(0, 0, 0), std=(1, 1, 1))).identity

    model = segformer()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    plain = identity(tmp_path / "a")
    assert identity(tmp_path / "b") == plain
    edit(tmp_path / "b" / "preprocessor_config.json", do_flip_channel_order=True, image_mean=0.5, image_std=0.5)
    flipped = identity(tmp_path / "b")
    edit(tmp_path / "b" / "config.json", hidden_act="relu")
    saved("eomt").model.save_pretrained(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["attn_mask_probs"] = 1 - tensors["attn_mask_probs"].round()
    save_file(tensors, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    found = [plain, flipped, identity(tmp_path / "b"), identity(saved("eomt").folder), identity(tmp_path / "c")]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
        hf(name)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json in it; expected a folder written by .*save_pretrained"):
        hf(tmp_path)


@pytest.mark.parametrize("name", ["someone/something", "bad name/?"])
def test_hub_id_offline(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder, and downloading it from the hub failed") as error:
        hf(name)
    assert "\n" not in str(error.value)


def test_hub_id(monkeypatch: pytest.MonkeyPatch, saved: Callable[[str], Saved]) -> None:
    wanted: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/segformer"
        wanted.append(allow_patterns)
        return str(saved("segformer").folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hf("someone/segformer").num_classes == K
    assert len(wanted) == 1  # safetensors were there: no .bin is fetched
    assert not any("bin" in pattern or pattern.endswith(".py") for pattern in wanted[0])


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sparserefine\[hf\]'"):
        hf(folder)


def test_by_name(folder: Path) -> None:
    base = load_base(BaseConfig(f"hf:{folder}", ratio=0.5))
    assert base.num_classes == K
    assert base(pixels()).shape == (1, K, 8, 8)
    assert base.identity == load_base(BaseConfig(f"hf:{folder}", ratio=0.5)).identity


# ---- the paper's models


@pytest.mark.parametrize(
    ("name", "outputs", "millions", "gmacs_low", "gmacs_high"),
    [
        ("segformer_b5", "logits", 84.61, 240, 1446),
        ("mask2former_t", "scores", 47.41, 136, 534),
        ("mask2former_l", "scores", 215.51, 504, 1942),
    ],
)
def test_models_of_the_paper(
    name: str, outputs: str, millions: float, gmacs_low: int, gmacs_high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(T.PreTrainedModel, "init_weights", lambda self: None)  # slow, even for weights without values
    with torch.device("meta"):
        loaded = getattr(hf_module, name)(19)
    assert (loaded.num_classes, loaded.outputs, loaded.classes) == (19, outputs, None)
    assert (loaded.mean, loaded.std) == (IMAGENET_MEAN, IMAGENET_STD)
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=0.01)
    assert round((count_macs(loaded.model, (1, 3, 512, 1024)) or 0) / 1e9) == gmacs_low
    assert round((count_macs(loaded.model, (1, 3, 1024, 2048)) or 0) / 1e9) == gmacs_high
