"""RefinerConfig: all settings of a refiner except its base, its classes and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_normalisation, default_normalisation
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
        mean: per channel, subtracted from the extractor's input pixels, which are in 0..1. It says how many channels
            an image has, 1 to 16; default: ImageNet's three, and 0.5 for each if ``std`` has another number of them.
        std: per channel, the extractor's input pixels are then divided by it; default: ImageNet's, and 0.25 for each if
            ``mean`` has another number of them.
    """

    selector: Selector = Selector(threshold=0.3)
    extractor: ExtractorConfig = PRESETS["slim"]
    ensembler: EnsemblerConfig = EnsemblerConfig()
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling {self.upsampling!r}, expected 'bilinear' or 'nearest'")
        defaults = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        given = [value for name, value in vars(self).items() if name in defaults and value != defaults[name]]
        if given and isinstance(given[0], (tuple, list)):  # the other one follows
            for name, value in zip(defaults, default_normalisation(len(given[0])), strict=True):
                if getattr(self, name) == defaults[name]:
                    object.__setattr__(self, name, value)
        check_normalisation("refiner", self.mean, self.std)

    @property
    def channels(self) -> int:
        """C: the channels of an image."""
        return len(self.mean)

    @property
    def rgb(self) -> bool:
        """Whether the channels are red, green and blue: three, as files of pictures have them, not chosen bands."""
        return self.channels == len(IMAGENET_MEAN)
