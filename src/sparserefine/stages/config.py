"""RefinerConfig: all that makes a refiner but its base, its classes and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import PRESETS, ExtractorConfig
from sparserefine.stages.selector import Selector


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """The choices of a refiner. Python, YAML and ``config.json`` have these fields under these names.

    Attributes:
        selector: threshold and budget: which pixels are refined.
        extractor: shape and inputs of the sparse network.
        ensembler: how both predictions are blended.
        upsampling: of the coarse logits: ``bilinear``, or ``nearest`` as in the published code; thresholds belong to
            this choice.
        mean: subtracted from the refiner's own pixels in 0..1, per channel.
        std: the refiner's own pixels are then divided by it, per channel.
    """

    selector: Selector = Selector(threshold=0.3)
    extractor: ExtractorConfig = PRESETS["slim"]
    ensembler: EnsemblerConfig = EnsemblerConfig()
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling {self.upsampling!r}, expected 'bilinear' or 'nearest'")
        check_normalisation("refiner", self.mean, self.std)
