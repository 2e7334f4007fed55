"""Engine ``torch``: plain torch, on any device, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.engines.reference.convolution import gather_gemm, gemm_gather
from sparserefine.engines.reference.geometry import build_plan
from sparserefine.engines.reference.selection import keep_largest
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import sample, uncertainty
from sparserefine.sparse.interface import Engine, Perceptron
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import PaddedSites, Sites


class TorchEngine:
    """Defines what every other engine must compute; another engine may inherit what it does not do itself."""

    name = "torch"

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Neighbour tables of all levels; see :func:`sparserefine.engines.reference.geometry.build_plan`."""
        return build_plan(sites, spec, self)

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """Plan of the sites where ``mask``, ``bool [B, H, W]``, is true; they are those of its first level."""
        return self.geometry(Sites.from_mask(mask), spec)

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Clears ``mask`` in place but for the largest values of each image; see :func:`keep_largest`."""
        keep_largest(values, mask, budget)

    def on(self, device: torch.device) -> Engine:
        """What executes on that device: this engine, or where it has no code of its own, the one it inherits from."""
        return self

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """``[N_in, C_in]``, ``[T, C_in, C_out]`` -> ``[N_out, C_out]``, differentiable in ``x`` and ``weight``."""
        y: Tensor
        if stencil.single is not None:
            y = gemm_gather(x, weight, stencil.single, stencil.table, stencil.reverse)
        else:
            y = gather_gemm(x, weight, stencil.table, stencil.reverse, stencil.mirrored, stencil.reverse_single)
        return y

    def prepare(self, network: torch.nn.Module) -> None:
        """A packed form of a whole network; ``None``: there is none, run the modules one by one."""

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy at full size; see :func:`sparserefine.images.uncertainty.uncertainty`."""
        return uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites; see :func:`sparserefine.images.uncertainty.sample`."""
        return sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        sites = Sites(coords, image.shape[0], image.shape[2], image.shape[3])
        return sites.gather(image).float() * scale + shift

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """``None``: the ensembler's own modules do it."""
        return None

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """The first class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites in use."""
        if isinstance(sites, PaddedSites):
            sites = sites.first(int(sites.count))
            logits = logits[: len(sites)]
        labels.view(-1)[sites.flat] = logits.argmax(1).to(labels.dtype)
