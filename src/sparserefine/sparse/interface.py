"""The seam between the network and what executes it: what an engine provides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import PaddedSites, Sites

Perceptron = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of a hidden layer with ReLU, weight and bias of the layer after it, as ``nn.Linear`` has them."""


class Unavailable(RuntimeError):
    """An engine cannot be used here; the message says why and what to do."""


class Engine(Protocol):
    """What an engine provides. ``engines/reference`` defines each result; inherit from it what an engine lacks.

    Engines compute. What they are given was checked by who calls them: :class:`Coarse` and :class:`Sites` when they
    were made, the rest by the stages.
    """

    name: str

    def on(self, device: torch.device) -> Engine:
        """Which engine executes on that device: this one, or the one it leaves such tensors to."""

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Clears ``mask``, ``bool [B, H, W]``, in place but for the ``budget`` largest values of each image."""

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """Sites of ``mask``, ``bool [B, H, W]``, and their plan in one go."""

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Plan of the sites; its stencils carry this engine and may carry tables of its own."""

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """The primitive with gradients: ``[N_in, C_in]``, ``[T, C_in, C_out]`` -> ``[N_out, C_out]``."""

    def prepare(self, network: torch.nn.Module) -> Callable[[Tensor, Plan], Tensor] | None:
        """A whole network packed for inference, or ``None`` to run its modules."""

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy at full size."""

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at ``coords``, ``int32 [N, 3]``: ``float32 [N, K]``."""

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at ``coords``, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """What the gated ensembler computes, or ``None`` to let it do so."""

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """The classes of the largest ``logits [N, K]`` into ``labels [B, H, W]`` at the sites; none for padding."""
