"""What a site counts in the cross entropies: by its class, and by its distance from a boundary of the label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.classes import IGNORE
from sparserefine.sparse import Sites

_RINGS = (1, 3, 7)
"""Distances from a boundary [px], along rows and columns; a site within all of them gets the whole extra weight."""


class SiteWeights:
    """Weights of sites.

    Args:
        classes: weight of each class, K of them; ``None``: 1 each.
        boundary: what is added to the weight 1 of a site at a boundary; a third or two thirds of it a few pixels away.
    """

    def __init__(self, classes: Sequence[float] | None, boundary: float) -> None:
        self._classes, self._boundary = classes, boundary

    def by_labels(self, truth: Tensor, label: Tensor, sites: Sites) -> Tensor | None:
        """``float32 [N]``; ``None``: 1 each.

        Args:
            truth: of the sites, integers ``[N]``, 255 where ignored.
            label: of all pixels, integers ``[B, H, W]``.
            sites: the N sites.
        """
        weight = None
        if self._classes is not None:
            of_class = truth.new_tensor(self._classes, dtype=torch.float32)
            weight = of_class[torch.where(truth == IGNORE, 0, truth).long()]
        if self._boundary:
            extra = 1 + self._boundary * sites.gather(nearness(label)[:, None])[:, 0]
            weight = extra if weight is None else weight * extra
        return weight

    def by_teacher(self, teacher: Tensor) -> Tensor | None:
        """Expected weight of the class by the teacher's logits ``[N, K]``: ``float32 [N]``; ``None``: 1 each."""
        if self._classes is None:
            return None
        return teacher.float().softmax(1) @ teacher.new_tensor(self._classes, dtype=torch.float32)


def nearness(label: Tensor) -> Tensor:
    """How near each pixel is to another class: the share of :data:`_RINGS` within which there is one.

    Args:
        label: integers ``[B, H, W]``. Ignored pixels are no class, and have no boundary.

    Returns:
        ``float32 [B, H, W]``, 0 to 1.
    """
    values, ignored = label[:, None].float(), label[:, None] == IGNORE
    largest, smallest = values.masked_fill(ignored, -1), values.masked_fill(ignored, IGNORE + 1)
    near = torch.zeros_like(values)
    for ring in _RINGS:
        near += _largest_around(largest, ring) > -_largest_around(-smallest, ring)
    return (near / len(_RINGS))[:, 0]


def _largest_around(values: Tensor, ring: int) -> Tensor:
    for kernel, padding in (((2 * ring + 1, 1), (ring, 0)), ((1, 2 * ring + 1), (0, ring))):
        values = F.max_pool2d(values, kernel, 1, padding)
    return values
