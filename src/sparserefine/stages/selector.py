"""Selector: entropy -> sites, by threshold, by budget, or both (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.images.upsampling import entropy_limit
from sparserefine.sparse import Engine, Sites

_MOST_SITES = 2**31 - 1
"""Sites are counted in int32."""


@dataclass(frozen=True)
class Selector:
    """Selects the pixels to refine.

    Attributes:
        threshold: pixels with a higher entropy are refined [nats], 0 <= t < ln K; ``None``: no threshold.
        budget: maximum number of refined pixels per image. The pixels with the highest entropy are kept; among equals,
            the first in reading order. ``None``: no maximum.
    """

    threshold: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is None and self.budget is None:
            raise ValueError("a selector needs a threshold [nats], a budget [sites per image], or both; got neither")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold = {self.threshold} nats, expected at least 0 (and less than ln K)")
        if self.budget is not None and not 0 <= self.budget <= _MOST_SITES:
            raise ValueError(f"budget = {self.budget} sites, expected at least 0, at most {_MOST_SITES}")

    def check(self, num_classes: int) -> None:
        """Raises ``ValueError`` if no prediction over ``num_classes`` classes can exceed the threshold."""
        limit = entropy_limit(num_classes)
        if self.threshold is not None and self.threshold >= limit:
            raise ValueError(
                f"threshold = {self.threshold} nats would select nothing: entropy over {num_classes} classes is at "
                f"most ln {num_classes} = {limit:.4f}; choose a smaller threshold"
            )

    def __call__(self, entropy: Tensor, valid: Tensor | None = None) -> Sites:
        """The sites of a batch: the pixels where :meth:`mask` is true."""
        return Sites.from_mask(self.mask(entropy, valid))

    def mask(self, entropy: Tensor, valid: Tensor | None = None, engine: Engine | None = None) -> Tensor:
        """The selected pixels of a batch, ``bool [B, H, W]``.

        Args:
            entropy: ``float [B, H, W]`` [nats].
            valid: ``bool [B, H, W]``, false where the image is padding, which is never selected; ``None``: no padding.
            engine: applies the budget; default: engine ``torch``.
        """
        entropy = entropy.contiguous()
        mask = entropy > self.threshold if self.threshold is not None else torch.ones_like(entropy, dtype=torch.bool)
        if valid is not None:
            mask &= valid
        if self.budget is not None:
            (engine or get_engine("torch")).keep_largest(entropy, mask, self.budget)
        return mask
