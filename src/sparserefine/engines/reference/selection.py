"""Applies the budget: keeps the largest values of each image."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(values: Tensor, mask: Tensor, budget: int) -> None:
    """Clears ``mask`` in place, except at the ``budget`` largest values of each image.

    Among equal values, the first in row-major order stay (``torch.topk`` does not define which). NaN counts as minus
    infinity.

    Args:
        values: floating point ``[B, H, W]``.
        mask: ``bool [B, H, W]``, contiguous: the candidates.
        budget: the most pixels that stay per image, at least 0.
    """
    for image_values, image_mask in zip(values, mask, strict=True):
        candidates = image_mask.view(-1).nonzero()[:, 0]
        excess = len(candidates) - budget
        if excess <= 0:
            continue
        image_mask.fill_(False)
        if budget == 0:
            continue
        chosen_from = image_values.reshape(-1)[candidates]
        chosen_from = chosen_from.where(~chosen_from.isnan(), -torch.inf)
        cut = chosen_from.kthvalue(excess + 1).values
        stays = chosen_from > cut
        ties = (chosen_from == cut).nonzero()[: budget - int(stays.sum()), 0]
        stays[ties] = True
        image_mask.view(-1)[candidates[stays]] = True
