"""Selector: entropy -> sites. By threshold, by budget, or both (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.sparse.sites import Sites
from sparserefine.uncertainty import entropy_limit


@dataclass(frozen=True)
class Selector:
    """Picks the pixels that are looked at again.

    Attributes:
        threshold: pixels of higher entropy are selected [nats], 0 <= t < ln K; ``None``: any entropy will do.
        budget: the most sites of each image; the most uncertain win, of equals the first in reading order.
    """

    threshold: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is None and self.budget is None:
            raise ValueError("a selector needs a threshold [nats], a budget [sites per image], or both; got neither")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold = {self.threshold} nats, expected at least 0 (and less than ln K)")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget = {self.budget} sites, expected at least 0")

    def check(self, num_classes: int) -> None:
        """Refuses a threshold that no prediction over ``num_classes`` classes can exceed."""
        limit = entropy_limit(num_classes)
        if self.threshold is not None and self.threshold >= limit:
            raise ValueError(
                f"threshold = {self.threshold} nats would select nothing: entropy over {num_classes} classes is at "
                f"most ln {num_classes} = {limit:.4f}; choose a smaller one"
            )

    def __call__(self, entropy: Tensor, valid: Tensor | None = None) -> Sites:
        """Sites of a batch.

        Args:
            entropy: ``float [B, H, W]`` [nats].
            valid: ``bool [B, H, W]``; where false (padding) nothing is selected. ``None``: everywhere true.
        """
        entropy = entropy.contiguous()
        mask = entropy > self.threshold if self.threshold is not None else torch.ones_like(entropy, dtype=torch.bool)
        if valid is not None:
            mask &= valid
        if self.budget is not None:
            for image_entropy, image_mask in zip(entropy, mask, strict=True):
                _keep_most_uncertain(image_entropy, image_mask, self.budget)
        return Sites.from_mask(mask)


def _keep_most_uncertain(entropy: Tensor, mask: Tensor, budget: int) -> None:
    """Clears all but ``budget`` entries of ``mask [H, W]`` in place; deterministic, unlike topk with ties."""
    candidates = mask.view(-1).nonzero()[:, 0]
    excess = len(candidates) - budget
    if excess <= 0:
        return
    mask.fill_(False)
    if budget == 0:
        return
    values = entropy.reshape(-1)[candidates]
    cut = values.kthvalue(excess + 1).values
    above = values > cut
    ties = (values == cut).nonzero()[: budget - int(above.sum()), 0]
    above[ties] = True
    mask.view(-1)[candidates[above]] = True
