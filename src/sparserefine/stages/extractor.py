"""Extractor: full-resolution pixels at the sites -> logits at the sites (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.files.typed import shown
from sparserefine.images.normalisation import IMAGENET_MEAN
from sparserefine.sparse import DownKind, PlanSpec, SparseUNet

Feature = Literal["rgb", "coords", "probabilities", "entropy"]
"""Inputs at a site: normalised channels of the image, all of them, however many (the word is from the time when they
were three); row and column in -1..1; the base's probabilities; their entropy [nats]."""
_MOST_LEVELS, _MOST_CHANNELS, _MOST_BLOCKS = 16, 1 << 16, 100
_MOST_WEIGHTS = 1_000_000_000
"""4 GB in float32, and four times that in training; the published network has 79 million."""


@dataclass(frozen=True)
class ExtractorConfig:
    """Shape of a :class:`SparseUNet`.

    Attributes:
        planes: channels per level, full size first.
        blocks: residual blocks per level, in the encoder and again in the decoder.
        down: kind of down-sampling: ``cell`` (2x2, stride 2) or ``paper`` (3x3, stride 2, no padding).
        features: inputs of the network at each site; ``rgb`` stands for all channels of the image.
        context: whether every level also sees, for each of its active cells, the means of the image's channels and of
            the base's probabilities over all pixels of the cell's block, not only over the sites.
    """

    planes: tuple[int, ...] = (16, 32, 64, 128)
    blocks: int = 1
    down: DownKind = "cell"
    features: tuple[Feature, ...] = ("rgb",)
    context: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= _MOST_LEVELS or not all(_is_count(c, _MOST_CHANNELS) for c in self.planes):
            raise ValueError(
                f"planes = {shown(self.planes)}, expected whole numbers of channels, 1 to {_MOST_CHANNELS}, one for "
                f"each of at most {_MOST_LEVELS} levels"
            )
        PlanSpec(len(self.planes), self.down)  # refuses unknown kinds
        if not _is_count(self.blocks, _MOST_BLOCKS):
            raise ValueError(f"blocks = {shown(self.blocks)}, expected a whole number, 1 to {_MOST_BLOCKS}")
        # Of each level, encoder and decoder have `blocks` blocks of two 3x3 convolutions; the rest is small.
        weights = 36 * self.blocks * sum(c * c for c in self.planes)
        if weights > _MOST_WEIGHTS:
            raise ValueError(
                f"planes = {self.planes} and blocks = {self.blocks} make about {weights:.0e} weights, expected at most "
                f"{_MOST_WEIGHTS:.0e}; choose fewer channels or blocks"
            )
        known = Feature.__args__  # type: ignore[attr-defined]
        names = self.features
        if not 1 <= len(names) <= len(known) or any(name not in known for name in names) or len({*names}) < len(names):
            raise ValueError(f"features = {shown(names)}, expected one or more of {known}, each once")

        if not isinstance(self.context, bool):
            raise ValueError(f"context = {shown(self.context)}, expected true or false")

    def channels(self, num_classes: int, image_channels: int = len(IMAGENET_MEAN)) -> int:
        """Input channels at a site, for images of so many channels."""
        width = {"rgb": image_channels, "coords": 2, "probabilities": num_classes, "entropy": 1}
        return sum(width[name] for name in self.features)

    def build(self, num_classes: int, image_channels: int = len(IMAGENET_MEAN)) -> SparseUNet:
        """The network for images of so many channels, with random weights."""
        return SparseUNet(
            self.channels(num_classes, image_channels),
            num_classes,
            self.planes,
            blocks=self.blocks,
            down=self.down,
            context=image_channels + num_classes if self.context else 0,
        )


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


PRESETS = {
    "paper": ExtractorConfig((32, 64, 128, 256, 512, 1024), blocks=2, down="paper"),
    "slim": ExtractorConfig(),
    "slim16": ExtractorConfig((16, 32, 64, 128, 256), blocks=2, down="paper"),
}
"""``paper``: the published network, 79.3 M parameters. ``slim``: the default. ``slim16``: fixed, for benchmarks."""
