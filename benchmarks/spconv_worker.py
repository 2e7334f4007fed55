"""The same network in spconv or spconv-triton, for comparison; run by an interpreter that has it (see README.md).

This file imports nothing of sparserefine, whose dependencies that environment may lack. spconv-triton has the interface
of spconv, so one network serves both; ``library`` is the module's name, ``spconv`` or ``spconv_triton``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import read_mask, site_features

SparseTensor = Any  # the library's SparseConvTensor


def _activated(x: SparseTensor, norm: nn.Module) -> SparseTensor:
    return x.replace_feature(F.relu(norm(x.features), inplace=True))


class _Block(nn.Module):
    """The same layers as ``sparserefine.sparse.ResidualBlock``, under the same names."""

    def __init__(self, spconv: Any, c_in: int, c_out: int, key: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm1d(c_in), spconv.SubMConv2d(c_in, c_out, 3, bias=False, indice_key=key)
        self.norm2, self.conv2 = nn.BatchNorm1d(c_out), spconv.SubMConv2d(c_out, c_out, 3, bias=False, indice_key=key)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Linear(c_in, c_out, bias=False)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features ``[N, C_in]`` -> ``[N, C_out]`` at the same sites."""
        y = self.conv2(_activated(self.conv1(_activated(x, self.norm1)), self.norm2))
        return y.replace_feature(y.features + self.shortcut(x.features))


class SpconvUNet(nn.Module):
    """The same layers as ``sparserefine.sparse.SparseUNet``, under the same names."""

    def __init__(
        self, library: str, channels: int, classes: int, planes: Sequence[int], blocks: int, down: str
    ) -> None:
        super().__init__()
        spconv = import_module(f"{library}.pytorch")
        pairs, size = list(pairwise(planes)), 3 if down == "paper" else 2
        self.stem = spconv.SubMConv2d(channels, planes[0], 3, bias=False, indice_key="same0")
        self.descend = nn.ModuleList(_blocks(spconv, c, c, blocks, f"same{i}") for i, c in enumerate(planes))
        self.down_norms = nn.ModuleList(nn.BatchNorm1d(fine) for fine, _ in pairs)
        self.down_convs = nn.ModuleList(
            spconv.SparseConv2d(fine, coarse, size, 2, bias=False, indice_key=f"down{i}")
            for i, (fine, coarse) in enumerate(pairs)
        )
        self.up_norms = nn.ModuleList(nn.BatchNorm1d(coarse) for _, coarse in pairs)
        self.up_convs = nn.ModuleList(
            spconv.SparseInverseConv2d(coarse, fine, size, bias=False, indice_key=f"down{i}")
            for i, (fine, coarse) in enumerate(pairs)
        )
        self.ascend = nn.ModuleList(
            _blocks(spconv, 2 * fine, fine, blocks, f"same{i}") for i, (fine, _) in enumerate(pairs)
        )
        self.head_norm = nn.BatchNorm1d(planes[0])
        self.head = nn.Linear(planes[0], classes)

    def forward(self, x: SparseTensor) -> Tensor:
        """Logits ``[N, K]``."""
        x = self.stem(x)
        skips: list[Tensor] = []
        for depth, blocks in enumerate(self.descend):
            for block in blocks:
                x = block(x)
            if depth < len(self.down_convs):
                skips.append(x.features)
                x = self.down_convs[depth](_activated(x, self.down_norms[depth]))
        for depth in reversed(range(len(skips))):
            x = self.up_convs[depth](_activated(x, self.up_norms[depth]))
            x = x.replace_feature(torch.cat([skips.pop(), x.features], dim=1))
            for block in self.ascend[depth]:
                x = block(x)
        logits: Tensor = self.head(_activated(x, self.head_norm).features)
        return logits

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Loads weights of a ``SparseUNet``, converting ``[T, C_in, C_out]`` to spconv's ``[C_out, k, k, C_in]``."""
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        converted = {
            name: value.permute(2, 0, 1).reshape(shapes[name]) if value.dim() == 3 else value
            for name, value in state.items()
        }
        self.load_state_dict(converted)


def _blocks(spconv: Any, c_in: int, c_out: int, count: int, key: str) -> nn.ModuleList:
    return nn.ModuleList(_Block(spconv, c_in if i == 0 else c_out, c_out, key) for i in range(count))


class SpconvTask:
    """Times spconv on the CPU, the neighbour search separately. Same arguments as ``sparse_unet.EngineTask``."""

    def __init__(
        self,
        engine: str,
        mask: str,
        weights: str,
        channels: int,
        classes: int,
        planes: list[int],
        blocks: int,
        down: str,
    ) -> None:
        if torch.get_num_threads() != 1:
            raise ValueError(
                f"{engine} computes wrong results with several threads (a data race in its scatter); use one thread"
            )
        self._spconv, self._ops = import_module("spconv.pytorch"), import_module("spconv.pytorch.ops")
        self._network = SpconvUNet("spconv", channels, classes, planes, blocks, down).eval()
        self._network.load_weights(torch.load(weights, weights_only=True))
        image = read_mask(mask)
        rows_columns = image.nonzero().int()
        # spconv silently computes wrong results if this is not contiguous.
        self._indices = F.pad(rows_columns, (1, 0)).contiguous()
        self._size = list(image.shape)
        self._features = site_features(len(self._indices), channels)
        self._pairs_seconds = 0.0
        self._get_pairs = self._ops.get_indice_pairs

    def start(self) -> None:
        """Wraps spconv's neighbour search to time it: spconv runs it inside the forward."""
        self._ops.get_indice_pairs = self._timed_pairs

    def _timed_pairs(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        pairs = self._get_pairs(*arguments, **options)
        self._pairs_seconds += time.perf_counter() - start
        return pairs

    def round(self) -> dict[str, float]:
        """One forward on a new tensor, so that spconv searches for neighbours again."""
        self._logits, self._pairs_seconds = None, 0.0
        with torch.inference_mode():
            start = time.perf_counter()
            self._logits = self._network(self._spconv.SparseConvTensor(self._features, self._indices, self._size, 1))
            total = time.perf_counter() - start
        return {"geometry_ms": 1e3 * self._pairs_seconds, "forward_ms": 1e3 * (total - self._pairs_seconds)}

    def output(self) -> Tensor | None:
        """Logits ``[N, K]`` of the last round."""
        return self._logits

    def details(self) -> dict[str, Any]:
        """There are none."""
        return {}


class SpconvGpu:
    """Checks only that the library can be imported and that torch sees a GPU."""

    def __init__(self, library: str) -> None:
        if not torch.cuda.is_available():
            raise ValueError(f"torch in {library}'s environment sees no GPU; install a CUDA build of torch there")
        import_module(f"{library}.pytorch")


class SpconvGpuTask:
    """Times spconv or spconv-triton on a GPU, neighbour search included.

    Args:
        library: ``spconv`` or ``spconv_triton``.
        inputs: file with a list of pairs, mask ``bool [B, H, W]`` and features ``[N, C]``; used in turn.
        weights: file with the state dict of a ``SparseUNet``.
        channels: C.
        classes: K.
        planes: channels of each level.
        blocks: residual blocks of each level and direction.
        down: kind of down-sampling.
        dtype: ``float16``, or ``tf32``: float32, with TF32 allowed in products.
    """

    def __init__(
        self,
        library: str,
        inputs: str,
        weights: str,
        channels: int,
        classes: int,
        planes: list[int],
        blocks: int,
        down: str,
        dtype: str,
    ) -> None:
        self._spconv = import_module(f"{library}.pytorch")
        import_module(f"{library}.constants").SPCONV_ALLOW_TF32 = dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        kind = torch.float16 if dtype == "float16" else torch.float32
        network = SpconvUNet(library, channels, classes, planes, blocks, down).eval()
        network.load_weights(torch.load(weights, weights_only=True))
        self._network = network.to("cuda", kind)
        self._sets = []
        for mask, features in torch.load(inputs, weights_only=True):
            indices = mask.cuda().nonzero().int().contiguous()
            self._sets.append((features.to("cuda", kind), indices, list(mask.shape[1:]), len(mask)))

    def _forward(self, number: int) -> Tensor:
        """Runs one set in a new tensor: spconv caches neighbours in the tensor."""
        features, indices, size, batch = self._sets[number % len(self._sets)]
        with torch.inference_mode():
            logits: Tensor = self._network(self._spconv.SparseConvTensor(features, indices, size, batch))
        return logits

    def start(self) -> None:
        """Runs every set once: the libraries tune their kernels on the first run of each shape."""
        for number in range(len(self._sets)):
            self._forward(number)
        self._measured(1)

    def round(self) -> dict[str, Any]:
        """Runs all repetitions: 30 to 100, fewer if one takes more than 100 ms."""
        (once,) = self._measured(1)
        count = min(100, max(30, int(300 / max(once, 1e-3)))) if once <= 100 else max(5, int(3000 / once))
        self._measured(3)
        return {"laps": self._measured(count)}

    def _measured(self, count: int) -> list[float]:
        """Times ``count`` forwards [ms] with CUDA events."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for number, (start, end) in enumerate(events):
            start.record()
            self._forward(number)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def output(self) -> Tensor:
        """Logits ``[N, K]`` of the first set."""
        return self._forward(0).cpu()

    def details(self) -> dict[str, Any]:
        """Peak GPU memory beyond network and inputs [MB]."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._forward(0)
        torch.cuda.synchronize()
        return {"gpu_peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
