"""The GPU engine: kernels in Triton; what it lacks it inherits from the torch engine."""

from __future__ import annotations

import torch

from sparserefine.native.library import Unavailable
from sparserefine.sparse.gpu.launch import INTERPRETED
from sparserefine.sparse.torch_engine import TorchEngine


class TritonEngine(TorchEngine):
    """Engine ``triton``. Tensors of other devices and dtypes go to the torch engine's code.

    Raises:
        sparserefine.native.library.Unavailable: there is no GPU.
    """

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise Unavailable("there is no GPU that torch can use")
