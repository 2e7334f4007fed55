"""Two dense networks as one teacher: ``--teacher.name python:examples.hrf.ensemble:two``, from the project's root."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparserefine.bases.families.unet import load_unet

FILES = ("runs/hrf/dense2/best.safetensors", "runs/hrf/dense2_seed1/best.safetensors")


class Mean(nn.Module):
    """The logarithm of the mean of the probabilities of several networks, ``[B, K, h, w]``."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """Image ``[B, 3, h, w]``, normalised."""
        return torch.stack([network(image).softmax(1) for network in self.networks]).mean(0).log()


def two() -> nn.Module:
    """The best dense network and the same of another seed."""
    return Mean([load_unet(file) for file in FILES])
