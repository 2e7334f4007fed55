"""HRNet-W48 (Wang et al. 2020, arXiv 1908.07919) with a fully convolutional head, as mmsegmentation's ``fcn_hr48``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.bases.checkpoint import load_renamed, read_checkpoint
from sparserefine.bases.loaded import LoadedModel

WIDTHS = (48, 96, 192, 384)
"""Channels of the branches, at strides 4, 8, 16 and 32."""


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, *, relu: bool = True) -> list[nn.Module]:
    """Convolution, batch normalisation, ReLU; ``ceil(size / stride)``."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out), *([nn.ReLU(inplace=True)] if relu else [])]


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``, ``[B, C_in, h, w]`` -> ``[B, C, h, w]``."""

    def __init__(self, body: Sequence[nn.Module], shortcut: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.body(x)
        y += self.shortcut(x)
        return F.relu_(y)


def _basic(channels: int) -> Residual:
    return Residual([*_conv(channels, channels), *_conv(channels, channels, relu=False)])


def _bottleneck(c_in: int, inner: int) -> Residual:
    """Bottleneck block with ``4 * inner`` output channels."""
    body = [*_conv(c_in, inner, 1), *_conv(inner, inner), *_conv(inner, 4 * inner, 1, relu=False)]
    return Residual(body, _conv(c_in, 4 * inner, 1, relu=False) if c_in != 4 * inner else ())


class Exchange(nn.Module):
    """Runs blocks in each branch; each then gets the sum of all branches, resampled to its size (section 3.1).

    A list of ``[B, WIDTHS[i], h_i, w_i]`` -> a list of the same shapes.
    """

    def __init__(self, branches: int, blocks: int = 4) -> None:
        super().__init__()
        widths = WIDTHS[:branches]
        self.branches = nn.ModuleList(nn.Sequential(*(_basic(c) for _ in range(blocks))) for c in widths)
        self.fuse = nn.ModuleList(nn.ModuleList(_path(j, i) for j in range(branches)) for i in range(branches))

    def forward(self, features: list[Tensor]) -> list[Tensor]:  # noqa: D102
        x = [branch(f) for branch, f in zip(self.branches, features, strict=True)]
        return [F.relu(self._fused(i, x)) for i in range(len(x))]

    def _fused(self, i: int, x: list[Tensor]) -> Tensor:
        """New features of branch ``i``: the sum over all branches ``x``, each through its path to ``i``."""
        paths = self.fuse[i]
        assert isinstance(paths, nn.ModuleList)  # for mypy
        y: Tensor = paths[0](x[0])
        for j in range(1, len(x)):
            part = paths[j](x[j])
            if j > i:  # up by the power of two, then to this branch's size: differs for odd sizes
                part = _resized(part, [n * 2 ** (j - i) for n in part.shape[2:]])
                part = _resized(part, x[i].shape[2:])
            y = y + part
        return y


def _path(j: int, i: int) -> nn.Sequential:
    """From branch ``j`` to ``i``: identity, a 1x1 convolution to be upsampled, or stride-2 ones; no ReLU at the end."""
    if j > i:
        return nn.Sequential(*_conv(WIDTHS[j], WIDTHS[i], 1, relu=False))
    steps = [_conv(WIDTHS[j], WIDTHS[i] if k == i - 1 else WIDTHS[j], stride=2, relu=k < i - 1) for k in range(j, i)]
    return nn.Sequential(*(nn.Sequential(*step) for step in steps))


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return (
        x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    )


class HRNet(nn.Module):
    """HRNetV2-W48: four branches of strides 4 to 32 side by side, all brought to stride 4 and classified.

    65.9 million parameters; 187 GMACs for 512x1024 pixels.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 64, stride=2), *_conv(64, 64, stride=2))
        self.stage1 = nn.Sequential(_bottleneck(64, 64), *(_bottleneck(256, 64) for _ in range(3)))
        # These start the branches: the first two from stage 1's 256 channels, later ones from the last branch.
        self.first = nn.Sequential(*_conv(256, WIDTHS[0]))
        self.grow = nn.ModuleList(
            nn.Sequential(*_conv(a, b, stride=2)) for a, b in zip((256, *WIDTHS[1:]), WIDTHS[1:], strict=False)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Exchange(branches) for _ in range(modules)))
            for branches, modules in ((2, 1), (3, 4), (4, 3))
        )
        c = sum(WIDTHS)
        self.head = nn.Sequential(*_conv(c, c, 1), nn.Conv2d(c, num_classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        """``float [B, 3, H, W]``, normalised -> logits ``[B, K, ceil(H / 4), ceil(W / 4)]``; any H and W."""
        x = image.contiguous(memory_format=torch.channels_last)  # a tenth faster on the CPU
        x = self.stage1(self.stem(x))
        features = [self.first(x)]
        for grow, stage in zip(self.grow, self.stages, strict=True):
            features.append(grow(x))
            features = stage(features)
            x = features[-1]
        size = features[0].shape[2:]
        logits: Tensor = self.head(torch.cat([_resized(f, size) for f in features], dim=1))
        return logits.contiguous()


def hrnet_w48(num_classes: int) -> HRNet:
    """HRNet-W48 with random weights, in evaluation mode."""
    return HRNet(num_classes).eval()


def _rules() -> list[tuple[str, str]]:
    """Rules from mmsegmentation's names to ours; see :func:`load_renamed`."""
    inside = {f"{kind}{n + 1}": f"body.{3 * n + k}" for n in range(3) for k, kind in enumerate(("conv", "bn"))}
    inside["downsample"] = "shortcut"
    renamed = {
        r"backbone\.conv1": "stem.0",
        r"backbone\.bn1": "stem.1",
        r"backbone\.conv2": "stem.3",
        r"backbone\.bn2": "stem.4",
        r"backbone\.transition1\.0": "first",
        r"decode_head\.convs\.0\.conv": "head.0",
        r"decode_head\.convs\.0\.bn": "head.1",
        r"decode_head\.conv_seg": "head.3",
    }
    for n in range(3):
        renamed[rf"backbone\.transition{n + 1}\.{n + 1}\.0"] = f"grow.{n}"
    rules = [(rf"{theirs}\.(.+)", rf"{ours}.\1") for theirs, ours in renamed.items()]
    for theirs, ours in inside.items():
        rules.append((rf"backbone\.layer1\.(\d+)\.{theirs}\.(.+)", rf"stage1.\1.{ours}.\2"))
        for n in range(3):
            pattern = rf"backbone\.stage{n + 2}\.(\d+)\.branches\.(\d+\.\d+)\.{theirs}\.(.+)"
            rules.append((pattern, rf"stages.{n}.\1.branches.\2.{ours}.\3"))
    for n in range(3):
        rules.append((rf"backbone\.stage{n + 2}\.(\d+)\.fuse_layers\.(.+)", rf"stages.{n}.\1.fuse.\2"))
    return rules


_CLASSIFIERS = {"decode_head.conv_seg.weight": _rules(), "head.3.weight": [(r"(.+)", r"\1")]}
"""Name of the classifier's weight in mmsegmentation's files and in ours, with the rules to rename the tensors."""


def load_hrnet_w48(path: str | Path) -> LoadedModel:
    """Loads HRNet-W48 with the weights of a file, in evaluation mode.

    Args:
        path: an ``fcn_hr48`` checkpoint of mmsegmentation, or a state dict of :class:`HRNet` (``.pth`` or
            ``.safetensors``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is not safe to read, or is of another model.
    """
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.tensors
    classifier = next((name for name in _CLASSIFIERS if name in tensors and tensors[name].dim()), None)
    if classifier is None:
        raise ValueError(
            f"{path}: not an HRNet-W48, it has neither of {', '.join(_CLASSIFIERS)}; it has {len(tensors)} tensors, "
            f"such as {', '.join(list(tensors)[:3])}"
        )
    num_classes = len(tensors[classifier])
    model = hrnet_w48(num_classes)
    load_renamed(model, tensors, _CLASSIFIERS[classifier], ("auxiliary_head.",), str(path))
    return LoadedModel(model, num_classes, checkpoint.classes_of(num_classes, path), channels=3)
