"""Deep supervision: in training, linear heads at the coarser levels of the decoder predict labels of their cells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine.images.classes import IGNORE
from sparserefine.sparse import Plan, Sites, SparseUNet


class DeepHeads(nn.Module):
    """Heads at the levels 1, 2, ... of a network, which are not stored with it.

    Args:
        network: the network.
        num_classes: K.
    """

    def __init__(self, network: SparseUNet, num_classes: int) -> None:
        super().__init__()
        # The last block of each level: of the decoder, and of the encoder where they meet.
        blocks = [*network.ascend, network.descend[-1]][1:]
        self._last = [list(level.children())[-1] for level in blocks]  # a list, so that they stay the network's own
        self._network, self._classes = [network], num_classes
        widths = [convs.weight.shape[1] for convs in (*network.down_convs[1:], network.up_convs[-1])]
        self.heads = nn.ModuleList(nn.Linear(int(width), num_classes) for width in widths)
        self._features: list[Tensor | None] = [None] * len(widths)
        self._plan: Plan | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The next call of the network inside is remembered for :meth:`loss`."""

        def plan_of(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._plan = inputs[1]

        def keep(index: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                self._features[index] = output

            return hook

        hooks = [self._network[0].register_forward_pre_hook(plan_of)]
        hooks += [block.register_forward_hook(keep(index)) for index, block in enumerate(self._last)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, truth: Tensor) -> Tensor:
        """Mean over the levels of the cross entropy to the shares of the classes among the labelled sites of each cell.

        Args:
            truth: of the sites, integers ``[N]``, 255 where ignored.
        """
        assert self._plan is not None
        losses = []
        for depth, (head, features) in enumerate(zip(self.heads, self._features, strict=True), start=1):
            assert features is not None
            shares, counted = cell_shares(self._plan.levels[depth].sites, depth, self._plan.sites, truth, self._classes)
            log_p = head(features).float().log_softmax(1)
            losses.append(-(shares * log_p).sum() / counted.sum().clamp_min(1))
        self._plan, self._features = None, [None] * len(self.heads)
        return torch.stack(losses).mean()


def cell_shares(cells: Sites, depth: int, sites: Sites, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Shares of the classes among the labelled sites in each cell, ``float32 [n, K]``, and which cells have any.

    Args:
        cells: the n cells of a level, of ``2**depth x 2**depth`` pixels.
        depth: the level.
        sites: of the finest level.
        truth: of the sites, integers ``[N]``, 255 where ignored.
        num_classes: K.
    """
    index = torch.full((cells.batch_size, cells.height, cells.width), -1, device=truth.device)
    image, row, column = cells.coords.long().unbind(1)
    index[image, row, column] = torch.arange(len(image), device=truth.device)
    image, row, column = sites.coords.long().unbind(1)
    # With 3x3 down-sampling, the last rows and columns may have no cell.
    row, column = ((at >> depth).clamp(max=side - 1) for at, side in ((row, cells.height), (column, cells.width)))
    cell = index[image, row, column]
    kept = (truth != IGNORE) & (cell >= 0)
    # One row more takes what does not count. Sums of ones are exact, in any order.
    place = torch.where(kept, cell * num_classes + truth, len(cells) * num_classes)
    counts = torch.zeros((len(cells) + 1) * num_classes, device=truth.device)
    counts = counts.scatter_add_(0, place, kept.float()).view(-1, num_classes)[:-1]
    total = counts.sum(1)
    return counts / total.clamp_min(1)[:, None], total > 0
