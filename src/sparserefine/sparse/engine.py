"""The seam between the network and what executes it: engines, and how one is picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import Sites
from sparserefine.uncertainty import Upsampling, Window

ENGINES = ("torch",)
"""Engines that exist; ``cpu`` (C) and ``triton`` (GPU) are to stand beside ``torch``."""


class Engine(Protocol):
    """What an engine provides. :class:`TorchEngine` defines each result; inherit from it what an engine lacks."""

    name: str

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Plan of the sites; its stencils carry this engine and may carry tables of its own."""

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """The primitive with gradients: ``[N_in, C_in]``, ``[T, C_in, C_out]`` -> ``[N_out, C_out]``."""

    def prepare(self, network: torch.nn.Module) -> Callable[[Tensor, Plan], Tensor] | None:
        """A whole network packed for inference, or ``None`` to run its modules."""

    def uncertainty(
        self,
        logits: Tensor | Sequence[Tensor],
        size: tuple[int, int],
        how: Upsampling,
        windows: Sequence[Window] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Labels and entropy at full size."""


def get_engine(name: str = "auto") -> Engine:
    """The engine of that name; ``auto`` picks the fastest that works here.

    Raises:
        ValueError: no engine has that name.
    """
    if name in ("auto", "torch"):
        from sparserefine.sparse.torch_engine import TorchEngine

        return TorchEngine()
    raise ValueError(f"engine {name!r} is not known; choose 'auto' or one of {', '.join(ENGINES)}")


def engine_report() -> dict[str, str]:
    """Each engine and whether it works here, and what ``auto`` picks, in words."""
    return {"auto": "torch (the only engine of this version)", "torch": "available on every device"}
