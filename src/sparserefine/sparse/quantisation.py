"""8-bit arithmetic for inference: calibration of the activations, and rounding of the weights.

Every convolution except the stem reads the output of a ReLU. Its inputs are unsigned 8-bit integers with one step per
channel: the largest value seen in calibration / 255. The steps are folded into the weights, which become signed 8-bit
integers with one step per output channel. The stem, the residual stream, the shortcuts and the head stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparserefine.sparse.layers import SparseConv
from sparserefine.sparse.unet import SparseUNet


def quantised_convs(network: SparseUNet) -> list[SparseConv]:
    """The convolutions that run in 8 bits: all except the stem."""
    return [m for m in network.modules() if isinstance(m, SparseConv) and m is not network.stem]


def is_calibrated(network: SparseUNet) -> bool:
    """Whether the largest input of every 8-bit convolution is known."""
    return all(conv.input_max is not None for conv in quantised_convs(network))


@contextmanager
def calibrating(network: SparseUNet) -> Iterator[None]:
    """Records the largest activations of the forward passes in the ``with`` block. At its end, the network stores them.

    Raises:
        ValueError: some convolution saw no site, so its largest input is unknown; or activations are NaN or infinite.
            Nothing is stored then.
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
        raise ValueError("calibration saw no site at some level; give images in which pixels are selected")
    if not all(bool(largest.isfinite().all()) for largest in seen.values()):
        raise ValueError(
            "calibration saw activations that are NaN or infinite; check the extractor's weights, and the images' mean "
            "and std"
        )
    with torch.inference_mode(False):  # inference-mode tensors could not be changed later
        for conv in convs:
            conv.input_max = seen[conv].clone()


def step_of(conv: SparseConv) -> Tensor:
    """Quantisation step of the 8-bit input, ``float32 [C_in]``; tiny but positive for channels never active."""
    assert conv.input_max is not None
    return conv.input_max.float().clamp_min(1e-6) / 255


def quantised_weight(weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds weights to 8 bits.

    Args:
        weight: ``float32 [T, C_in, C_out]``.
        step: of the inputs, ``float32 [C_in]``, see :func:`step_of`.

    Returns:
        The weights, ``int8 [T, C_in, C_out]``, and their steps, ``float32 [C_out]``: a sum of products times the step
        is the output.
    """
    folded = weight.detach() * step[None, :, None]
    scale = (folded.abs().amax((0, 1)) / 127).clamp_min(1e-30)
    return (folded / scale).round().to(torch.int8), scale
