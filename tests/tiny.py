"""An untrained refiner of three classes, for tests of prediction."""

from __future__ import annotations

import torch
from torch import nn

from sparserefine import (
    BaseConfig,
    Classes,
    ExtractorConfig,
    FrozenBase,
    ImageConfig,
    RefinerConfig,
    Selector,
    SparseRefiner,
)
from sparserefine.bases.families.unet import UNet

CLASSES = Classes(("background", "road", "car"), ((0, 0, 0), (128, 64, 128), (0, 0, 142)))


def tiny_refiner(
    model: nn.Module | None = None, *, images: ImageConfig | None = None, selector: Selector | None = None
) -> SparseRefiner:
    """Refines 200 pixels, unless another selector is given."""
    torch.manual_seed(0)
    base = FrozenBase(model or UNet(3, planes=(4, 8)), 3, BaseConfig(ratio=0.5))
    config = RefinerConfig(
        selector=selector or Selector(budget=200),
        extractor=ExtractorConfig((4, 8)),
        images=images or ImageConfig(),
    )
    return SparseRefiner(base, config, classes=CLASSES).eval()
