"""Networks for the tests of engines, and what their logits must be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Plan, Sites, SparseUNet

K = 4
"""Classes of the networks."""


def network(
    planes: tuple[int, ...], blocks: int = 1, down: str = "cell", context: int = 0, inputs: int = 3
) -> SparseUNet:
    """With normalisation layers, and a context, that do something."""
    torch.manual_seed(3)
    net = SparseUNet(inputs, K, planes, blocks=blocks, down=down, context=context)
    for parameter in net.context.parameters():
        nn.init.normal_(parameter)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


def context_of(net: SparseUNet, plan: Plan) -> list[Tensor] | None:
    """Random values for each active cell of each level."""
    random = torch.Generator().manual_seed(11)
    values = [torch.randn(n, net.context_channels, generator=random) for n in plan.rows]
    return [one.to(plan.sites.coords.device) for one in values] if net.context_channels else None


def expected_of(net: SparseUNet, x: Tensor, mask: Tensor) -> Tensor:
    """Logits of the modules in float64, on the torch engine and the CPU."""
    exact = copy.deepcopy(net).double().cpu()
    plan = get_engine("torch").geometry(Sites.from_mask(mask.cpu()), net.spec)
    context = context_of(net, plan)
    with torch.no_grad():
        return exact(x.double().cpu(), plan, context and [values.double() for values in context])
