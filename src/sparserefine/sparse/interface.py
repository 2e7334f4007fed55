"""The interface between the network and what executes it: what an engine provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse.plan import Plan, PlanSpec
from sparserefine.sparse.sites import PaddedSites, Sites

Perceptron = tuple[Tensor, Tensor, Tensor, Tensor]
"""A two-layer perceptron: weight and bias of the hidden layer (ReLU), weight and bias of the output layer.

Shapes are those of ``nn.Linear``.
"""


class Unavailable(RuntimeError):
    """An engine cannot be used here; the message says why and what to do."""


class Engine(Protocol):
    """What an engine provides. ``engines/reference`` defines the results; others inherit what they do not speed up.

    Engines only compute; callers check the arguments. :class:`Coarse` and :class:`Sites` check themselves when they are
    made, the stages check the rest.
    """

    name: str

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Keeps the ``budget`` largest values per image: clears the rest of ``mask``, ``bool [B, H, W]``, in place."""

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """The plan of the sites where ``mask``, ``bool [B, H, W]``, is true. The plan holds the sites."""

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """The plan of the sites. Its stencils run convolutions on this engine."""

    def prepare(self, network: torch.nn.Module) -> Callable[..., Tensor] | None:
        """The whole network packed for inference, or ``None`` if its modules must run one by one."""

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy [nats] at full size, both ``[B, H, W]``."""

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at ``coords``, ``int32 [N, 3]``: ``float32 [N, K]``."""

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at ``coords``, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""

    def block_means(
        self,
        image: Tensor,
        coarse: Coarse,
        valid: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        cells: Sequence[Sites | PaddedSites],
    ) -> list[Tensor]:
        """Mean channels and probabilities of the blocks of pixels that the cells of each level cover.

        Args:
            image: ``[B, C, H, W]``.
            coarse: the base's outputs for this image.
            valid: ``bool [B, H, W]``, the pixels that count; default: all.
            scale: the image is multiplied by it, ``[C]``.
            shift: and this is added, ``[C]``.
            cells: of level l, full size first: cell (r, c) covers the pixels of rows r 2^l to (r + 1) 2^l - 1, and of
                the columns likewise, as far as they lie in the image.

        Returns:
            ``float32 [n_l, C + K]`` of each level; zeros where no pixel counts, anything in rows of padding.
        """

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """The result of the gated ensembler, or ``None`` if its own modules must compute it."""

    def perceptron(self, x: Tensor, weights: Perceptron) -> Tensor | None:
        """The perceptron of the columns of ``x [I, N]``, with gradients: ``[O, N]``; ``None``: torch computes it."""

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """Writes the class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites in use."""
