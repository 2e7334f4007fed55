"""Where crops are drawn around: the coarse pixels where the base is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.uncertainty import entropy
from sparserefine.images.upsampling import Upsampling, entropy_limit, normalised


@dataclass(frozen=True)
class Focus:
    """The pixels of coarse logits that a refiner would select, were they as large as the image.

    Attributes:
        threshold: entropy above which a pixel counts [nats]; ``None``: 0.3 ln K.
        upsampling: says whether the base's outputs are logits.
    """

    threshold: float | None
    upsampling: Upsampling

    def __call__(self, logits: Tensor) -> Tensor:
        """``[K, h, w]`` -> indices into h x w, ``int32 [n]``."""
        entropies = entropy(normalised(logits.float(), self.upsampling, dim=0), dim=0)
        threshold = 0.3 * entropy_limit(len(logits)) if self.threshold is None else self.threshold
        return (entropies > threshold).flatten().nonzero()[:, 0].to(torch.int32)


def with_data(focus: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """Those of the coarse pixels in whose area the image has data.

    Args:
        focus: indices into h x w, ``int32 [n]``.
        logits: ``[K, h, w]``.
        valid: ``bool [H, W]``, false where the image has no data.
    """
    seen = F.adaptive_max_pool2d(valid[None].float(), (logits.shape[1], logits.shape[2])) > 0
    return focus[seen.flatten()[focus.long()]]
