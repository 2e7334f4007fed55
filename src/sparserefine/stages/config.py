"""RefinerConfig: all settings of a refiner except its base, its classes and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.files.image_config import ImageConfig
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import PRESETS, ExtractorConfig
from sparserefine.stages.selector import Selector


@dataclass(frozen=True, kw_only=True)
class RefinerConfig:
    """Settings of a refiner. Python, YAML and ``config.json`` use the same field names.

    Attributes:
        selector: which pixels are refined: entropy threshold, budget, or both.
        extractor: shape and inputs of the sparse network.
        ensembler: how both predictions are blended.
        upsampling: how coarse logits are upsampled: ``bilinear``, or ``nearest`` as in the published code. A threshold
            chosen for one does not suit the other.
        mean: per channel, subtracted from the extractor's input pixels, which are in 0..1.
        std: per channel, the extractor's input pixels are then divided by it.
        images: which bands of image files are read, and what their values mean.
    """

    selector: Selector = Selector(threshold=0.3)
    extractor: ExtractorConfig = PRESETS["slim"]
    ensembler: EnsemblerConfig = EnsemblerConfig()
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    images: ImageConfig = ImageConfig()

    def __post_init__(self) -> None:
        if self.upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling {self.upsampling!r}, expected 'bilinear' or 'nearest'")
        check_normalisation("refiner", self.mean, self.std)
