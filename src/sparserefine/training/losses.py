"""Losses at the sites (paper, section 3.4).

Logits are transposed to ``[K, N]`` first: on the CPU, sums and softmax over the short rows of ``[N, K]`` are several
times slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.classes import IGNORE


def cross_entropy(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the sites whose truth is not 255. Without any, it is 0 with a gradient of 0.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
        weight: of each site in the mean, ``[N]``; default: 1.
    """
    counted = truth != IGNORE
    columns, target = logits.float().t().contiguous()[None], truth.long()[None]
    if weight is None:
        total = F.cross_entropy(columns, target, ignore_index=IGNORE, reduction="sum")
        return total / counted.sum().clamp_min(1)
    per_site = F.cross_entropy(columns, target, ignore_index=IGNORE, reduction="none")[0]
    total = (weight * counted).sum()
    return (per_site * weight).sum() / torch.where(total > 0, total, 1)


def soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - soft Dice over the sites whose truth is not 255, averaged over classes; with two classes, class 1 only.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
    """
    p = logits.float().t().contiguous().softmax(0) * (truth != IGNORE)
    target = torch.arange(logits.shape[1], device=truth.device)[:, None] == truth  # 255 is no class
    if logits.shape[1] == 2:
        p, target = p[1:], target[1:]
    # +1: the loss of a class is zero if it neither occurs in the batch nor is predicted.
    per_class = (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    return 1 - per_class.mean()


def refinement_loss(
    sparse: Tensor, refined: Tensor, truth: Tensor, dice: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """CE(sparse) + CE(refined), plus ``dice`` times the soft Dice losses of both.

    Args:
        sparse: the extractor's logits ``[N, K]``.
        refined: the ensembler's logits ``[N, K]``.
        truth: integers ``[N]``.
        dice: weight of the Dice losses.
        weight: of each site in the cross entropies, ``[N]``; default: 1.
    """
    loss = cross_entropy(sparse, truth, weight) + cross_entropy(refined, truth, weight)
    if dice:
        loss = loss + dice * (soft_dice(sparse, truth) + soft_dice(refined, truth))
    return loss
