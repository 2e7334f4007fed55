"""Whole networks for inference on the GPU: the steps of ``sparse/fused.py``, one launch each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.engines.triton.convolution import convolve, laid_out
from sparserefine.engines.triton.geometry import NAME, GpuStencil
from sparserefine.sparse.epilogue import Activation, Epilogue
from sparserefine.sparse.fused import Part, Step, fuse
from sparserefine.sparse.plan import Plan
from sparserefine.sparse.unet import SparseUNet


@dataclass(frozen=True)
class _Layer:
    """A step with its numbers in the precision and layout of the kernels."""

    step: Step
    weight: Tensor
    bias: Tensor | None
    norms: Sequence[tuple[Tensor, Tensor]]


class PackedNetwork:
    """A network in evaluation mode: ``(features [N, F], plan) -> logits float32 [N, K]``.

    Args:
        network: its weights are shared where their precision and layout are already right, else copied.
        dtype: float16, bfloat16 or float32: of features and weights. Sums and normalisation are float32.

    Attributes:
        dtype: as given.
        megabytes: of weights that were copied [1e6 bytes].
    """

    def __init__(self, network: SparseUNet, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.program, weights = fuse(network)
        self._layers = [
            _Layer(
                step,
                laid_out(own.weight.to(dtype)),
                None if own.bias is None else own.bias.float(),
                [norm.factors() for norm in own.norms],
            )
            for step, own in zip(self.program.steps, weights, strict=True)
        ]
        shared = {parameter.data_ptr() for parameter in network.parameters()}
        self.megabytes = sum(la.weight.nbytes for la in self._layers if la.weight.data_ptr() not in shared) / 1e6

    def __call__(self, features: Tensor, plan: Plan) -> Tensor:
        """Logits ``float32 [N, K]``; of a padded plan, the rows behind its count of sites mean nothing.

        Args:
            features: ``[N, F]``, floating point.
            plan: of the N sites, by this engine.

        Raises:
            ValueError: features or plan do not fit.
        """
        self.program.check(features, plan, GpuStencil, NAME)
        features, held = features.detach().to(self.dtype).contiguous(), dict[int, Tensor]()
        for layer in self._layers:
            for buffer in layer.step.begins:
                held[buffer] = self._new(buffer, plan, features.device)
            _run(layer, features, held, plan)
            for buffer in layer.step.ends:
                del held[buffer]  # torch hands its memory to the next ones
        return held[self.program.result]

    def _new(self, number: int, plan: Plan, device: torch.device) -> Tensor:
        buffer = self.program.buffers[number]
        dtype = torch.float32 if number == self.program.result else self.dtype
        return torch.empty(plan.levels[buffer.level].around.num_outputs, buffer.channels, dtype=dtype, device=device)


def _run(layer: _Layer, features: Tensor, held: dict[int, Tensor], plan: Plan) -> None:
    """One step. A function of its own, so that nothing here keeps a buffer longer than it is needed."""

    def some(part: Part) -> Tensor:
        return held[part.buffer][:, part.start : part.stop]

    step, around, stencil = layer.step, plan.levels[layer.step.level].around, layer.step.stencil(plan)
    assert isinstance(around, GpuStencil)
    assert stencil is None or isinstance(stencil, GpuStencil)
    epilogue = Epilogue(
        None if step.residual is None else held[step.residual],
        layer.bias,
        None if step.raw is None else some(step.raw),
        tuple(Activation(some(part), *factors) for part, factors in zip(step.activated, layer.norms, strict=True)),
    )
    convolve(
        features if step.source is None else held[step.source],
        layer.weight,
        epilogue,
        around.num_outputs,
        table=None if stencil is None else stencil.table,
        order=None if stencil is None else stencil.order,
        count=around.count,
    )
