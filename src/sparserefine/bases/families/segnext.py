"""SegNeXt (Guo et al., NeurIPS 2022, arXiv 2209.08575): convolutional attention, and a matrix factorisation head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.bases.checkpoint import load_renamed, read_checkpoint
from sparserefine.bases.loaded import LoadedModel

Size = Literal["t", "s", "b", "l"]

STRIPS = (7, 11, 21)
"""Lengths [px] of the attention's pairs of strip convolutions."""

MLP_RATIOS = (8, 8, 4, 4)
"""Hidden channels of the feed-forward part relative to the block's, stage by stage, in every size."""


@dataclass(frozen=True)
class _Widths:
    """What differs between the sizes: channels and blocks of the four stages, channels of the head."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    head: int


_WIDTHS: dict[Size, _Widths] = {
    "t": _Widths((32, 64, 160, 256), (3, 3, 5, 2), 256),
    "s": _Widths((64, 128, 320, 512), (2, 2, 4, 2), 256),
    "b": _Widths((64, 128, 320, 512), (3, 3, 12, 3), 512),
    "l": _Widths((64, 128, 320, 512), (3, 5, 27, 3), 1024),
}


def _depthwise(channels: int, kernel: tuple[int, int]) -> nn.Conv2d:
    """Depthwise convolution that keeps the size; height and width of ``kernel`` are odd."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels)


def _halve(c_in: int, c_out: int) -> list[nn.Module]:
    """Overlapping patch embedding: ``[B, c_in, h, w]`` -> ``[B, c_out, ceil(h / 2), ceil(w / 2)]``."""
    return [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out)]


class StripAttention(nn.Module):
    """Multi-scale convolutional attention: depthwise strip convolutions give each value its weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local = _depthwise(channels, (5, 5))
        self.strips = nn.ModuleList(
            nn.Sequential(_depthwise(channels, (1, n)), _depthwise(channels, (n, 1))) for n in STRIPS
        )
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same shape."""
        local = self.local(x)
        attention = local
        for strip in self.strips:
            attention = attention + strip(local)
        weight: Tensor = self.mix(attention)
        return weight * x


class Block(nn.Module):
    """Attention, then a feed-forward part with a depthwise 3x3; both residual and scaled per channel.

    Stochastic depth is left out: it does nothing in evaluation.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.GELU(), StripAttention(channels), nn.Conv2d(channels, channels, 1)
        )
        self.scale1 = nn.Parameter(torch.full((channels,), 1e-2))
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), _depthwise(hidden, (3, 3)), nn.GELU(), nn.Conv2d(hidden, channels, 1)
        )
        self.scale2 = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same shape."""
        y: Tensor = self.norm1(x)
        x = x + self.scale1[:, None, None] * (self.attention(y) + y)
        y = self.mlp(self.norm2(x))
        return x + self.scale2[:, None, None] * y


class Stage(nn.Module):
    """Patch embedding, blocks, layer norm over the channels."""

    def __init__(self, embed: nn.Module, channels: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.Sequential(*(Block(channels, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, c_in, H, W]`` -> ``[B, C, h, w]``, smaller by the embedding's stride."""
        x = self.blocks(self.embed(x))
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class NMF(nn.Module):
    """Low-rank part of a feature map, by non-negative matrix factorisation (Geng et al. 2021, arXiv 2109.04553).

    ``x ~ bases @ coef^T`` with x ``[B, D, N]``, bases ``[B, D, R]`` and coef ``[B, N, R]``, N = h*w, all >= 0, found by
    a fixed number of multiplicative updates (Lee and Seung 2001).

    The updates start from ``bases [1, D, R]``, the same for every image, call, instance and machine. The published code
    draws new ones at each call, so that two calls on one image differ. A frozen base must be deterministic: stored
    logits have to equal computed ones. The distribution is the published one: uniform in 0..1, then columns scaled to
    length 1. The bases are not in the state dict, as no published file has them; to set others, use
    ``nmf.bases.copy_(...)``.

    Args:
        channels: D.
        rank: R.
        steps: number of updates of both factors; the coefficients get one more.
    """

    bases: Tensor

    def __init__(self, channels: int, rank: int = 16, steps: int = 7) -> None:
        super().__init__()
        self.steps = steps
        # NumPy guarantees that this generator's numbers never change, which it does not for the newer ones.
        draw = np.random.RandomState(0).random_sample((channels, rank))
        draw /= np.sqrt((draw * draw).sum(0))
        self.register_buffer("bases", torch.tensor(draw[None], dtype=torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``float [B, D, h, w]``, >= 0 -> the same shape and dtype."""
        b, d, h, w = x.shape
        # Half precision overflows in sums over thousands of pixels and underflows at the epsilon of 1e-6.
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        rows = x.permute(0, 2, 3, 1).reshape(b, h * w, d).to(dtype)
        bases = self.bases.to(dtype).expand(b, -1, -1)
        coef = F.softmax(rows @ bases, dim=-1)
        for _ in range(self.steps):
            coef = _update(coef, rows @ bases, bases)
            bases = _update(bases, rows.transpose(1, 2) @ coef, coef)
        coef = _update(coef, rows @ bases, bases)
        low_rank = coef @ bases.transpose(1, 2)
        return low_rank.to(x.dtype).view(b, h, w, d).permute(0, 3, 1, 2)


def _update(factor: Tensor, projection: Tensor, other: Tensor) -> Tensor:
    """Multiplicative update of one factor; ``projection`` is the data times the other one."""
    return factor * projection / (factor @ (other.transpose(1, 2) @ other) + 1e-6)


class HamHead(nn.Module):
    """The light "Hamburger" head: 1x1 convolutions around an NMF, on the stages of strides 8, 16 and 32.

    Args:
        c_in: sum of the channels of the three inputs.
        channels: of all layers inside.
        num_classes: K.
    """

    def __init__(self, c_in: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Conv2d(c_in, channels, 1, bias=False), nn.GroupNorm(32, channels), nn.ReLU(inplace=True)
        )
        self.enter = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True))
        self.nmf = NMF(channels)
        self.leave = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.align = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.GroupNorm(32, channels), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features ``[B, C_i, h_i, w_i]``, largest first -> logits ``[B, K, h_0, w_0]``."""
        size = features[0].shape[-2:]
        same = [F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features]
        x = self.squeeze(torch.cat(same, dim=1))
        x = F.relu(x + self.leave(self.nmf(self.enter(x))))
        logits: Tensor = self.classifier(self.align(x))
        return logits


class SegNeXt(nn.Module):
    """MSCAN and the light Hamburger head, as mmsegmentation builds them; evaluation only.

    Args:
        size: ``t``, ``s``, ``b`` or ``l``.
        num_classes: K.
    """

    def __init__(self, size: Size, num_classes: int) -> None:
        super().__init__()
        if size not in _WIDTHS:
            raise ValueError(f"size = {size!r}, expected one of {', '.join(_WIDTHS)}")
        widths = _WIDTHS[size]
        first, *_ = widths.channels
        embeds = [nn.Sequential(*_halve(3, first // 2), nn.GELU(), *_halve(first // 2, first))]
        embeds += [nn.Sequential(*_halve(a, b)) for a, b in zip(widths.channels[:-1], widths.channels[1:], strict=True)]
        self.stages = nn.ModuleList(
            Stage(embed, c, c * ratio, depth)
            for embed, c, ratio, depth in zip(embeds, widths.channels, MLP_RATIOS, widths.depths, strict=True)
        )
        self.head = HamHead(sum(widths.channels[1:]), widths.head, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``float [B, 3, H, W]``, normalised -> logits ``[B, K, ceil(H / 8), ceil(W / 8)]``; any H and W."""
        x = image.contiguous(memory_format=torch.channels_last)  # 1.2 to 1.4 times faster on the CPU
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        logits: Tensor = self.head(features[1:])
        return logits.contiguous()


def segnext(size: Size, num_classes: int) -> SegNeXt:
    """SegNeXt of that size with random weights, in evaluation mode."""
    return SegNeXt(size, num_classes).eval()


def segnext_l(num_classes: int) -> SegNeXt:
    """SegNeXt-L, the size that the SparseRefine paper uses."""
    return segnext("l", num_classes)


def _rules() -> list[tuple[str, str]]:
    """Rules from mmsegmentation's names to ours (:func:`load_renamed`); the authors' files repeat ``dwconv``."""
    strips = {
        rf"attn\.spatial_gating_unit\.conv{i}_{j + 1}": f"attention.2.strips.{i}.{j}"
        for i in range(len(STRIPS))
        for j in (0, 1)
    }
    block = {
        r"norm1": "norm1",
        r"attn\.proj_1": "attention.0",
        r"attn\.spatial_gating_unit\.conv0": "attention.2.local",
        **strips,
        r"attn\.spatial_gating_unit\.conv3": "attention.2.mix",
        r"attn\.proj_2": "attention.3",
        r"layer_scale_1": "scale1",
        r"norm2": "norm2",
        r"mlp\.fc1": "mlp.0",
        r"mlp\.dwconv(?:\.dwconv)?": "mlp.1",
        r"mlp\.fc2": "mlp.3",
        r"layer_scale_2": "scale2",
    }
    renamed = {
        r"backbone\.patch_embed1\.proj": "stages.0.embed",
        r"decode_head\.squeeze\.conv": "head.squeeze.0",
        r"decode_head\.squeeze\.gn": "head.squeeze.1",
        r"decode_head\.hamburger\.ham_in\.conv": "head.enter.0",
        r"decode_head\.hamburger\.ham_out\.conv": "head.leave.0",
        r"decode_head\.hamburger\.ham_out\.gn": "head.leave.1",
        r"decode_head\.align\.conv": "head.align.0",
        r"decode_head\.align\.gn": "head.align.1",
        r"decode_head\.conv_seg": "head.classifier",
    }
    for i in range(4):
        renamed[rf"backbone\.norm{i + 1}"] = f"stages.{i}.norm"
    for i in (1, 2, 3):
        renamed[rf"backbone\.patch_embed{i + 1}\.proj"] = f"stages.{i}.embed.0"
        renamed[rf"backbone\.patch_embed{i + 1}\.norm"] = f"stages.{i}.embed.1"
    rules = [(rf"{a}(\..+)", rf"{b}\1") for a, b in renamed.items()]
    for i in range(4):
        prefix, ours = rf"backbone\.block{i + 1}\.(\d+)\.", rf"stages.{i}.blocks.\1."
        rules += [(rf"{prefix}{a}(|\..+)", rf"{ours}{b}\2") for a, b in block.items()]
    return rules


_CLASSIFIERS = {"decode_head.conv_seg.weight": _rules(), "head.classifier.weight": [(r"(.+)", r"\1")]}
"""Name of the classifier's weight in mmsegmentation's files and in ours, with the rules to rename the tensors."""


def _depths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks per stage in a file with mmsegmentation's or our names; () if it has none."""
    matches = (re.match(r"(?:backbone\.block|stages\.)(\d)\.(?:blocks\.)?(\d+)\.", key) for key in tensors)
    per_stage = Counter(stage for stage, _ in {match.groups() for match in matches if match})
    return tuple(per_stage[stage] for stage in sorted(per_stage))


def load_segnext(size: Size, path: str | Path) -> LoadedModel:
    """Loads SegNeXt with the weights of a file, in evaluation mode.

    Args:
        size: ``t``, ``s``, ``b`` or ``l``.
        path: a checkpoint of mmsegmentation (``segnext_mscan-*``) or of the paper's authors, or a state dict of
            :class:`SegNeXt` (``.pth`` or ``.safetensors``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is not safe to read, or is of another size or model.
    """
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.tensors
    depths = _depths(tensors)
    classifier = next((name for name in _CLASSIFIERS if name in tensors and tensors[name].dim()), None)
    if classifier is None or not depths:
        raise ValueError(
            f"{path}: not a SegNeXt, it lacks blocks or has neither of {', '.join(_CLASSIFIERS)}; "
            f"it has {len(tensors)} tensors, such as {', '.join(list(tensors)[:3])}"
        )
    found = next((name for name, widths in _WIDTHS.items() if widths.depths == depths), None)
    if found not in (None, size):
        raise ValueError(
            f"{path}: has the blocks of segnext_{found}, expected those of segnext_{size}; load it as segnext_{found}"
        )
    num_classes = len(tensors[classifier])
    model = segnext(size, num_classes)
    load_renamed(model, tensors, _CLASSIFIERS[classifier], ("auxiliary_head.",), str(path))
    return LoadedModel(model, num_classes, checkpoint.classes_of(num_classes, path), channels=3)
