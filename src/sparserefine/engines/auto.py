"""Engine ``auto`` of a machine with a GPU: each call goes to the engine for the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Engine, Perceptron
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import PaddedSites, Sites


class AutoEngine:
    """One engine for tensors on a GPU, another one for all others. Plans carry the engine that built them.

    Args:
        on_gpu: of tensors on a CUDA (or ROCm) device.
        elsewhere: of all others.
    """

    name = "auto"

    def __init__(self, on_gpu: Engine, elsewhere: Engine) -> None:
        self._on_gpu, self._elsewhere = on_gpu, elsewhere

    def __reduce__(self) -> tuple[Callable[[str], Engine], tuple[str]]:
        return get_engine, (self.name,)  # for copy and pickle: where it is read there may be no GPU

    def on(self, device: torch.device) -> Engine:
        """The engine for that device."""
        return (self._on_gpu if device.type == "cuda" else self._elsewhere).on(device)

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Where ``values`` are."""
        self.on(values.device).keep_largest(values, mask, budget)

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """Where ``mask`` is."""
        return self.on(mask.device).plan(mask, spec)

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Where the sites are."""
        return self.on(sites.coords.device).geometry(sites, spec)

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """Where ``x`` is."""
        return self.on(x.device).conv(x, weight, stencil)

    def prepare(self, network: torch.nn.Module) -> Callable[[Tensor, Plan], Tensor] | None:
        """Where the network's first parameter is."""
        first = next(network.parameters(), None)
        return None if first is None else self.on(first.device).prepare(network)

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Where the logits are."""
        return self.on(coarse.device).uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Where the logits are."""
        return self.on(coarse.device).sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Where the image is."""
        return self.on(image.device).pixels(image, coords, scale, shift)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """Where ``coarse`` is."""
        return self.on(coarse.device).gated(coarse, sparse, gate, fuser, residual)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """Where the labels are."""
        self.on(labels.device).write_labels(labels, logits, sites)
