"""The gated ensembler, compiled; :class:`sparserefine.stages.ensembler.GatedEnsembler` defines the results."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sparserefine.engines.cpu.native.library import Library, pointer
from sparserefine.engines.cpu.native.structures import Mlp
from sparserefine.sparse.interface import Perceptron

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64


_MLP = ctypes.POINTER(Mlp)
_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "sr_gate_scratch": (_INT,),
    "sr_gate_packed": (_INT, _INT, _INT),
    "sr_gate": (_ADDRESS, _ADDRESS, _INT, _INT, _MLP, _MLP, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
}


def gated(
    library: Library, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
) -> Tensor:
    """Refined logits, without gradients.

    Args:
        library: the kernels.
        coarse: ``float32 [N, K]``, contiguous.
        sparse: ``float32 [N, K]``, contiguous.
        gate: weights of the perceptron 2 (K + 1) -> hidden -> 1.
        fuser: weights of the perceptron K -> hidden -> K, with its own hidden width.
        residual: whether to add the blend to the output of the fuser.

    Returns:
        ``float32 [N, K]``.

    Raises:
        ValueError: a tensor has another dtype, shape or device; the kernel would read out of bounds.
    """
    if coarse.dim() != 2 or coarse.shape != sparse.shape or coarse.shape[1] < 1:
        raise ValueError(
            f"coarse logits are {tuple(coarse.shape)}, sparse ones {tuple(sparse.shape)}; "
            "expected [N, K] for both, K at least 1"
        )
    sites, classes = coarse.shape
    of_gate = _mlp(gate, "gate", 2 * (classes + 1), 1)
    of_fuser = _mlp(fuser, "fuser", classes, classes)
    addresses = [pointer(coarse, torch.float32, "coarse logits"), pointer(sparse, torch.float32, "sparse logits")]
    threads = torch.get_num_threads()
    refined = torch.empty(sites, classes, dtype=torch.float32)
    packed = _function(library, "sr_gate_packed")(classes, of_gate.hidden, of_fuser.hidden)
    each = _function(library, "sr_gate_scratch")(classes)
    weights, scratch = (torch.empty(floats, dtype=torch.float32) for floats in (packed, threads * each))
    _function(library, "sr_gate")(
        *(*addresses, sites, classes, of_gate, of_fuser, int(residual)),
        *(pointer(tensor, torch.float32, "result") for tensor in (refined, weights, scratch)),
        threads,
    )
    return refined


@cache
def _function(library: Library, name: str) -> ctypes._NamedFuncPointer:
    return library.function(name, *_PROTOTYPES[name])


def _mlp(weights: Perceptron, name: str, inputs: int, outputs: int) -> Mlp:
    hidden = len(weights[0]) if weights[0].dim() else 0
    names = ("first weight", "first bias", "second weight", "second bias")
    shapes = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    for tensor, which, shape in zip(weights, names, shapes, strict=True):
        if tensor.shape != shape or hidden < 1:
            raise ValueError(
                f"{which} of the {name} is {tuple(tensor.shape)}, expected {list(shape)}, "
                f"as in a perceptron {inputs} -> hidden -> {outputs}"
            )
    addresses = (pointer(t, torch.float32, f"{which} of the {name}") for t, which in zip(weights, names, strict=True))
    return Mlp(*addresses, hidden)
