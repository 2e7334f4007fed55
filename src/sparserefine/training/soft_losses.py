"""Losses against a teacher's predictions at the sites, and those predictions there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.soft_labels import SoftLabels
from sparserefine.images.upsampling import Window
from sparserefine.sparse import Sites


def teacher_at_sites(teacher: Sequence[SoftLabels], windows: Sequence[Window], sites: Sites) -> Tensor:
    """The teacher's logits at the sites of crops, ``float32 [N, K]``.

    Args:
        teacher: for each crop the part of the prediction that it needs.
        windows: for each crop the part of the image that it shows.
        sites: of the crops.
    """
    size, coords = (sites.height, sites.width), sites.coords.long()
    counts = coords[:, 0].bincount(minlength=sites.batch_size).tolist()  # one wait for the GPU
    return torch.cat(
        [
            soft.at(of_crop[:, 1], of_crop[:, 2], window, size)
            for soft, window, of_crop in zip(teacher, windows, torch.split(coords, counts), strict=True)
        ]
    )


def soft_cross_entropy(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Mean cross entropy to the teacher's probabilities over the sites; without any, it is 0 with a gradient of 0.

    Both logits are divided by the temperature, and the loss is multiplied by its square, so that its gradient stays as
    large as at temperature 1 (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: ``[N, K]``.
        teacher: the teacher's logits ``[N, K]``.
        temperature: T.
        weight: of each site in the mean, ``[N]``; default: 1.
    """
    target = (teacher.float() / temperature).softmax(1)
    if weight is None:
        total = F.cross_entropy(logits.float() / temperature, target, reduction="sum")
        return temperature**2 * total / max(1, len(logits))
    per_site = F.cross_entropy(logits.float() / temperature, target, reduction="none")
    whole = weight.sum()
    return temperature**2 * (per_site * weight).sum() / torch.where(whole > 0, whole, 1)


def dice_to_soft(logits: Tensor, teacher: Tensor) -> Tensor:
    """1 - Dice to the teacher's probabilities, averaged over classes; with two classes, class 1 only.

    The overlap is the sum of the smaller of both probabilities, so that the loss is smallest where they are equal (Wang
    et al. 2023, arXiv 2303.16296). Where the teacher is certain, it is
    :func:`sparserefine.training.losses.soft_dice`.

    Args:
        logits: ``[N, K]``.
        teacher: the teacher's logits ``[N, K]``.
    """
    p, target = (x.float().softmax(1) for x in (logits, teacher))
    if logits.shape[1] == 2:
        p, target = p[:, 1:], target[:, 1:]
    per_class = (2 * torch.minimum(p, target).sum(0) + 1) / (p.sum(0) + target.sum(0) + 1)
    return 1 - per_class.mean()


def teacher_loss(
    sparse: Tensor,
    refined: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    dice: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Soft cross entropies of sparse and refined logits, plus ``dice`` times the Dice losses of both.

    Args:
        sparse: the extractor's logits ``[N, K]``.
        refined: the ensembler's logits ``[N, K]``.
        teacher: the teacher's logits ``[N, K]``.
        temperature: of the cross entropies.
        dice: weight of the Dice losses.
        weight: of each site in the cross entropies, ``[N]``; default: 1.
    """
    of_sparse, of_refined = (soft_cross_entropy(x, teacher, temperature, weight) for x in (sparse, refined))
    loss = of_sparse + of_refined
    if dice:
        loss = loss + dice * (dice_to_soft(sparse, teacher) + dice_to_soft(refined, teacher))
    return loss
