"""Losses at the sites (paper, section 3.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.classes import IGNORE


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross entropy over sites whose truth is not 255; 0 (with a gradient of 0) where there are none.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
    """
    total = F.cross_entropy(logits.float(), truth.long(), ignore_index=IGNORE, reduction="sum")
    return total / (truth != IGNORE).sum().clamp_min(1)


def soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - soft Dice, averaged over the classes (of a two-class task: class 1 only), over sites that count.

    Args:
        logits: ``[N, K]``.
        truth: integers ``[N]``.
    """
    counted = truth != IGNORE
    p = logits.float().softmax(1)[counted]
    target = F.one_hot(truth[counted].long(), logits.shape[1]).to(p.dtype)
    if logits.shape[1] == 2:
        p, target = p[:, 1:], target[:, 1:]
    # +1: a class with no site in the batch costs nothing when it is not predicted.
    per_class = (2 * (p * target).sum(0) + 1) / (p.sum(0) + target.sum(0) + 1)
    return 1 - per_class.mean()


def refinement_loss(sparse: Tensor, refined: Tensor, truth: Tensor, dice: float = 0.0) -> Tensor:
    """CE(sparse) + CE(refined) (+ ``dice`` times soft Dice of both), all ``[N, K]`` against ``[N]``."""
    loss = cross_entropy(sparse, truth) + cross_entropy(refined, truth)
    if dice:
        loss = loss + dice * (soft_dice(sparse, truth) + soft_dice(refined, truth))
    return loss
