"""Writes what mmsegmentation 1.2.2 computes into ``tests/data/parity``; runs in an environment of its own.

``make parity`` makes that environment and runs this. The models are those of mmsegmentation's published configurations,
with BN in place of SyncBN; their weights and inputs come from ``weights.py``, so that only names, shapes and logits are
stored. They run in float64, whose rounding is nothing beside that of the float32 which they judge. mmsegmentation draws
the bases of SegNeXt's matrix decomposition anew at every call; here they are fixed, under the name that it gives them
itself where they are (``rand_init=False``).
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from weights import tensor, uniform

DATA = Path(__file__).resolve().parents[1] / "data" / "parity"
SIZES = ((2, 3, 64, 64), (1, 3, 75, 53))
"""A batch of a size that every stride divides, and a size that none does."""

BN = {"type": "BN", "requires_grad": True}
GN = {"type": "GN", "num_groups": 32, "requires_grad": True}


def stage(modules: int, block: str, blocks: int, channels: tuple[int, ...]) -> dict[str, Any]:
    """One stage of HRNet: ``blocks`` blocks in every branch of every module."""
    n = len(channels)
    return {
        "num_modules": modules,
        "num_branches": n,
        "block": block,
        "num_blocks": (blocks,) * n,
        "num_channels": channels,
    }


def hrnet_w48() -> dict[str, Any]:
    """``configs/hrnet/fcn_hr48_4xb2-80k_cityscapes-512x1024.py``."""
    channels = (48, 96, 192, 384)
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "HRNet",
            "norm_cfg": BN,
            "norm_eval": False,
            "extra": {
                "stage1": stage(1, "BOTTLENECK", 4, (64,)),
                "stage2": stage(1, "BASIC", 4, channels[:2]),
                "stage3": stage(4, "BASIC", 4, channels[:3]),
                "stage4": stage(3, "BASIC", 4, channels),
            },
        },
        "decode_head": {
            "type": "FCNHead",
            "in_channels": list(channels),
            "in_index": (0, 1, 2, 3),
            "channels": sum(channels),
            "input_transform": "resize_concat",
            "kernel_size": 1,
            "num_convs": 1,
            "concat_input": False,
            "dropout_ratio": -1,
            "num_classes": 19,
            "norm_cfg": BN,
            "align_corners": False,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


def segnext(dims: tuple[int, ...], depths: tuple[int, ...], channels: int) -> dict[str, Any]:
    """``configs/segnext/segnext_mscan-{t,s,b,l}_1xb16-adamw-160k_ade20k-512x512.py``, for 19 classes."""
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "MSCAN",
            "embed_dims": list(dims),
            "mlp_ratios": [8, 8, 4, 4],
            "drop_rate": 0.0,
            "drop_path_rate": 0.1,
            "depths": list(depths),
            "attention_kernel_sizes": [5, [1, 7], [1, 11], [1, 21]],
            "attention_kernel_paddings": [2, [0, 3], [0, 5], [0, 10]],
            "act_cfg": {"type": "GELU"},
            "norm_cfg": BN,
        },
        "decode_head": {
            "type": "LightHamHead",
            "in_channels": list(dims[1:]),
            "in_index": [1, 2, 3],
            "channels": channels,
            "ham_channels": channels,
            "dropout_ratio": 0.1,
            "num_classes": 19,
            "norm_cfg": GN,
            "align_corners": False,
            "ham_kwargs": {
                "MD_S": 1,
                "MD_R": 16,
                "train_steps": 6,
                "eval_steps": 7,
                "inv_t": 100,
                "rand_init": False,
            },
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


MODELS = {
    "hrnet_w48": hrnet_w48(),
    "segnext_t": segnext((32, 64, 160, 256), (3, 3, 5, 2), 256),
    "segnext_s": segnext((64, 128, 320, 512), (2, 2, 4, 2), 256),
    "segnext_b": segnext((64, 128, 320, 512), (3, 3, 12, 3), 512),
    "segnext_l": segnext((64, 128, 320, 512), (3, 5, 27, 3), 1024),
}


def without_compiled_operators() -> None:
    """mmcv-lite has none, and mmsegmentation imports them all; the models here call none of them."""

    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    sys.modules["mmcv._ext"] = Absent("mmcv._ext")


def build(name: str) -> nn.Module:
    """mmsegmentation's model of that name with the weights of the rule, in float64 and evaluation mode."""
    from mmseg.registry import MODELS as REGISTRY

    model = REGISTRY.build(MODELS[name])
    if name.startswith("segnext"):
        ham = model.decode_head.hamburger.ham
        ham.register_buffer("bases", torch.zeros(1, model.decode_head.ham_channels, ham.R))
    state = {key: torch.from_numpy(tensor(key, value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.double().eval()


def logits(model: nn.Module, image: Tensor) -> Tensor:
    """At the head's own size: mmsegmentation's resize to the image's size comes after this."""
    return model.decode_head(model.extract_feat(image))


def weakest(model: nn.Module, image: Tensor) -> tuple[float, str]:
    """How far, relative to their spread, the logits move with the tensor that moves them least, and its name.

    To first order, for changes as large as the tensor itself: what a tensor in the wrong place would do.
    """
    parts = dict(model.named_parameters())  # a normalisation's running statistics move them as its weight and bias do
    parts |= {key: value.requires_grad_() for key, value in model.named_buffers() if key.endswith("bases")}
    y = logits(model, image)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    (y * direction).sum().backward()
    spread = y.detach().std() * y.numel() ** 0.5
    return min((float((value.grad * value.detach()).norm() / spread), key) for key, value in parts.items())


def main() -> None:
    """Writes a file for each model."""
    from mmseg.utils import register_all_modules

    register_all_modules()
    DATA.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        model = build(name)
        images = [torch.from_numpy(uniform("image", size, -2, 2)) for size in SIZES]
        with torch.no_grad():
            outputs = [logits(model, image.double()) for image in images]
            singles = [logits(model.float(), image) for image in images]
        noise = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(singles, outputs, strict=True))
        least, key = weakest(model.double(), images[1].double())
        largest, spread = outputs[0].abs().max(), outputs[0].std()
        print(f"{name}: largest logit {largest:.2f}, spread {spread:.2f}; float32 is {noise:.1e} of the largest off")
        print(f"    {key} moves the logits least: {least:.1e} of their spread")
        assert noise < 2e-6, "the bound of test_parity.py leaves no room for other machines"
        assert least > 1e-3, "this tensor could be in the wrong place and nobody would see it"
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        arrays = {f"logits{i}": output.float().numpy() for i, output in enumerate(outputs)}
        arrays |= {f"size{i}": np.array(size) for i, size in enumerate(SIZES)}
        np.savez_compressed(DATA / f"{name}.npz", shapes=np.array(json.dumps(shapes)), **arrays)


if __name__ == "__main__":
    without_compiled_operators()
    main()
