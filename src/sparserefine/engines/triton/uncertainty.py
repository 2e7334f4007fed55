"""Uncertainty and access to the sites on a GPU; :mod:`sparserefine.images.uncertainty` defines the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import uncertainty as kernels
from sparserefine.engines.triton.launch import blocks, launch, runs_on
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import is_margin, label_dtype
from sparserefine.images.upsampling import Axis
from sparserefine.sparse.sites import PaddedSites, Sites

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_COLUMNS = 128  # of a program's tile: one for each thread
_ROWS = (1, 2, 4)  # of a program's tile, all in the same thread
_SITES = 128
_CLASSES, _CHANNELS = 16, 4  # that a program reads at a time


@dataclass(frozen=True)
class _Taps:
    """Taps of one axis on the device, and the blocks of pixels that have ``low`` and ``high`` in common.

    Attributes:
        low: ``int32``.
        high: ``int32``.
        weight: ``float32``.
        blocks: ``int32 [G, 2]``: first pixel, and the one after the last.
        length: the most pixels of a block.
    """

    low: Tensor
    high: Tensor
    weight: Tensor
    blocks: Tensor
    length: int


def takes(*tensors: Tensor) -> bool:
    """On a device that kernels run on, and no gradient is wanted of them: what the functions below are for."""
    return all(runs_on(t.device) and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)


def uncertainty(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """As :func:`sparserefine.images.uncertainty.uncertainty`, without gradients. The host waits for nothing.

    Taps are copied to the device when they are first needed: in a CUDA graph, only after a call of the same sizes. They
    stay with ``coarse``, which must live as long as the graph.

    Raises:
        ValueError: taps reach outside the logits.
    """
    labels = torch.empty(coarse.batch, *coarse.size, dtype=label_dtype(coarse.num_classes), device=coarse.device)
    entropies = torch.empty(coarse.batch, *coarse.size, dtype=torch.float32, device=coarse.device)
    for part, images, rows, columns in _launches(coarse):
        launch(
            kernels.uncertainty,
            (len(rows.blocks), blocks(coarse.size[1], _COLUMNS), len(images)),
            coarse.device,
            *(images, *images.stride(), coarse.num_classes, rows.blocks, *_tensors(rows), *_tensors(columns)),
            *(labels[part], entropies[part], *coarse.size),
            OUTPUTS="margin" if is_margin(coarse) else coarse.upsampling.outputs,
            ROWS=rows.length,
            COLUMNS=_COLUMNS,
        )
    return labels, entropies


def sample(coarse: Coarse, coords: Tensor) -> Tensor:
    """As :func:`sparserefine.images.uncertainty.sample`, without gradients, for ``int32`` coordinates in any order.

    Coordinates are not checked: they must lie within the images and within their size. As for :func:`uncertainty`, the
    host waits for nothing, and taps are copied once.

    Raises:
        ValueError: as for :func:`uncertainty`.
    """
    result = torch.empty(len(coords), coarse.num_classes, dtype=torch.float32, device=coarse.device)
    for part, images, rows, columns in _launches(coarse):
        launch(
            kernels.sample,
            (blocks(len(coords), _SITES),),
            coarse.device,
            *(images, *images.stride(), coarse.num_classes, *_tensors(rows), *_tensors(columns)),
            *(coords, *coords.stride(), len(coords), part.start, result),
            SINGLE=len(images) < coarse.batch,
            SCORES=coarse.upsampling.outputs == "scores",
            SITES=_SITES,
            CLASSES=_CLASSES,
        )
    return result


def pixels(image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Values of an image at the sites, times ``scale`` plus ``shift``, without gradients.

    Args:
        image: ``uint8``, ``float16``, ``bfloat16`` or ``float32 [B, C, H, W]``, of any strides.
        coords: ``int32 [N, 3]``: batch, row, column, within this image.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.

    Returns:
        ``float32 [N, C]``.
    """
    channels = image.shape[1]
    result = torch.empty(len(coords), channels, dtype=torch.float32, device=image.device)
    launch(
        kernels.pixels,
        (blocks(len(coords), _SITES), blocks(channels, _CHANNELS)),
        image.device,
        *(image, *image.stride(), channels, coords, *coords.stride(), len(coords)),
        *(scale.contiguous(), shift.contiguous(), result),
        SITES=_SITES,
        CHANNELS=_CHANNELS,
    )
    return result


def write_labels(labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
    """Writes the class of the largest logit, of equals the first, into ``labels`` at the sites in use.

    Args:
        labels: ``uint8`` or (above 255 classes) ``int16 [B, H, W]``, of any strides.
        logits: ``float16``, ``bfloat16`` or ``float32 [N, K]``.
        sites: of these labels; for rows that are padding, nothing is written.
    """
    rows, count = (sites.rows, sites.count) if isinstance(sites, PaddedSites) else (sites, None)
    coords = rows.coords
    launch(
        kernels.write_labels,
        (blocks(len(coords), _SITES),),
        labels.device,
        *(logits.contiguous(), logits.shape[1], coords, *coords.stride(), len(coords)),
        *(coords if count is None else count, labels, *labels.stride()),
        COUNTED=count is not None,
        SITES=_SITES,
    )


def _launches(coarse: Coarse) -> Iterator[tuple[slice, Tensor, _Taps, _Taps]]:
    """Images that have the same taps: which they are, their logits ``[n, K, h, w]``, taps of rows and of columns."""
    if isinstance(coarse.logits, Tensor) and coarse.windows is None:
        yield slice(0, coarse.batch), _as_read(coarse.logits), *_taps(coarse, 0)
        return
    for b in range(coarse.batch):
        yield slice(b, b + 1), _as_read(coarse.logits[b])[None], *_taps(coarse, b)


def _as_read(logits: Tensor) -> Tensor:
    return logits.detach() if logits.dtype in _FLOATS else logits.detach().float()


def _tensors(taps: _Taps) -> tuple[Tensor, Tensor, Tensor]:
    return taps.low, taps.high, taps.weight


def _taps(coarse: Coarse, image: int) -> tuple[_Taps, _Taps]:
    """Taps of rows and columns, kept with ``coarse``: a CUDA graph reads them as often as it is replayed."""
    rows, columns = coarse.axes(image)
    for axis in (rows, columns):
        if axis not in coarse.kept:
            coarse.kept[axis] = _device_taps(axis, coarse.device)
    return coarse.kept[rows], coarse.kept[columns]


@lru_cache(maxsize=64)
def _device_taps(axis: Axis, device: torch.device) -> _Taps:
    """Taps of one axis; the images of a stream share theirs."""
    taps = axis.taps()
    if int(taps.low.min()) < 0 or int(taps.high.max()) >= axis.coarse:
        raise ValueError(f"taps reach outside logits of {axis.coarse} rows or columns; expected a finite window")
    lengths = torch.unique_consecutive(taps.low, return_counts=True)[1]
    length = next((rows for rows in _ROWS if rows * len(lengths) >= axis.out), _ROWS[-1])
    return _Taps(
        taps.low.int().to(device),
        taps.high.int().to(device),
        taps.weight.to(device),
        _split(lengths, length).int().to(device),
        length,
    )


def _split(lengths: Tensor, most: int) -> Tensor:
    """Groups of those lengths, one after the other, split into parts of at most that many: first and end of each."""
    parts = -(-lengths // most)
    group = torch.repeat_interleave(parts)
    within = torch.arange(len(group)) - (parts.cumsum(0) - parts)[group]
    ends = lengths.cumsum(0)
    first = (ends - lengths)[group] + within * most
    return torch.stack([first, torch.minimum(first + most, ends[group])], 1)
