"""Networks for the tests of engines, and what their logits must be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Sites, SparseUNet

K = 4
"""Classes of the networks."""


def network(planes: tuple[int, ...], blocks: int = 1, down: str = "cell") -> SparseUNet:
    """With normalisation layers that do something."""
    torch.manual_seed(3)
    net = SparseUNet(3, K, planes, blocks=blocks, down=down)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


def expected_of(net: SparseUNet, x: Tensor, mask: Tensor) -> Tensor:
    """Logits of the modules in float64, on the torch engine and the CPU."""
    exact = copy.deepcopy(net).double().cpu()
    with torch.no_grad():
        return exact(x.double().cpu(), get_engine("torch").geometry(Sites.from_mask(mask.cpu()), net.spec))
