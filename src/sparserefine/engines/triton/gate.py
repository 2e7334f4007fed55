"""The gated ensembler on a GPU; :class:`sparserefine.stages.ensembler.GatedEnsembler` defines the results."""

from __future__ import annotations

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import gate as kernels
from sparserefine.engines.triton.launch import allows_tf32, blocks, launch
from sparserefine.engines.triton.uncertainty import takes
from sparserefine.sparse.interface import Perceptron

MAX_CLASSES = 256
"""A program holds the refined logits of its sites in registers; more classes do not fit there."""


def gated(coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool) -> Tensor | None:
    """Refined logits, without gradients, in one launch.

    Args:
        coarse: ``float32 [N, K]``.
        sparse: ``float32 [N, K]``.
        gate: 2 (K + 1) -> hidden -> 1, of any floating point.
        fuser: K -> hidden -> K; the width of its hidden layer may be another one.
        residual: whether the blend is added to what the fuser makes of it.

    Returns:
        ``float32 [N, K]``; ``None`` where no kernel does it: a gradient is wanted, tensors lie elsewhere, logits are of
        another dtype, or K is above :data:`MAX_CLASSES`.
    """
    if not takes(coarse, sparse, *gate, *fuser) or not coarse.dtype == sparse.dtype == torch.float32:
        return None
    sites, classes = coarse.shape
    if classes > MAX_CLASSES:
        return None
    refined = torch.empty(sites, classes, dtype=torch.float32, device=coarse.device)
    out = max(16, 1 << (classes - 1).bit_length())  # 16: the shortest side of a product
    # What fits the registers without spilling: sites, and classes or hidden units of one product.
    block, depth = (32, 32) if out <= 64 else (16, 16)
    launch(
        kernels.gated,
        (blocks(sites, block),),
        coarse.device,
        *(
            coarse.detach().contiguous(),
            sparse.detach().contiguous(),
            sites,
            *_as_read(gate),
            *_as_read(fuser),
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
    """Products in TF32 where torch's settings allow it, or the network before ran in half precision anyway."""
    rounded = torch.is_autocast_enabled(device.type) and not torch.version.hip
    return "tf32" if rounded or allows_tf32() else "ieee"


def _as_read(mlp: Perceptron) -> tuple[Tensor, ...]:
    return tuple(t.detach().float().contiguous() for t in mlp)
