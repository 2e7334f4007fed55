"""Resizing images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize, ``[B, C, H, W]`` of any real dtype -> ``float32 [B, C, h, w]``, same value range.

    One channel at a time: a 100-megapixel uint8 image then needs one full-size float32 plane in memory, not three.
    """
    if tuple(image.shape[-2:]) == size:
        return image.float()
    planes = [
        F.interpolate(image[:, c : c + 1].float(), size, mode="bilinear", align_corners=False, antialias=True)
        for c in range(image.shape[1])
    ]
    return torch.cat(planes, dim=1)
