"""A whole sparse U-Net for inference on the GPU: normalisation, ReLU, residuals and skips fused into convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparserefine.engines.triton.convolution import convolve, laid_out
from sparserefine.engines.triton.geometry import GpuStencil
from sparserefine.sparse.epilogue import Activation, Epilogue
from sparserefine.sparse.layers import ResidualBlock, SparseBatchNorm, SparseConv
from sparserefine.sparse.plan import Plan, Stencil
from sparserefine.sparse.unet import SparseUNet


class _Norm:
    """Batch normalisation with running statistics as ``x * scale + shift``."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, SparseBatchNorm)
        scale, shift = norm.folded()
        self.scale, self.shift = scale.float(), shift.float()

    def into(self, out: Tensor, part: slice = slice(None)) -> Activation:
        """An epilogue's output: the activation of some channels."""
        return Activation(out, self.scale[part], self.shift[part])


class _Block:
    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, ResidualBlock)
        self.norm1, self.norm2 = _Norm(block.norm1), _Norm(block.norm2)
        self.conv1, self.conv2 = _weight(block.conv1, dtype), _weight(block.conv2, dtype)
        self.shortcut = _weight(block.shortcut, dtype) if isinstance(block.shortcut, nn.Linear) else None


def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """``[T, C_in, C_out]``; of a linear layer one tap. Shares memory with the layer where nothing must change."""
    assert isinstance(layer, SparseConv | nn.Linear)
    weight = layer.weight.detach().to(dtype)
    return laid_out(weight.t()[None] if isinstance(layer, nn.Linear) else weight)


class PackedUNet:
    """:class:`SparseUNet` in evaluation mode: ``(features [N, F], plan) -> logits float32 [N, K]``.

    Args:
        network: its weights are shared where their precision and layout are already right, else copied.
        dtype: float16, bfloat16 or float32: of features and weights. Sums and normalisation are float32.

    Attributes:
        megabytes: of weights that were copied [1e6 bytes].
    """

    def __init__(self, network: SparseUNet, dtype: torch.dtype) -> None:
        self.dtype, self.spec = dtype, network.spec
        self.stem = _weight(network.stem, dtype)
        self.descend = [[_Block(b, dtype) for b in blocks.children()] for blocks in network.descend]
        self.ascend = [[_Block(b, dtype) for b in blocks.children()] for blocks in network.ascend]
        self.down_norms, self.up_norms = ([*map(_Norm, norms)] for norms in (network.down_norms, network.up_norms))
        self.down, self.up = ([_weight(c, dtype) for c in convs] for convs in (network.down_convs, network.up_convs))
        self.head_norm, self.head = _Norm(network.head_norm), _weight(network.head, dtype)
        self.head_bias = network.head.bias.detach().float()
        self.planes = [blocks[0].conv2.shape[2] for blocks in self.descend]
        own = {parameter.data_ptr() for parameter in network.parameters()}
        self.megabytes = sum(w.nbytes for w in self._weights() if w.data_ptr() not in own) / 1e6

    def _weights(self) -> Iterator[Tensor]:
        yield from (self.stem, self.head, *self.down, *self.up)
        for block in (block for level in (*self.descend, *self.ascend) for block in level):
            yield from (block.conv1, block.conv2, *([] if block.shortcut is None else [block.shortcut]))

    def __call__(self, features: Tensor, plan: Plan) -> Tensor:
        """Logits ``float32 [N, K]``; of a padded plan, the rows behind its count of sites mean nothing.

        Args:
            features: ``[N, F]``, floating point.
            plan: of the N sites, by this engine.

        Raises:
            ValueError: features or plan do not fit.
        """
        if plan.spec != self.spec:
            raise ValueError(f"plan was built for {plan.spec}, this network needs {self.spec}")
        around, inputs = plan.levels[0].around, self.stem.shape[1]
        if not isinstance(around, GpuStencil):
            raise ValueError(f"plan was built by engine {plan.engine!r}; build it by engine 'triton'")
        if features.dim() != 2 or features.shape != (around.num_outputs, inputs):
            raise ValueError(f"features are {tuple(features.shape)}, expected [{around.num_outputs}, {inputs}]")
        return _Run(self, plan, features.device)(features.detach().to(self.dtype).contiguous())


class _Run:
    """One forward. Buffers are freed as soon as they are read: torch hands their memory to the next ones."""

    def __init__(self, net: PackedUNet, plan: Plan, device: torch.device) -> None:
        self._net, self._plan, self._device = net, plan, device
        self._last = len(plan.levels) - 1

    def __call__(self, features: Tensor) -> Tensor:
        net = self._net
        raw, active = self._new(0), self._new(0)
        entry = Epilogue(raw=raw, activated=(net.descend[0][0].norm1.into(active),))
        self._convolve(features, net.stem, entry, self._plan.levels[0].around)
        skips: list[tuple[Tensor, Tensor]] = []
        for depth in range(self._last):
            raw, active = self._descend(depth, raw, active, skips)
        leaving = self._new(self._last)
        self._blocks(self._last, net.descend[self._last], raw, active, self._leaving(self._last, leaving))
        for depth in reversed(range(self._last)):
            leaving = self._ascend(depth, leaving, *skips.pop())
        return self._head(leaving)

    def _descend(
        self, depth: int, raw: Tensor, active: Tensor, skips: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The blocks of a level and the way down: raw and activated features of the next level."""
        net, c, down = self._net, self._net.planes[depth], self._plan.levels[depth].down
        assert down is not None
        skip, skip_active, leaving = self._new(depth, 2), self._new(depth, 2), self._new(depth)
        outputs = (
            net.down_norms[depth].into(leaving),
            net.ascend[depth][0].norm1.into(skip_active[:, :c], slice(0, c)),
        )
        self._blocks(depth, net.descend[depth], raw, active, Epilogue(raw=skip[:, :c], activated=outputs))
        skips.append((skip, skip_active))
        raw, active = self._new(depth + 1), self._new(depth + 1)
        entry = Epilogue(raw=raw, activated=(net.descend[depth + 1][0].norm1.into(active),))
        self._convolve(leaving, net.down[depth], entry, down)
        return raw, active

    def _ascend(self, depth: int, coarse: Tensor, skip: Tensor, skip_active: Tensor) -> Tensor:
        """The way up and the blocks of a level: what the next finer one, or the head, reads."""
        net, blocks, c, down = (
            self._net,
            self._net.ascend[depth],
            self._net.planes[depth],
            self._plan.levels[depth].down,
        )
        assert down is not None
        active = blocks[0].norm1.into(skip_active[:, c:], slice(c, 2 * c))
        self._convolve(coarse, net.up[depth], Epilogue(raw=skip[:, c:], activated=(active,)), down.transposed())
        residual, shortcut = skip, blocks[0].shortcut
        if shortcut is not None:
            residual = self._new(depth)
            self._convolve(skip, shortcut, Epilogue(raw=residual), self._plan.levels[depth].around, own=True)
        leaving = self._new(depth)
        self._blocks(depth, blocks, residual, skip_active, self._leaving(depth, leaving))
        return leaving

    def _head(self, leaving: Tensor) -> Tensor:
        net, around = self._net, self._plan.levels[0].around
        logits = torch.empty(around.num_outputs, net.head.shape[2], device=self._device)
        self._convolve(leaving, net.head, Epilogue(bias=net.head_bias, raw=logits), around, own=True)
        return logits

    def _leaving(self, depth: int, out: Tensor) -> Epilogue:
        """What the last block of a level writes for the next finer level, or for the head."""
        norm = self._net.up_norms[depth - 1] if depth else self._net.head_norm
        return Epilogue(activated=(norm.into(out),))

    def _blocks(self, depth: int, blocks: list[_Block], raw: Tensor, active: Tensor, last: Epilogue) -> None:
        for block, after in pairwise(blocks):
            next_raw, next_active = self._new(depth), self._new(depth)
            self._block(depth, block, raw, active, Epilogue(raw=next_raw, activated=(after.norm1.into(next_active),)))
            raw, active = next_raw, next_active
        self._block(depth, blocks[-1], raw, active, last)

    def _block(self, depth: int, block: _Block, residual: Tensor, active: Tensor, epilogue: Epilogue) -> None:
        around, between = self._plan.levels[depth].around, self._new(depth)
        self._convolve(active, block.conv1, Epilogue(activated=(block.norm2.into(between),)), around)
        self._convolve(between, block.conv2, replace(epilogue, residual=residual), around)

    def _new(self, depth: int, widths: int = 1) -> Tensor:
        rows, channels = self._plan.levels[depth].around.num_outputs, widths * self._net.planes[depth]
        return torch.empty(rows, channels, dtype=self._net.dtype, device=self._device)

    def _convolve(self, x: Tensor, weight: Tensor, epilogue: Epilogue, stencil: Stencil, *, own: bool = False) -> None:
        """With ``own`` each row reads itself, as linear layers do."""
        assert isinstance(stencil, GpuStencil)
        convolve(
            x,
            weight,
            epilogue,
            stencil.num_outputs,
            table=None if own else stencil.table,
            order=None if own else stencil.order,
            count=stencil.count,
        )
