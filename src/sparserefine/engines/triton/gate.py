"""The gated ensembler on a GPU; :class:`sparserefine.stages.ensembler.GatedEnsembler` defines the results."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import gate as kernels
from sparserefine.engines.triton.launch import allows_tf32, blocks, launch
from sparserefine.engines.triton.uncertainty import runs_kernels_on
from sparserefine.sparse.interface import Perceptron

MAX_CLASSES = 256
"""Each program keeps the refined logits of its sites in registers; more classes do not fit."""


def gated(coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool) -> Tensor | None:
    """Refined logits, without gradients, in one launch.

    Args:
        coarse: ``float32 [N, K]``.
        sparse: ``float32 [N, K]``.
        gate: weights of the perceptron 2 (K + 1) -> hidden -> 1, any floating-point dtype.
        fuser: weights of the perceptron K -> hidden -> K, with its own hidden width.
        residual: whether to add the blend to the output of the fuser.

    Returns:
        ``float32 [N, K]``; ``None`` if no kernel can compute it: a gradient is required, a tensor is on another device,
        the logits have another dtype, or K is above :data:`MAX_CLASSES`.
    """
    if not runs_kernels_on(coarse, sparse, *gate, *fuser) or not coarse.dtype == sparse.dtype == torch.float32:
        return None
    sites, classes = coarse.shape
    if classes > MAX_CLASSES:
        return None
    refined = torch.empty(sites, classes, dtype=torch.float32, device=coarse.device)
    out = max(16, 1 << (classes - 1).bit_length())  # 16: smallest side of a matrix product
    # The most that fits the registers: sites, and classes or hidden units per product.
    block, depth = (32, 32) if out <= 64 else (16, 16)
    launch(
        kernels.gated,
        (blocks(sites, block),),
        coarse.device,
        *(
            coarse.detach().contiguous(),
            sparse.detach().contiguous(),
            sites,
            *_as_float32(gate),
            *_as_float32(fuser),
            refined,
        ),
        K=classes,
        GATE_HIDDEN=len(gate[1]),
        FUSER_HIDDEN=len(fuser[1]),
        RESIDUAL=residual,
        SITES=block,
        CLASSES=min(depth, out),
        UNITS=depth,
        OUT=out,
        PRECISION=_precision(coarse.device),
    )
    return refined


def _precision(device: torch.device) -> str:
    """``tf32`` if torch's settings allow it or autocast ran the network in half precision, otherwise ``ieee``."""
    half_precision = torch.is_autocast_enabled(device.type) and not torch.version.hip
    return "tf32" if half_precision or allows_tf32() else "ieee"


def _as_float32(mlp: Perceptron) -> tuple[Tensor, ...]:
    return tuple(t.detach().float().contiguous() for t in mlp)
