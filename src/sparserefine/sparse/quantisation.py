"""8-bit arithmetic for inference: what a network must know of its activations, and how weights are rounded.

The input of every convolution but the stem comes out of a ReLU: unsigned 8 bits, with one step for each channel, the
largest value seen while calibrating / 255. The steps are folded into the weights, which become signed 8 bits with one
step for each output. The stem, the residual stream, the shortcuts and the head stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparserefine.sparse.layers import SparseConv
from sparserefine.sparse.unet import SparseUNet


def quantised_convs(network: SparseUNet) -> list[SparseConv]:
    """The convolutions that run in 8 bits: all but the stem."""
    return [m for m in network.modules() if isinstance(m, SparseConv) and m is not network.stem]


def is_calibrated(network: SparseUNet) -> bool:
    """Whether the largest activations are known."""
    return all(conv.input_max is not None for conv in quantised_convs(network))


@contextmanager
def calibrating(network: SparseUNet) -> Iterator[None]:
    """Every forward inside of the ``with`` counts; at its end the network knows its largest activations.

    Raises:
        ValueError: no forward saw a site, so there is nothing to know.
    """
    seen: dict[SparseConv, Tensor] = {}

    def observe(conv: nn.Module, inputs: tuple[Tensor, object]) -> None:
        assert isinstance(conv, SparseConv)
        x = inputs[0].detach().float()
        if len(x):
            largest = x.amax(0)
            seen[conv] = torch.maximum(seen[conv], largest) if conv in seen else largest

    convs = quantised_convs(network)
    with ExitStack() as stack:
        for conv in convs:
            stack.callback(conv.register_forward_pre_hook(observe).remove)
        yield
    if not all(conv in seen for conv in convs):
        raise ValueError("calibration saw no site at some level; give images of which pixels are selected")
    with torch.inference_mode(False):  # tensors of inference mode could not be changed later
        for conv in convs:
            conv.input_max = seen[conv].clone()


def step_of(conv: SparseConv) -> Tensor:
    """What one unit of the 8-bit input is worth, ``float32 [C_in]``; next to nothing for channels never active."""
    assert conv.input_max is not None
    return conv.input_max.float().clamp_min(1e-6) / 255


def quantised_weight(weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of 8 bits, and what 1 is worth then, ``float32 [C_out]``.

    Args:
        weight: ``float32 [T, C_in, C_out]``.
        step: of the inputs, see :func:`step_of`.

    Returns:
        ``int8 [T, C_in, C_out]``, and the outputs' steps.
    """
    folded = weight.detach() * step[None, :, None]
    scale = (folded.abs().amax((0, 1)) / 127).clamp_min(1e-30)
    return (folded / scale).round().to(torch.int8), scale
