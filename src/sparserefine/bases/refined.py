"""A refiner as a base: its refined logits are the coarse logits of another refiner, at a higher resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from sparserefine.bases.loaded import LoadedModel
from sparserefine.engines.choose import EngineChoice
from sparserefine.files.image_config import ImageConfig
from sparserefine.images.classes import Classes
from sparserefine.sparse import SparseUNet
from sparserefine.sparse.quantisation import is_calibrated

RefinerReader = Callable[[str], LoadedModel]
"""Reads the refiner of that name as a base, with :func:`refined`. Refiners lie above bases, so it is handed down."""

_log = logging.getLogger(__name__)


class Refiner(Protocol):
    """What is needed of a :class:`sparserefine.SparseRefiner`, which is one."""

    base: Any
    config: Any
    classes: Classes
    extractor: SparseUNet
    engine: EngineChoice

    def __call__(self, image: Tensor) -> Any:
        """Refines a batch of images; the result is a :class:`sparserefine.Refinement`."""


class RefinedModel(nn.Module):
    """A refiner as a model: pixels in 0..1, ``float32 [B, C, h, w]`` -> refined logits of each, ``[B, K, h, w]``.

    It takes pixels as they are, because the refiner and its base normalise them.
    """

    def __init__(self, refiner: Refiner) -> None:
        super().__init__()
        self.refiner = refiner
        self._refining: dict[tuple[int, int], int] = {}

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        result = self.refiner(image)
        self._refining[image.shape[2], image.shape[3]] = sum(result.sparse_macs.values()) // len(image)
        logits: Tensor = result.logits()
        return logits

    def run_on(self, engine: str) -> None:
        """Makes the refiner run on the engine of this name, and its base if that is a refiner.

        Only a refiner that was quantized runs on engine ``cpu-int8``; another one runs on ``cpu``.
        """
        fits = engine != "cpu-int8" or is_calibrated(self.refiner.extractor)
        self.refiner.engine = EngineChoice(engine if fits else "cpu")  # its own: engines keep packed weights
        self.refiner.base.run_on(engine)

    def macs(self, height: int, width: int) -> int | None:
        """Multiply-accumulates for the last image of that size [px]. They depend on it: ``None`` before the first."""
        base, refining = self.refiner.base.macs(height, width), self._refining.get((height, width))
        return None if base is None or refining is None else base + refining

    def warn_if_read_otherwise(self, images: ImageConfig) -> None:
        """Warns if image files are not read as the refiner was trained on them: other bands, or another range."""
        own: ImageConfig = self.refiner.config.images
        if (own.bands, own.ranges or own.range) != (images.bands, images.ranges or images.range):
            _log.warning(
                "the base is a refiner of images with bands %s, range %s; these have bands %s, range %s; set "
                "images.bands and images.range to its own",
                *(own.bands, own.range, images.bands, images.range),
            )

    @property
    def settings(self) -> str:
        """What changes the logits and is no weight, for :attr:`FrozenBase.identity`."""
        return f"{_chosen(self.refiner.config)} {self.refiner.base.identity}"


def refined(refiner: Refiner) -> LoadedModel:
    """A refiner as the model of a base: ``FrozenBase(refined(refiner), config=BaseConfig(ratio=0.5))``."""
    classes, channels = refiner.classes, refiner.config.channels
    mean, std = (0.0,) * channels, (1.0,) * channels  # it takes pixels as they are
    return LoadedModel(RefinedModel(refiner), len(classes), classes, mean, std, channels=channels)


def _chosen(value: Any) -> Any:
    """The fields of a configuration that have not their defaults: a new field does not change it."""
    if not is_dataclass(value):
        return value
    given = {field.name: getattr(value, field.name) for field in fields(value)}
    return {field.name: _chosen(given[field.name]) for field in fields(value) if given[field.name] != field.default}
