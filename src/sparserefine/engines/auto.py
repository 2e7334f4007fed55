"""Engine ``auto`` of a machine with a GPU: each call goes to the engine for the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.sparse.interface import Engine, Perceptron
from sparserefine.sparse.plan import Plan, PlanSpec
from sparserefine.sparse.sites import Sites


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

    def prepare(self, network: torch.nn.Module) -> Callable[[Tensor, Plan], Tensor] | None:
        """Where the network's first parameter is."""
        first = next(network.parameters(), None)
        return None if first is None else self.on(first.device).prepare(network)

    def uncertainty(
        self,
        logits: Tensor | Sequence[Tensor],
        size: tuple[int, int],
        how: Upsampling,
        windows: Sequence[Window] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where the (first) logits are."""
        return self.on(_device(logits)).uncertainty(logits, size, how, windows)

    def sample(
        self,
        logits: Tensor | Sequence[Tensor],
        coords: Tensor,
        size: tuple[int, int],
        how: Upsampling,
        windows: Sequence[Window] | None = None,
    ) -> Tensor:
        """Where the (first) logits are."""
        return self.on(_device(logits)).sample(logits, coords, size, how, windows)

    def pixels(self, image: Tensor, sites: Sites, scale: Tensor, shift: Tensor) -> Tensor:
        """Where the image is."""
        return self.on(image.device).pixels(image, sites, scale, shift)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """Where ``coarse`` is."""
        return self.on(coarse.device).gated(coarse, sparse, gate, fuser, residual)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites) -> None:
        """Where the labels are."""
        self.on(labels.device).write_labels(labels, logits, sites)


def _device(logits: Tensor | Sequence[Tensor]) -> torch.device:
    return logits.device if isinstance(logits, Tensor) else logits[0].device
