"""Multiply-accumulates of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def count_macs(model: Callable[..., Any], shape: tuple[int, ...]) -> int | None:
    """Multiply-accumulates of convolutions and matrix products of ``model(float32 shape)``.

    A module is counted on the meta device, which takes no memory and hardly any time. A model that cannot run there
    is run once on its own device. ``None``: the model cannot be counted, for example an ONNX file.
    """
    if hasattr(model, "digest"):  # another library runs this file: torch would count nothing
        return None
    from torch.utils.flop_counter import FlopCounterMode  # imported here because it imports triton

    counter = FlopCounterMode(display=False)
    try:
        if not isinstance(model, nn.Module):
            raise TypeError("a plain callable may hold tensors that are not on the meta device")
        state = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
        with torch.no_grad(), counter:
            functional_call(model, state, (torch.empty(shape, device="meta"),))
    except Exception:  # a foreign model may fail on meta in any way; running it still counts right
        counter = FlopCounterMode(display=False)
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = tensors[0].device if tensors else torch.device("cpu")
        try:
            with torch.no_grad(), counter:
                model(torch.zeros(shape, device=device))
        except Exception:  # counting must not stop a prediction
            return None
    flops = counter.get_total_flops()
    return flops // 2 if flops else None
