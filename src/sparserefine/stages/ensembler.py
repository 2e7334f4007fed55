"""Ensembler: coarse and sparse logits at the sites -> refined logits at the sites (paper, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparserefine.images.uncertainty import entropy
from sparserefine.sparse import Engine, Perceptron
from sparserefine.stages.perceptron import column_perceptron

# Rows per chunk at inference. Hidden layers then take 8 MiB on the CPU, instead of N x 64 floats.
_CHUNK_ROWS = {"cpu": 1 << 15, "other": 1 << 20}


@dataclass(frozen=True)
class EnsemblerConfig:
    """How coarse and sparse logits are combined.

    Attributes:
        name: ``gated`` (learnt), ``minimum_entropy`` or ``mean``.
        fuser: of ``gated`` only. ``residual``: blend + f(blend), where f is zero at first; ``paper``: f(blend).
    """

    name: Literal["gated", "minimum_entropy", "mean"] = "gated"
    fuser: Literal["residual", "paper"] = "residual"

    def __post_init__(self) -> None:
        if self.name not in ("gated", "minimum_entropy", "mean"):
            raise ValueError(f"ensembler {self.name!r}, expected 'gated', 'minimum_entropy' or 'mean'")
        if self.fuser not in ("residual", "paper"):
            raise ValueError(f"fuser {self.fuser!r}, expected 'residual' or 'paper'")


class Ensembler(nn.Module):
    """Base class of ensemblers: ``(coarse [N, K], sparse [N, K]) -> refined [N, K]``, all logits."""

    def forward(self, coarse: Tensor, sparse: Tensor, engine: Engine | None = None) -> Tensor:
        """Refined logits ``[N, K]``. If the engine has a kernel for this, it may be used."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def macs(self, sites: int) -> int:
        """Multiply-accumulates for a number of sites."""
        return sites * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class GatedEnsembler(Ensembler):
    """Paper, section 3.3: w = sigmoid(MLP[p1, p2, H1, H2]); blend = w y1 + (1 - w) y2; a fuser MLP on the blend.

    Args:
        num_classes: K.
        fuser: ``residual``: blend + f(blend), the last layer of f initialised to zero; ``paper``: f(blend).
        hidden: width of both MLPs.
    """

    def __init__(self, num_classes: int, fuser: Literal["residual", "paper"] = "residual", hidden: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.residual = fuser == "residual"
        self.gate = nn.Sequential(nn.Linear(2 * (num_classes + 1), hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1))
        last = nn.Linear(hidden, num_classes)
        self.fuser = nn.Sequential(nn.Linear(num_classes, hidden), nn.ReLU(inplace=True), last)
        if self.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, coarse: Tensor, sparse: Tensor, engine: Engine | None = None) -> Tensor:
        """Refined logits ``[N, K]``, computed by the engine's kernel if it has one.

        Raises:
            ValueError: the logits are not both ``[N, K]``, or an MLP has other inputs or outputs than it was made with.
        """
        if coarse.dim() != 2 or coarse.shape != sparse.shape or coarse.shape[1] != self.num_classes:
            raise ValueError(
                f"coarse logits are {tuple(coarse.shape)}, sparse ones {tuple(sparse.shape)}; "
                f"expected [N, {self.num_classes}] of both"
            )
        if engine is not None:
            gate, fuser = _perceptron(self.gate), _perceptron(self.fuser)
            _check_perceptron("gate", gate, 2 * (self.num_classes + 1), 1)
            _check_perceptron("fuser", fuser, self.num_classes, self.num_classes)
            refined = engine.gated(coarse, sparse, gate, fuser, self.residual)
            if refined is not None:
                return refined
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and coarse.device.type == "cpu":
            return self._learning(coarse, sparse, engine)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._refined(coarse, sparse)
        rows = _CHUNK_ROWS.get(coarse.device.type, _CHUNK_ROWS["other"])
        chunks = zip(torch.split(coarse, rows), torch.split(sparse, rows), strict=True)
        return torch.cat([self._refined(c, s) for c, s in chunks])

    def _refined(self, coarse: Tensor, sparse: Tensor) -> Tensor:
        c, s = coarse.t().contiguous(), sparse.t().contiguous()
        w = torch.sigmoid(self.gate(_gate_input(c, s).t()))
        blend = w * coarse + (1 - w) * sparse
        refined: Tensor = blend + self.fuser(blend) if self.residual else self.fuser(blend)
        return refined

    def _learning(self, coarse: Tensor, sparse: Tensor, engine: Engine | None) -> Tensor:
        """The same in training on the CPU, in columns ``[K, N]`` throughout."""

        def perceptron(x: Tensor, network: nn.Sequential) -> Tensor:
            result = None if engine is None else engine.perceptron(x, _perceptron(network))
            return column_perceptron(x, *_perceptron(network)) if result is None else result

        c, s = coarse.t().contiguous(), sparse.t().contiguous()
        w = torch.sigmoid(perceptron(_gate_input(c, s), self.gate))
        blend = w * c + (1 - w) * s
        change = perceptron(blend, self.fuser)
        return (blend + change if self.residual else change).t()


def _gate_input(coarse: Tensor, sparse: Tensor) -> Tensor:
    """Probabilities and entropies of logits ``[K, N]``: ``[2 K + 2, N]``.

    Columns, because softmax and entropy over the short rows of ``[N, K]`` are slow.
    """
    entropies = entropy(coarse, 0)[None], entropy(sparse, 0)[None]
    return torch.cat([coarse.softmax(0), sparse.softmax(0), *entropies])


class MinimumEntropyEnsembler(Ensembler):
    """At each site, the logits with the lower entropy; the sparse ones if both are equal."""

    def forward(self, coarse: Tensor, sparse: Tensor, engine: Engine | None = None) -> Tensor:
        """Refined logits ``[N, K]``."""
        return torch.where((entropy(coarse, 1) < entropy(sparse, 1))[:, None], coarse, sparse)


class MeanEnsembler(Ensembler):
    """Logarithm of the mean of both probability vectors."""

    def forward(self, coarse: Tensor, sparse: Tensor, engine: Engine | None = None) -> Tensor:
        """Refined logits ``[N, K]``."""
        both = torch.stack([coarse.log_softmax(1), sparse.log_softmax(1)])
        return both.logsumexp(0) - math.log(2)


def _perceptron(network: nn.Sequential) -> Perceptron:
    weight1, bias1, weight2, bias2 = network.parameters()
    return weight1, bias1, weight2, bias2


def _check_perceptron(name: str, mlp: Perceptron, inputs: int, outputs: int) -> None:
    """Engines read the weights by these shapes, whatever modules have been put in place of ours."""
    hidden = len(mlp[1])
    expected = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    for part, tensor, shape in zip(
        ("first weight", "first bias", "last weight", "last bias"), mlp, expected, strict=True
    ):
        if tensor.shape != shape:
            raise ValueError(f"{part} of the {name} is {tuple(tensor.shape)}, expected {list(shape)}")


def build_ensembler(config: EnsemblerConfig, num_classes: int) -> Ensembler:
    """The ensembler that ``config`` names."""
    if config.name == "gated":
        return GatedEnsembler(num_classes, config.fuser)
    if config.name == "minimum_entropy":
        return MinimumEntropyEnsembler()
    return MeanEnsembler()
