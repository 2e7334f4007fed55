"""Inputs of the benchmark: models with random weights, and realistic masks of sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.loaded import LoadedModel
from sparserefine.files.images import read_image
from sparserefine.files.text import printable
from sparserefine.sparse import Engine
from sparserefine.stages.selector import Selector
from sparserefine.studies.benchmark.records import size_text

RANDOM_MODELS = (
    "hrnet_w48",
    "segformer_b5",
    "mask2former_t",
    "mask2former_l",
    *(f"segnext_{size}" for size in "tsbl"),
)
"""Names of bases that are measured with random weights."""


@dataclass(frozen=True, eq=False)
class GivenSites(Selector):
    """A selector that reads a given entropy map instead of the base's, so that the benchmark chooses the sites.

    It does the same work as the real selector: it compares every pixel with the threshold.

    Attributes:
        entropy: ``float32 [B, H, W]``: 1 nat at the wanted sites, 0 elsewhere.
    """

    entropy: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1))

    def mask(self, entropy: Tensor, valid: Tensor | None = None, engine: Engine | None = None) -> Tensor:
        """The mask of the given map, ``bool [B, H, W]``; the base's own ``entropy`` is ignored."""
        return super().mask(self.entropy, valid, engine)


def random_model(name: str, num_classes: int) -> LoadedModel:
    """A model of the paper with seeded random weights: good for timing, useless for prediction.

    Args:
        name: one of :data:`RANDOM_MODELS`.
        num_classes: K.

    Raises:
        ValueError: the name is unknown.
        ImportError: a package is missing; the message says which.
    """
    if name not in RANDOM_MODELS:
        raise ValueError(f"model {name!r} is not known; choose from {', '.join(RANDOM_MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _built(name, num_classes)


def _built(name: str, num_classes: int) -> LoadedModel:
    if name == "hrnet_w48":
        from sparserefine.bases.families.hrnet import hrnet_w48

        return LoadedModel(hrnet_w48(num_classes), num_classes)
    if name.startswith("segnext_"):
        from sparserefine.bases.families.segnext import segnext
        from sparserefine.bases.load import SEGNEXT

        return LoadedModel(segnext(SEGNEXT[name], num_classes), num_classes)
    from sparserefine.bases.families import hf

    if name == "segformer_b5":
        return hf.segformer_b5(num_classes)
    if name == "mask2former_t":
        return hf.mask2former_t(num_classes)
    return hf.mask2former_l(num_classes)


def synthetic_mask(size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """A mask shaped like the uncertain pixels of a real prediction: bands around winding lines.

    A smooth random field is the sum of noise at three scales: 1/4, 1/16 and 1/64 of the image's shorter side, with
    amplitudes proportional to the scale. The sites are the pixels nearest to the field's median. At equal density, each
    level of a sparse U-Net gets as many sites as for the class boundaries of street scenes, within 15 %.

    Args:
        size: height and width [px].
        density: share of the pixels, 0..1; met exactly, up to rounding to a whole pixel.
        seed: seed of the noise.

    Returns:
        ``bool [H, W]``.
    """
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.zeros(height, width)
    for parts in (4, 16, 64):
        cell = max(1.0, min(size) / parts)
        grid = [max(2, round(extent / cell) + 1) for extent in size]
        noise = torch.randn(1, 1, *grid, generator=generator)
        smooth += cell * F.interpolate(noise, size, mode="bicubic", align_corners=True)[0, 0]
    distance = (smooth - smooth.median()).abs().flatten()
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[distance.topk(round(density * height * width), largest=False).indices] = True
    return mask.view(height, width)


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """``bool [H, W]``, true where the picture is not black.

    Raises:
        ValueError: the file is unreadable or has another size.
    """
    mask = read_image(path).amax(0) > 0
    if tuple(mask.shape) != size:
        raise ValueError(
            f"mask {printable(path)} is {size_text(mask.shape)}, expected {size_text(size)}, the size of the image"
        )
    return mask
