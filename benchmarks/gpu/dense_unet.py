"""The dense U-Net to compare with: the layers of ``SparseUNet`` on every pixel, as ordinary torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _activated(x: Tensor, norm: nn.Module) -> Tensor:
    return F.relu(norm(x), inplace=True)


class _Block(nn.Module):
    """The same layers as ``sparserefine.sparse.ResidualBlock``, under the same names."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` -> ``[B, C_out, H, W]``."""
        y = self.conv2(_activated(self.conv1(_activated(x, self.norm1)), self.norm2))
        result: Tensor = y + self.shortcut(x)
        return result


class DenseUNet(nn.Module):
    """The same layers as ``sparserefine.sparse.SparseUNet``, under the same names, for images.

    If every pixel is a site, both compute the same.
    """

    def __init__(self, channels: int, classes: int, planes: Sequence[int], blocks: int, down: str) -> None:
        super().__init__()
        pairs, size = list(pairwise(planes)), 3 if down == "paper" else 2
        self._even = down == "cell"
        self.stem = nn.Conv2d(channels, planes[0], 3, padding=1, bias=False)
        self.descend = nn.ModuleList(_blocks(c, c, blocks) for c in planes)
        self.down_norms = nn.ModuleList(nn.BatchNorm2d(fine) for fine, _ in pairs)
        self.down_convs = nn.ModuleList(nn.Conv2d(fine, coarse, size, 2, bias=False) for fine, coarse in pairs)
        self.up_norms = nn.ModuleList(nn.BatchNorm2d(coarse) for _, coarse in pairs)
        self.up_convs = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, size, 2, bias=False) for fine, coarse in pairs)
        self.ascend = nn.ModuleList(_blocks(2 * fine, fine, blocks) for fine, _ in pairs)
        self.head_norm = nn.BatchNorm2d(planes[0])
        self.head = nn.Conv2d(planes[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` -> logits ``[B, K, H, W]``."""
        x = self.stem(x)
        skips: list[Tensor] = []
        for depth, blocks in enumerate(self.descend):
            x = _run_blocks(blocks, x)
            if depth < len(self.down_convs):
                skips.append(x)
                x = _activated(x, self.down_norms[depth])
                height, width = x.shape[2:]
                if self._even and (height % 2 or width % 2):
                    x = F.pad(x, (0, width % 2, 0, height % 2))
                x = self.down_convs[depth](x)
        for depth in reversed(range(len(skips))):
            skip = skips.pop()
            x = self._up(_activated(x, self.up_norms[depth]), depth, skip.shape[2], skip.shape[3])
            x = _run_blocks(self.ascend[depth], torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(_activated(x, self.head_norm))
        return logits

    def _up(self, x: Tensor, depth: int, height: int, width: int) -> Tensor:
        """Up-samples to ``[height, width]``: 3x3 windows may end a pixel too early, 2x2 windows a pixel too late."""
        convolution = self.up_convs[depth]
        assert isinstance(convolution, nn.ConvTranspose2d)
        reach = convolution.kernel_size[0] - 2
        size = (max(height, 2 * x.shape[2] + reach), max(width, 2 * x.shape[3] + reach))
        wide: Tensor = convolution(x, output_size=size)
        return wide if size == (height, width) else wide[..., :height, :width]

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Loads weights of a ``SparseUNet``, converting ``[T, C_in, C_out]`` to ``[C_out, C_in, k, k]``.

        Transposed convolutions become ``[C_in, C_out, k, k]``, linear layers ``[C_out, C_in, 1, 1]``.
        """
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        converted = {}
        for name, value in state.items():
            if value.dim() == 3:
                value = value.permute(1, 2, 0) if name.startswith("up_convs") else value.permute(2, 1, 0)
            converted[name] = value.reshape(shapes[name])
        self.load_state_dict(converted)


def _blocks(c_in: int, c_out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(_Block(c_in if i == 0 else c_out, c_out) for i in range(count))


def _run_blocks(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x
