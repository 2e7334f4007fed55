"""Boundary IoU: IoU of the bands along the contours of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def boundary_band(mask: Tensor, width: int) -> Tensor:
    """Pixels of ``mask``, ``bool [H, W]``, that are at most ``width`` px from its contour (image border included).

    Cheng et al., "Boundary IoU" (CVPR 2021): the mask minus its erosion by a square of side 2 width + 1.
    """
    outside = _any_within(_any_within(~mask, width, 1), width, 0)
    return mask & outside


def _any_within(x: Tensor, reach: int, dim: int) -> Tensor:
    """True where any of the 2 reach + 1 entries around is true. Entries outside the image count as true.

    Uses differences of running sums, so the cost does not grow with ``reach``.
    """
    shape = list(x.shape)
    shape[dim] = reach + 1
    ends = torch.ones(shape, dtype=torch.bool, device=x.device)
    total = torch.cat([ends, x, ends], dim).cumsum(dim, dtype=torch.int32)
    n, window = x.shape[dim], 2 * reach + 1
    return total.narrow(dim, window, n) > total.narrow(dim, 0, n)


def boundary_bands(labels: Tensor, valid: Tensor, num_classes: int, width: int | None = None) -> dict[int, Tensor]:
    """The boundary band, ``bool [H, W]``, of each class that occurs.

    Args:
        labels: classes ``[H, W]``, predicted or true.
        valid: ``bool [H, W]``, the pixels that count.
        num_classes: K.
        width: width of the band [px]; ``None``: 2 % of the image's diagonal, as published. An object thinner than the
            band lies in it completely, and its boundary IoU equals its IoU.
    """
    if width is None:
        width = max(1, round(0.02 * float(labels.shape[0] ** 2 + labels.shape[1] ** 2) ** 0.5))
    masks = ((k, (labels == k) & valid) for k in range(num_classes))
    return {k: boundary_band(mask, width) for k, mask in masks if mask.any()}


def band_overlap(a: dict[int, Tensor], b: dict[int, Tensor], num_classes: int, where: Tensor | None = None) -> Tensor:
    """Intersection and union of two sets of bands [px], per class, ``int64 [2, K]``.

    Args:
        a: band of each class; a missing class has an empty band.
        b: the other set of bands.
        num_classes: K.
        where: ``bool [H, W]``, the pixels to count; ``None``: all.
    """
    counts = torch.zeros(2, num_classes, dtype=torch.int64)
    for k in {*a, *b}:
        first, second = a.get(k), b.get(k)
        either = first if second is None else second if first is None else first | second
        both = first & second if first is not None and second is not None else None
        for row, mask in enumerate((both, either)):
            if mask is not None:
                counts[row, k] = int((mask if where is None else mask & where).sum())
    return counts
