"""Extractor: full-resolution pixels at the sites -> logits at the sites (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.sparse import DownKind, Plan, PlanSpec, ResidualBlock, SparseBatchNorm, SparseConv, Stencil

Feature = Literal["rgb", "coords", "probabilities", "entropy"]
"""Inputs at a site: its colour, normalised; row and column in -1..1; the base's probabilities; their entropy."""


@dataclass(frozen=True)
class ExtractorConfig:
    """Shape of a :class:`SparseUNet`.

    Attributes:
        planes: channels of each level, full size first.
        blocks: residual blocks of each level, on the way down and again on the way up.
        down: kind of down-sampling.
        features: what the network sees at a site.
    """

    planes: tuple[int, ...] = (16, 32, 64, 128)
    blocks: int = 1
    down: DownKind = "cell"
    features: tuple[Feature, ...] = ("rgb",)

    def __post_init__(self) -> None:
        if not self.planes or any(not isinstance(c, int) or c < 1 for c in self.planes):
            raise ValueError(f"planes = {self.planes}, expected whole numbers of channels >= 1, one for each level")
        PlanSpec(len(self.planes), self.down)  # refuses unknown kinds
        if self.blocks < 1:
            raise ValueError(f"blocks = {self.blocks}, expected at least 1")
        known = Feature.__args__  # type: ignore[attr-defined]
        if not self.features or any(name not in known for name in self.features):
            raise ValueError(f"features = {self.features}, expected some of {known}")

    def channels(self, num_classes: int) -> int:
        """Input channels at a site."""
        width = {"rgb": 3, "coords": 2, "probabilities": num_classes, "entropy": 1}
        return sum(width[name] for name in self.features)


PRESETS = {
    "paper": ExtractorConfig((32, 64, 128, 256, 512, 1024), blocks=2, down="paper"),
    "slim": ExtractorConfig(),
    "slim16": ExtractorConfig((16, 32, 64, 128, 256), blocks=2, down="paper"),
}
"""``paper``: the published network, 79.3 M parameters. ``slim``: ours. ``slim16``: a fixed plan for benchmarks."""


class SparseUNet(nn.Module):
    """Sparse residual U-Net: the same layers as a dense one, computed at the sites only.

    Args:
        in_channels: input features of a site.
        num_classes: K.
        planes: channels of each level.
        blocks: residual blocks of each level and direction.
        down: kind of down-sampling; ``plan`` must be built for it.
    """

    def __init__(
        self, in_channels: int, num_classes: int, planes: Sequence[int], blocks: int = 2, down: DownKind = "paper"
    ) -> None:
        super().__init__()
        self.spec = PlanSpec(len(planes), down)
        pairs = list(pairwise(planes))
        self.stem = SparseConv(in_channels, planes[0])
        self.descend = nn.ModuleList(_blocks(c, c, blocks) for c in planes)
        self.down_norms = nn.ModuleList(SparseBatchNorm(fine) for fine, _ in pairs)
        self.down_convs = nn.ModuleList(SparseConv(fine, coarse, self.spec.taps) for fine, coarse in pairs)
        self.up_norms = nn.ModuleList(SparseBatchNorm(coarse) for _, coarse in pairs)
        self.up_convs = nn.ModuleList(SparseConv(coarse, fine, self.spec.taps) for fine, coarse in pairs)
        self.ascend = nn.ModuleList(_blocks(2 * fine, fine, blocks) for fine, _ in pairs)
        self.head_norm = SparseBatchNorm(planes[0])
        self.head = nn.Linear(planes[0], num_classes)

    def forward(self, features: Tensor, plan: Plan) -> Tensor:
        """``[N, in_channels]``, plan of the N sites -> logits ``[N, K]``."""
        if plan.spec != self.spec:
            raise ValueError(f"plan was built for {plan.spec}, this network needs {self.spec}")
        x = self.stem(features, plan.levels[0].around)
        skips: list[Tensor] = []
        for depth, level in enumerate(plan.levels):
            x = _through(self.descend[depth], x, level.around)
            if level.down is not None:
                skips.append(x)
                x = self.down_convs[depth](F.relu(self.down_norms[depth](x), inplace=True), level.down)
        for depth in reversed(range(len(skips))):
            level = plan.levels[depth]
            assert level.down is not None
            x = self.up_convs[depth](F.relu(self.up_norms[depth](x), inplace=True), level.down.transposed())
            x = torch.cat([skips.pop(), x], dim=1)
            x = _through(self.ascend[depth], x, level.around)
        logits: Tensor = self.head(F.relu(self.head_norm(x), inplace=True))
        return logits

    def macs(self, plan: Plan) -> int:
        """Multiply-accumulates of one forward, a missing neighbour counted like a present one (it is multiplied)."""
        total = _rows(self.stem, plan.levels[0].around.num_outputs) + self.head.weight.numel() * len(
            plan.levels[0].sites
        )
        for depth, level in enumerate(plan.levels):
            n = len(level.sites)
            total += sum(_rows(module, n) for module in self.descend[depth].modules())
            if level.down is not None:
                total += sum(_rows(module, n) for module in self.ascend[depth].modules())
                coarser = level.down.num_outputs
                total += _rows(self.down_convs[depth], coarser)
                # `cell`: every site has one parent, so only the parents are multiplied; see torch_engine.gemm_gather.
                total += _rows(self.up_convs[depth], n if self.spec.down == "paper" else coarser)
        return total


def _blocks(c_in: int, c_out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(count))


def _through(blocks: nn.Module, x: Tensor, around: Stencil) -> Tensor:
    for block in blocks.children():
        x = block(x, around)
    return x


def _rows(module: nn.Module, rows: int) -> int:
    return rows * module.weight.numel() if isinstance(module, (SparseConv, nn.Linear)) else 0
