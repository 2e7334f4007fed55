"""The seam between the network and what executes it: engines, and how one is picked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import Sites
from sparserefine.uncertainty import Upsampling, Window

ENGINES = ("torch", "cpu", "cpu-int8")
"""Engines that exist; ``triton`` (GPU) is to stand beside them. ``auto`` does not pick ``cpu-int8``: it rounds."""


Perceptron = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of a hidden layer with ReLU, weight and bias of the layer after it, as ``nn.Linear`` has them."""


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

    def sample(
        self,
        logits: Tensor | Sequence[Tensor],
        coords: Tensor,
        size: tuple[int, int],
        how: Upsampling,
        windows: Sequence[Window] | None = None,
    ) -> Tensor:
        """Full-resolution logits at the sites, ``float32 [N, K]``."""

    def pixels(self, image: Tensor, sites: Sites, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """What :class:`sparserefine.ensembler.GatedEnsembler` computes, or ``None`` to let it do so."""

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites) -> None:
        """The classes of the largest ``logits [N, K]`` into ``labels [B, H, W]`` at the sites."""


def get_engine(name: str = "auto") -> Engine:
    """The engine of that name; ``auto`` picks the fastest that works here.

    Raises:
        ValueError: no engine has that name, or it cannot be used here.
    """
    from sparserefine.native.library import Unavailable
    from sparserefine.sparse.torch_engine import TorchEngine

    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine {name!r} is not known; choose 'auto' or one of {', '.join(ENGINES)}")
    if name == "torch":
        return TorchEngine()
    from sparserefine.sparse.cpu.engine import CpuEngine, Int8Engine

    try:
        engine = Int8Engine() if name == "cpu-int8" else CpuEngine()
    except Unavailable as error:
        if name == "auto":
            _tell(logging.WARNING, f"engine torch, for engine cpu is not available: {error}")
            return TorchEngine()
        raise ValueError(f"engine {name!r} cannot be used here: {error}") from error
    _tell(logging.INFO, f"engine {engine.name} ({engine.kernels.library.name})")
    return engine


@cache
def _tell(level: int, words: str) -> None:
    """Once for each message: refiners are made often, and what they run on does not change."""
    logging.getLogger(__name__).log(level, words)


def engine_report() -> dict[str, str]:
    """Each engine and whether it works here, and what ``auto`` picks, in words."""
    from sparserefine.native.build import NOTE
    from sparserefine.native.library import Unavailable, available, load

    try:
        chosen = load().name
    except Unavailable as error:
        return {
            "auto": "torch, for engine cpu is not available",
            "torch": "available on every device",
            "cpu": str(error),
            "cpu-int8": "needs engine cpu",
        }
    note = f"; {NOTE.read_text(encoding='utf-8').strip()}" if NOTE.is_file() else ""
    others = ", ".join(name for name in available() if name != chosen)
    return {
        "auto": "cpu for tensors on the CPU, torch elsewhere",
        "torch": "available on every device",
        "cpu": f"available: {chosen}{f' (also {others})' if others else ''}{note}",
        "cpu-int8": _int8_report(),
    }


def _int8_report() -> str:
    try:
        get_engine("cpu-int8")
    except ValueError as error:
        return str(error)
    return "available for calibrated refiners (`sparserefine calibrate`); about 1 % of rounding in the logits"
