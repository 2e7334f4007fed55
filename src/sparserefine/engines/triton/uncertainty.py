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
_COLUMNS = 128  # per program: one for each thread
_ROWS = (1, 2, 4)  # choices per program; one thread handles all rows of a column
_SITES = 128
_MOST_IMAGES = 65535  # of one launch
_CLASSES, _CHANNELS = 16, 4  # that a program reads at once


@dataclass(frozen=True)
class _Taps:
    """Taps of one axis on the device, and blocks of pixels that share ``low`` and ``high``.

    Attributes:
        low: ``int32``, lower coarse index of each pixel.
        high: ``int32``, upper coarse index of each pixel.
        weight: ``float32``, weight of the upper one.
        blocks: ``int32 [G, 2]``: first pixel and end (exclusive).
        length: maximum number of pixels per block.
    """

    low: Tensor
    high: Tensor
    weight: Tensor
    blocks: Tensor
    length: int


def runs_kernels_on(*tensors: Tensor) -> bool:
    """Whether the functions below support these tensors: kernels run on their device and no gradient is required."""
    return all(runs_on(t.device) and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)


def uncertainty(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """Like :func:`sparserefine.images.uncertainty.uncertainty`, without gradients. The host does not wait for the GPU.

    Taps are copied to the device on first use, so call this once with the same sizes before capturing a CUDA graph.
    ``coarse`` keeps the taps and must live as long as the graph.

    Raises:
        ValueError: taps reach outside the logits.
    """
    labels = torch.empty(coarse.batch, *coarse.size, dtype=label_dtype(coarse.num_classes), device=coarse.device)
    entropies = torch.empty(coarse.batch, *coarse.size, dtype=torch.float32, device=coarse.device)
    for part, images, rows, columns in launches(coarse):
        launch(
            kernels.uncertainty,
            (len(rows.blocks), blocks(coarse.size[1], _COLUMNS), len(images)),
            coarse.device,
            *(images, *images.stride(), coarse.num_classes, rows.blocks, *taps_tensors(rows), *taps_tensors(columns)),
            *(labels[part], entropies[part], *coarse.size),
            OUTPUTS="margin" if is_margin(coarse) else coarse.upsampling.outputs,
            ROWS=rows.length,
            COLUMNS=_COLUMNS,
        )
    return labels, entropies


def sample(coarse: Coarse, coords: Tensor) -> Tensor:
    """Like :func:`sparserefine.images.uncertainty.sample`, without gradients, for ``int32`` coordinates in any order.

    Coordinates are not checked: batch, row and column must all be in range. As in :func:`uncertainty`, the host does
    not wait and taps are copied once.

    Raises:
        ValueError: as for :func:`uncertainty`.
    """
    result = torch.empty(len(coords), coarse.num_classes, dtype=torch.float32, device=coarse.device)
    for part, images, rows, columns in launches(coarse):
        launch(
            kernels.sample,
            (blocks(len(coords), _SITES),),
            coarse.device,
            *(images, *images.stride(), coarse.num_classes, *taps_tensors(rows), *taps_tensors(columns)),
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
    """Writes the class of the largest logit (the first of equals) into ``labels`` at the sites in use.

    Args:
        labels: ``uint8`` or (above 255 classes) ``int16 [B, H, W]``, of any strides.
        logits: ``float16``, ``bfloat16`` or ``float32 [N, K]``.
        sites: sites of the same images; padding is skipped.
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


def launches(coarse: Coarse) -> Iterator[tuple[slice, Tensor, _Taps, _Taps]]:
    """Images with equal taps: their slice of the batch, logits ``[n, K, h, w]``, taps of rows and of columns."""
    if isinstance(coarse.logits, Tensor) and coarse.windows is None and coarse.batch <= _MOST_IMAGES:
        yield slice(0, coarse.batch), _as_supported(coarse.logits), *_taps(coarse, 0)
        return
    for b in range(coarse.batch):
        yield slice(b, b + 1), _as_supported(coarse.logits[b])[None], *_taps(coarse, b)


def _as_supported(logits: Tensor) -> Tensor:
    return logits.detach() if logits.dtype in _FLOATS else logits.detach().float()


def taps_tensors(taps: _Taps) -> tuple[Tensor, Tensor, Tensor]:
    """Taps of one axis as kernels take them: lower and upper coarse index, and weight."""
    return taps.low, taps.high, taps.weight


def _taps(coarse: Coarse, image: int) -> tuple[_Taps, _Taps]:
    """Taps of rows and columns. ``coarse`` keeps them alive, because a CUDA graph reads them at each replay."""
    rows, columns = coarse.axes(image)
    for axis in (rows, columns):
        if axis not in coarse.kept:
            coarse.kept[axis] = _device_taps(axis, coarse.device)
    return coarse.kept[rows], coarse.kept[columns]


@lru_cache(maxsize=64)
def _device_taps(axis: Axis, device: torch.device) -> _Taps:
    """Taps of one axis. Cached, because the images of a stream share them."""
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
    """Splits groups of the given lengths into parts of at most ``most`` pixels; first and end of each part."""
    parts = -(-lengths // most)
    group = torch.repeat_interleave(parts)
    within = torch.arange(len(group)) - (parts.cumsum(0) - parts)[group]
    ends = lengths.cumsum(0)
    first = (ends - lengths)[group] + within * most
    return torch.stack([first, torch.minimum(first + most, ends[group])], 1)
