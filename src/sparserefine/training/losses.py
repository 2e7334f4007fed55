"""Losses at the sites (paper, section 3.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.classes import IGNORE


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross entropy over the sites whose truth is not 255. Without any, it is 0 with a gradient of 0.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
    """
    total = F.cross_entropy(logits.float(), truth.long(), ignore_index=IGNORE, reduction="sum")
    return total / (truth != IGNORE).sum().clamp_min(1)


def soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - soft Dice over the sites whose truth is not 255, averaged over classes; with two classes, class 1 only.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
    """
    counted = truth != IGNORE
    p = logits.float().softmax(1)[counted]
    target = F.one_hot(truth[counted].long(), logits.shape[1]).to(p.dtype)
    if logits.shape[1] == 2:
        p, target = p[:, 1:], target[:, 1:]
    # +1: the loss of a class is zero if it neither occurs in the batch nor is predicted.
    per_class = (2 * (p * target).sum(0) + 1) / (p.sum(0) + target.sum(0) + 1)
    return 1 - per_class.mean()


def refinement_loss(sparse: Tensor, refined: Tensor, truth: Tensor, dice: float = 0.0) -> Tensor:
    """CE(sparse) + CE(refined), plus ``dice`` times the soft Dice losses of both.

    Args:
        sparse: the extractor's logits ``[N, K]``.
        refined: the ensembler's logits ``[N, K]``.
        truth: integers ``[N]``.
        dice: weight of the Dice losses.
    """
    loss = cross_entropy(sparse, truth) + cross_entropy(refined, truth)
    if dice:
        loss = loss + dice * (soft_dice(sparse, truth) + soft_dice(refined, truth))
    return loss
