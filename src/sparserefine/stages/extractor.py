"""Extractor: full-resolution pixels at the sites -> logits at the sites (paper, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.sparse import DownKind, PlanSpec, SparseUNet

Feature = Literal["rgb", "coords", "probabilities", "entropy"]
"""Inputs at a site: normalised colour; row and column in -1..1; the base's probabilities; their entropy [nats]."""


@dataclass(frozen=True)
class ExtractorConfig:
    """Shape of a :class:`SparseUNet`.

    Attributes:
        planes: channels per level, full size first.
        blocks: residual blocks per level, in the encoder and again in the decoder.
        down: kind of down-sampling: ``cell`` (2x2, stride 2) or ``paper`` (3x3, stride 2, no padding).
        features: inputs of the network at each site.
    """

    planes: tuple[int, ...] = (16, 32, 64, 128)
    blocks: int = 1
    down: DownKind = "cell"
    features: tuple[Feature, ...] = ("rgb",)

    def __post_init__(self) -> None:
        if not self.planes or any(not isinstance(c, int) or c < 1 for c in self.planes):
            raise ValueError(f"planes = {self.planes}, expected whole numbers of channels >= 1, one for each level")
        PlanSpec(len(self.planes), self.down)  # refuses unknown kinds
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise ValueError(f"blocks = {self.blocks}, expected a whole number, at least 1")
        known = Feature.__args__  # type: ignore[attr-defined]
        if not self.features or any(name not in known for name in self.features):
            raise ValueError(f"features = {self.features}, expected one or more of {known}")

    def channels(self, num_classes: int) -> int:
        """Input channels at a site."""
        width = {"rgb": 3, "coords": 2, "probabilities": num_classes, "entropy": 1}
        return sum(width[name] for name in self.features)

    def build(self, num_classes: int) -> SparseUNet:
        """The network, with random weights."""
        return SparseUNet(self.channels(num_classes), num_classes, self.planes, blocks=self.blocks, down=self.down)


PRESETS = {
    "paper": ExtractorConfig((32, 64, 128, 256, 512, 1024), blocks=2, down="paper"),
    "slim": ExtractorConfig(),
    "slim16": ExtractorConfig((16, 32, 64, 128, 256), blocks=2, down="paper"),
}
"""``paper``: the published network, 79.3 M parameters. ``slim``: the default. ``slim16``: fixed, for benchmarks."""
