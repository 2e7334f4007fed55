"""RefinerConfig: all settings of a refiner except its base, its classes and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.files.image_config import ImageConfig
from sparserefine.images.normalisation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    channels_text,
    check_normalisation,
    default_normalisation,
)
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
            an image has, 1 to 16; default: ImageNet's for three, else 0.5 for each, as many as ``images.bands`` or
            ``std`` has.
        std: per channel, the extractor's input pixels are then divided by it; default: ImageNet's for three, else 0.25
            for each.
        images: which bands of image files are read, and what their values mean.
    """

    selector: Selector = Selector(threshold=0.3)
    extractor: ExtractorConfig = PRESETS["slim"]
    ensembler: EnsemblerConfig = EnsemblerConfig()
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    images: ImageConfig = ImageConfig()

    def __post_init__(self) -> None:
        if self.upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling {self.upsampling!r}, expected 'bilinear' or 'nearest'")
        self._complete_normalisation()
        check_normalisation("refiner", self.mean, self.std)
        bands = self.images.bands
        if bands is not None and len(bands) != self.channels:
            raise ValueError(
                f"images.bands = {list(bands)}: {channels_text(len(bands))}, mean and std have numbers for "
                f"{self.channels}; expected as many"
            )

    def _complete_normalisation(self) -> None:
        """Where mean or std has its default, that of the number of channels which the other settings say."""
        usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        given = [self.images.bands, *(value for value in (self.mean, self.std) if value not in usual.values())]
        counts = [len(value) for value in given if isinstance(value, (tuple, list))]
        if counts:
            for name, value in zip(usual, default_normalisation(counts[0]), strict=True):
                if getattr(self, name) == usual[name]:
                    object.__setattr__(self, name, value)

    @property
    def channels(self) -> int:
        """C: the channels of an image."""
        return len(self.mean)

    @property
    def rgb(self) -> bool:
        """Whether the channels are red, green and blue: three, as a viewer shows them, not chosen bands."""
        return self.images.bands is None and self.channels == len(IMAGENET_MEAN)
