"""Defines what the cells of a level see of the pixels that they cover: mean channels and mean probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Engine
from sparserefine.sparse.sites import PaddedSites, Sites

_CHUNK_VALUES = 1 << 20  # of the pixels that are looked at together: 4 MiB for any image size
_GPU_CHUNKS = 64  # times more on a GPU, where launching kernels costs more than computing


def block_means(
    engine: Engine,
    image: Tensor,
    coarse: Coarse,
    valid: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    cells: Sequence[Sites | PaddedSites],
) -> list[Tensor]:
    """See :meth:`sparserefine.sparse.interface.Engine.block_means`. The engine reads pixels and coarse logits.

    Each level looks at the pixels of its own active cells only, so most of an image is never looked at. The host does
    not wait for a GPU.
    """
    (height, width), values = coarse.size, len(scale) + coarse.num_classes
    device = coarse.device
    at_once = max(1, _CHUNK_VALUES * (1 if device.type == "cpu" else _GPU_CHUNKS) // values)
    result = []
    for level, sites in enumerate(cells):
        coords = (sites.rows if isinstance(sites, PaddedSites) else sites).coords
        block = [min(1 << level, height), min(1 << level, width)]
        offsets = torch.arange(block[0] * block[1], dtype=torch.int32, device=device)
        means = torch.empty(len(coords), values, device=device)
        for some, out in _split(max(1, at_once // len(offsets)), coords, means):
            total, count = torch.zeros_like(out), torch.zeros_like(out[:, :1])
            for within in torch.split(offsets, at_once):
                row = (some[:, 1:2] << level) + within // block[1]
                column = (some[:, 2:] << level) + within % block[1]
                counts = (row < height) & (column < width)
                pixels = torch.stack(
                    [some[:, :1].expand_as(row), row.clamp(max=height - 1), column.clamp(max=width - 1)], dim=2
                ).view(-1, 3)
                if valid is not None:
                    counts &= valid[pixels.long().unbind(1)].view_as(counts)
                colours = engine.pixels(image, pixels, scale, shift)
                probabilities = engine.sample(coarse, pixels).softmax(1)
                seen = torch.cat([colours, probabilities], dim=1).view(*counts.shape, values)
                total += seen.masked_fill_(~counts[..., None], 0).sum(1)
                count += counts.sum(1, keepdim=True)
            torch.div(total, count.clamp_min(1), out=out)
        result.append(means)
    return result


def _split(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)) if len(tensors[0]) else []
