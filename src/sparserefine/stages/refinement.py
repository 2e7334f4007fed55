"""Refinement: the result of the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import dense, entropy, label_dtype
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, Sites


@dataclass(frozen=True)
class Refinement:
    """A prediction: coarse everywhere, refined at the sites. Full-size logits exist only if :meth:`logits` is called.

    Attributes:
        coarse: the base's outputs (``coarse.logits``) and how they are upsampled.
        coarse_labels: ``uint8 [B, H, W]`` (int16 above 255 classes), before refinement.
        coarse_entropy: ``float32 [B, H, W]`` [nats], before refinement, as the selector saw it.
        sites: the N selected pixels.
        coarse_logits: the base's logits at the sites, ``[N, K]``.
        sparse_logits: the extractor's logits at the sites, ``[N, K]``.
        refined_logits: the ensembler's logits at the sites, ``[N, K]``.

    Raises:
        ValueError: logits at the sites are not of shape ``[N, K]``, labels or entropy are not of the sites' images, or
            the labels cannot hold K classes. Engines write labels at the sites without further checks.
    """

    coarse: Coarse
    coarse_labels: Tensor
    coarse_entropy: Tensor
    sites: Sites
    coarse_logits: Tensor
    sparse_logits: Tensor
    refined_logits: Tensor
    _timer: StageTimer
    _sparse_macs: dict[str, int]
    _base: FrozenBase
    _engine: Engine

    def __post_init__(self) -> None:
        expected = (len(self.sites), self.coarse.num_classes)
        for name in ("coarse_logits", "sparse_logits", "refined_logits"):
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise ValueError(f"{name} are {shape}, expected [N, K] = {list(expected)}")
        size = (self.sites.batch_size, self.sites.height, self.sites.width)
        for name in ("coarse_labels", "coarse_entropy"):
            shape = tuple(getattr(self, name).shape)
            if shape != size:
                raise ValueError(f"{name} are {shape}, expected those of the sites' images, [B, H, W] = {list(size)}")
        dtype, wanted = self.coarse_labels.dtype, label_dtype(self.coarse.num_classes)
        if dtype not in (wanted, torch.int16):
            raise ValueError(f"coarse_labels are {dtype}, expected {wanted} for {self.coarse.num_classes} classes")

    def labels(self) -> Tensor:
        """Refined labels, ``uint8 [B, H, W]`` (int16 above 255 classes)."""
        labels = self.coarse_labels.clone()
        self._engine.write_labels(labels, self.refined_logits, self.sites)
        return labels

    def with_sites(self, site_labels: Tensor) -> Tensor:
        """The coarse labels with ``site_labels [N]`` at the sites. Evaluation scores variants of the method with it."""
        labels = self.coarse_labels.clone()
        labels.view(-1)[self.sites.flat] = site_labels.to(labels.dtype)
        return labels

    def logits(self) -> Tensor:
        """Logits of every pixel, ``float32 [B, K, H, W]``, refined at the sites; allocates 4 B K H W bytes."""
        result = dense(self.coarse)
        batch, row, column = self.sites.coords.long().unbind(1)
        result[batch, :, row, column] = self.refined_logits.to(result.dtype)
        return result

    def entropy(self) -> Tensor:
        """Entropy after refinement, ``float32 [B, H, W]`` [nats]: refined at the sites, coarse elsewhere."""
        result = self.coarse_entropy.clone()
        result.view(-1)[self.sites.flat] = entropy(self.refined_logits, 1).to(result.dtype)
        return result

    @property
    def density(self) -> float:
        """Share of the pixels that were refined, N / (B H W)."""
        return self.sites.density

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage, in order. ``base`` is absent if coarse logits were given."""
        return self._timer.milliseconds()

    @property
    def macs(self) -> dict[str, int | None]:
        """Multiply-accumulates of the batch, by stage. ``base`` is ``None`` if they cannot be counted."""
        base = self._base.macs(self.sites.height, self.sites.width)
        return {"base": None if base is None else base * self.sites.batch_size, **self._sparse_macs}

    @property
    def sparse_macs(self) -> dict[str, int]:
        """Those of :attr:`macs` that are not the base's."""
        return self._sparse_macs
