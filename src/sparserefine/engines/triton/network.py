"""Runs whole networks for inference on the GPU: one launch for each step of ``sparse/fused.py``."""

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
    """A step with its parameters in the dtype and layout of the kernels."""

    step: Step
    weight: Tensor
    bias: Tensor | None
    norms: Sequence[tuple[Tensor, Tensor]]


class PackedNetwork:
    """A network in evaluation mode: ``(features [N, F], plan, context) -> logits float32 [N, K]``.

    Args:
        network: its weights are shared if they have the right dtype and layout already, otherwise copied.
        dtype: of features and weights: float16, bfloat16 or float32. Sums and normalisation are always float32.

    Attributes:
        dtype: as given.
        megabytes: size of the copied weights [MB].
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

    def __call__(self, features: Tensor, plan: Plan, context: Sequence[Tensor] | None = None) -> Tensor:
        """Logits ``float32 [N, K]``. With a padded plan, rows past the number of sites are undefined.

        Args:
            features: ``[N, F]``, floating point.
            plan: the plan of the N sites, built by this engine.
            context: of each level, ``[n_l, C]``, floating point, if the network takes one.

        Raises:
            ValueError: features, plan or context do not fit this network.
        """
        self.program.check(features, plan, GpuStencil, NAME, context)
        features, live = self._input(features), dict[int, Tensor]()
        context = context and [self._input(values) for values in context]
        for layer in self._layers:
            for buffer in layer.step.begins:
                live[buffer] = self._new(buffer, plan, features.device)
            _run(layer, layer.step.input(features, context, live), live, plan)
            for buffer in layer.step.ends:
                del live[buffer]  # torch reuses its memory for the next buffers
        return live[self.program.result]

    def _input(self, values: Tensor) -> Tensor:
        return values.detach().to(self.dtype).contiguous()

    def _new(self, number: int, plan: Plan, device: torch.device) -> Tensor:
        buffer = self.program.buffers[number]
        dtype = torch.float32 if number == self.program.result else self.dtype
        return torch.empty(plan.levels[buffer.level].around.num_outputs, buffer.channels, dtype=dtype, device=device)


def _run(layer: _Layer, x: Tensor, live: dict[int, Tensor], plan: Plan) -> None:
    """Runs one step. A separate function, so that no local variable keeps a buffer alive after the step."""

    def view_of(part: Part) -> Tensor:
        return live[part.buffer][:, part.start : part.stop]

    step, around, stencil = layer.step, plan.levels[layer.step.level].around, layer.step.stencil(plan)
    assert isinstance(around, GpuStencil)
    assert stencil is None or isinstance(stencil, GpuStencil)
    epilogue = Epilogue(
        None if step.residual is None else live[step.residual],
        layer.bias,
        None if step.raw is None else view_of(step.raw),
        tuple(Activation(view_of(part), *factors) for part, factors in zip(step.activated, layer.norms, strict=True)),
    )
    convolve(
        x,
        layer.weight,
        epilogue,
        around.num_outputs,
        table=None if stencil is None else stencil.table,
        order=None if stencil is None else stencil.order,
        count=around.count,
    )
