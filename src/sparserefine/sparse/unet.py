"""The sparse U-Net: an encoder and a decoder of residual blocks, computed at the sites."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.sparse.layers import ResidualBlock, SparseBatchNorm, SparseConv
from sparserefine.sparse.plan import DownKind, PaddedPlan, Plan, PlanSpec, Stencil


class SparseUNet(nn.Module):
    """Sparse residual U-Net: the layers of a dense U-Net, computed at the sites only.

    Args:
        in_channels: input features per site.
        num_classes: K.
        planes: channels of each level.
        blocks: residual blocks per level, in the encoder and again in the decoder.
        down: kind of down-sampling; plans must be built for the same kind.
        context: values per active cell of each level, which a linear map adds to the features that enter the level;
            0: none. The maps are zero at the start, so the network then begins as the one without.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        planes: Sequence[int],
        blocks: int = 2,
        down: DownKind = "paper",
        context: int = 0,
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
        self.context_channels = context
        self.context = nn.ModuleList(nn.Linear(context, c) for c in planes if context)
        for parameter in self.context.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, plan: Plan, context: Sequence[Tensor] | None = None) -> Tensor:
        """Logits ``[N, K]``.

        Args:
            features: ``[N, in_channels]``.
            plan: the plan of the N sites.
            context: of each level, full size first, ``[n_l, C]``, if the network was made with ``context=C``.

        Raises:
            ValueError: the plan was built for another network, or the context does not fit.
        """
        # Part by part: torch.compile cannot compare the whole once it has seen plans of other depths.
        if plan.spec.levels != self.spec.levels or plan.spec.down != self.spec.down:
            raise ValueError(f"plan was built for {plan.spec}, this network needs {self.spec}")
        check_context(context, plan.rows, self.context_channels)
        added = [linear(values) for linear, values in zip(self.context, context or (), strict=True)]
        x = self.stem(features, plan.levels[0].around)
        skips: list[Tensor] = []
        for depth, level in enumerate(plan.levels):
            if added:
                x = x + added[depth]
            x = _run_blocks(self.descend[depth], x, level.around)
            if level.down is not None:
                skips.append(x)
                x = self.down_convs[depth](F.relu(self.down_norms[depth](x), inplace=True), level.down)
        for depth in reversed(range(len(skips))):
            level = plan.levels[depth]
            assert level.down is not None
            x = self.up_convs[depth](F.relu(self.up_norms[depth](x), inplace=True), level.down.transposed())
            x = torch.cat([skips.pop(), x], dim=1)
            x = _run_blocks(self.ascend[depth], x, level.around)
        logits: Tensor = self.head(F.relu(self.head_norm(x), inplace=True))
        return logits

    def macs(self, plan: Plan | PaddedPlan) -> int:
        """Multiply-accumulates of one forward pass. Missing neighbours count too: they are multiplied as zero rows."""
        return self.macs_of(plan.rows)

    def macs_of(self, sites: Sequence[int]) -> int:
        """Like :meth:`macs`, from the number of sites at each level, full size first."""
        total = _macs_of_layer(self.stem, sites[0]) + self.head.weight.numel() * sites[0]
        for depth, n in enumerate(sites):
            total += _macs_of_layer(self.context[depth], n) if self.context else 0
            total += sum(_macs_of_layer(module, n) for module in self.descend[depth].modules())
            if depth + 1 < len(sites):
                total += sum(_macs_of_layer(module, n) for module in self.ascend[depth].modules())
                coarser = sites[depth + 1]
                total += _macs_of_layer(self.down_convs[depth], coarser)
                # With `cell`, every site has one parent and only the parents are multiplied; see gemm_gather.
                total += _macs_of_layer(self.up_convs[depth], n if self.spec.down == "paper" else coarser)
        return total


def check_context(context: Sequence[Tensor] | None, rows: Sequence[int], channels: int) -> None:
    """Raises ``ValueError`` unless there are ``channels`` values for each active cell of each level, or none at all.

    Args:
        context: of each level, full size first.
        rows: number of active cells at each level.
        channels: values per active cell that the network was made for; 0: it takes none.
    """
    wanted = [(n, channels) for n in rows] if channels else None
    given = None if context is None else [tuple(values.shape) for values in context]
    if given != wanted:
        raise ValueError(f"context is {given or 'missing'}, expected {wanted or 'none'}: see ExtractorConfig.context")


def is_packable(network: nn.Module) -> TypeGuard[SparseUNet]:
    """Whether an engine may run the whole network at once: in evaluation mode, with our layers only, without hooks.

    A packed network would not call hooks, and synchronised normalisation layers (``convert_sync_batchnorm``) are
    torch's.
    """
    modules = list(network.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    foreign = any(isinstance(m, nn.SyncBatchNorm) for m in modules)
    return type(network) is SparseUNet and not network.training and not hooked and not foreign


def _blocks(c_in: int, c_out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(c_in if i == 0 else c_out, c_out) for i in range(count))


def _run_blocks(blocks: nn.Module, x: Tensor, around: Stencil) -> Tensor:
    for block in blocks.children():
        x = block(x, around)
    return x


def _macs_of_layer(module: nn.Module, rows: int) -> int:
    return rows * module.weight.numel() if isinstance(module, (SparseConv, nn.Linear)) else 0
