"""Selector: entropy -> sites. By threshold, by budget, or both (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.images.upsampling import entropy_limit
from sparserefine.sparse import Engine, Sites


@dataclass(frozen=True)
class Selector:
    """Picks the pixels that are looked at again.

    Attributes:
        threshold: pixels of higher entropy are refined [nats], 0 <= t < ln K; ``None``: whatever their entropy.
        budget: maximum number of refined pixels per image: those of highest entropy, of equals the first in reading
            order; ``None``: no maximum.
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
        """Sites of a batch: where :meth:`mask` is true."""
        return Sites.from_mask(self.mask(entropy, valid))

    def mask(self, entropy: Tensor, valid: Tensor | None = None, engine: Engine | None = None) -> Tensor:
        """What is selected of a batch, ``bool [B, H, W]``.

        Args:
            entropy: ``float [B, H, W]`` [nats].
            valid: ``bool [B, H, W]``; where false (padding) nothing is selected. ``None``: everywhere true.
            engine: keeps to the budget; by default ``torch``.
        """
        entropy = entropy.contiguous()
        mask = entropy > self.threshold if self.threshold is not None else torch.ones_like(entropy, dtype=torch.bool)
        if valid is not None:
            mask &= valid
        if self.budget is not None:
            (engine or get_engine("torch")).keep_largest(entropy, mask, self.budget)
        return mask
