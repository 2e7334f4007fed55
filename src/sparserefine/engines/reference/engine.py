"""Engine ``torch``: plain torch, on any device, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.engines.reference.context import block_means
from sparserefine.engines.reference.geometry import build_plan
from sparserefine.engines.reference.selection import keep_largest
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import sample, uncertainty
from sparserefine.sparse.interface import Perceptron
from sparserefine.sparse.plan import Plan, PlanSpec
from sparserefine.sparse.sites import PaddedSites, Sites


class TorchEngine:
    """Defines what every engine must compute. Other engines inherit the operations they do not speed up."""

    name = "torch"

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """The plan of the sites; see :func:`sparserefine.engines.reference.geometry.build_plan`."""
        return build_plan(sites, spec)

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """The plan of the sites where ``mask``, ``bool [B, H, W]``, is true. Its first level holds the sites."""
        return self.geometry(Sites.from_mask(mask), spec)

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Keeps only the ``budget`` largest values of each image in ``mask``, in place; see :func:`keep_largest`."""
        keep_largest(values, mask, budget)

    def prepare(self, network: torch.nn.Module) -> None:
        """Always ``None``: this engine has no packed networks and runs the modules one by one."""

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy [nats] at full size; see :func:`sparserefine.images.uncertainty.uncertainty`."""
        return uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites; see :func:`sparserefine.images.uncertainty.sample`."""
        return sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        sites = Sites(coords, image.shape[0], image.shape[2], image.shape[3])
        return sites.gather(image).float() * scale + shift

    def block_means(
        self,
        image: Tensor,
        coarse: Coarse,
        valid: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        cells: Sequence[Sites | PaddedSites],
    ) -> list[Tensor]:
        """What the cells of each level see; see :func:`sparserefine.engines.reference.context.block_means`."""
        return block_means(self, image, coarse, valid, scale, shift, cells)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """Always ``None``: the ensembler's own modules compute it."""
        return None

    def perceptron(self, x: Tensor, weights: Perceptron) -> Tensor | None:
        """Always ``None``."""
        return None

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """Writes the class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites in use.

        If several logits are equal, the first class wins.
        """
        if isinstance(sites, PaddedSites):
            sites = sites.first(int(sites.count))
            logits = logits[: len(sites)]
        labels.view(-1)[sites.flat] = logits.argmax(1).to(labels.dtype)
