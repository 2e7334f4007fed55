"""Multiply-accumulates of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def count_macs(model: Callable[..., Any], shape: tuple[int, ...]) -> int | None:
    """Multiply-accumulates of convolutions and matrix products of ``model(float32 shape)``.

    A module is counted on the meta device (no memory, no time); what cannot run there is run once for real.
    """
    if hasattr(model, "digest"):  # a file that another library runs: torch would count nothing
        return None
    from torch.utils.flop_counter import FlopCounterMode  # not before it is needed: it imports triton

    counter = FlopCounterMode(display=False)
    try:
        if not isinstance(model, nn.Module):
            raise TypeError("a plain callable may hold tensors that are not on the meta device")
        state = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
        with torch.no_grad(), counter:
            functional_call(model, state, (torch.empty(shape, device="meta"),))
    except Exception:  # whatever a foreign model does on meta, counting by running it is right
        counter = FlopCounterMode(display=False)
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = tensors[0].device if tensors else torch.device("cpu")
        try:
            with torch.no_grad(), counter:
                model(torch.zeros(shape, device=device))
        except Exception:  # what cannot be counted is reported as unknown, and must not stop a prediction
            return None
    flops = counter.get_total_flops()
    return flops // 2 if flops else None
