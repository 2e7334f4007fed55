"""Uncertainty and access to the sites on a GPU; :mod:`sparserefine.images.uncertainty` defines the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparserefine.engines.triton.kernels import uncertainty as kernels
from sparserefine.engines.triton.launch import blocks, launch, runs_on
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Upsampling, Window, axis_taps
from sparserefine.sparse.sites import Sites

_MAX_CLASSES = 32767  # labels are int16
_MAX_IMAGES = 65535  # of one launch
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LABEL_DTYPES = (torch.uint8, torch.int16)
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


_Key = tuple[int, int, float, float, int | None, torch.device]  # the arguments of axis_taps
_captured: dict[_Key, _Taps] = {}
"""What CUDA graphs read must stay where it is for as long as they may be replayed: for good."""


def runs_kernels_on(*tensors: Tensor) -> bool:
    """On a device that kernels run on, and no gradient is wanted of them: what the functions below are for."""
    return all(runs_on(t.device) and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)


def uncertainty(
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`sparserefine.images.uncertainty.uncertainty`, without gradients. The host waits for nothing.

    Taps are copied to the device when they are first needed: in a CUDA graph, only after a call of the same sizes.

    Raises:
        ValueError: the logits are of another shape or dtype than promised, or a window is not finite.
    """
    how = how or Upsampling()
    classes = _check_coarse(logits, size, windows)
    device = logits[0].device
    labels = torch.empty(len(logits), *size, dtype=label_dtype(classes), device=device)
    entropies = torch.empty(len(logits), *size, dtype=torch.float32, device=device)
    # Interpolation is linear, so of two classes only the difference of the logits need be interpolated.
    outputs = "margin" if classes == 2 and how.outputs == "logits" else how.outputs
    for part, images, rows, columns in _launches(logits, size, how, windows):
        launch(
            kernels.uncertainty,
            (len(rows.blocks), blocks(size[1], _COLUMNS), len(images)),
            device,
            *(images, *images.stride(), classes, rows.blocks, *_tensors(rows), *_tensors(columns)),
            *(labels[part], entropies[part], *size),
            OUTPUTS=outputs,
            ROWS=rows.length,
            COLUMNS=_COLUMNS,
        )
    return labels, entropies


def sample(
    logits: Tensor | Sequence[Tensor],
    coords: Tensor,
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> Tensor:
    """As :func:`sparserefine.images.uncertainty.sample`, without gradients, for ``coords`` in any order.

    Coordinates are not checked: they must lie within the images and within ``size``. As for :func:`uncertainty`, the
    host waits for nothing, and taps are copied once.

    Raises:
        ValueError: as for :func:`uncertainty`; or the coordinates are not ``int32 [N, 3]``.
    """
    how = how or Upsampling()
    classes = _check_coarse(logits, size, windows)
    device = logits[0].device
    _check_coords(coords, device)
    result = torch.empty(len(coords), classes, dtype=torch.float32, device=device)
    for part, images, rows, columns in _launches(logits, size, how, windows):
        launch(
            kernels.sample,
            (blocks(len(coords), _SITES),),
            device,
            *(images, *images.stride(), classes, *_tensors(rows), *_tensors(columns)),
            *(coords, *coords.stride(), len(coords), part.start, result),
            SINGLE=len(images) < len(logits),
            SCORES=how.outputs == "scores",
            SITES=_SITES,
            CLASSES=_CLASSES,
        )
    return result


def pixels(image: Tensor, sites: Sites, scale: Tensor, shift: Tensor) -> Tensor:
    """Values of an image at the sites, times ``scale`` plus ``shift``, without gradients.

    Args:
        image: ``uint8``, ``float16``, ``bfloat16`` or ``float32 [B, C, H, W]``, of any strides.
        sites: of this image.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.

    Returns:
        ``float32 [N, C]``.

    Raises:
        ValueError: another dtype or shape than promised.
    """
    expected = (sites.batch_size, sites.height, sites.width)
    if image.dim() != 4 or (image.shape[0], *image.shape[2:]) != expected or image.dtype not in (torch.uint8, *_FLOATS):
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}, the sites are of "
            f"[{sites.batch_size}, C, {sites.height}, {sites.width}]; expected the same batch, height and width, "
            "and uint8, float16, bfloat16 or float32"
        )
    channels = image.shape[1]
    for name, factors in (("scale", scale), ("shift", shift)):
        if factors.shape != (channels,) or factors.dtype != torch.float32:
            raise ValueError(f"{name} is {factors.dtype} {tuple(factors.shape)}, expected float32 [{channels}]")
    _check_coords(sites.coords, image.device)
    result = torch.empty(len(sites), channels, dtype=torch.float32, device=image.device)
    launch(
        kernels.pixels,
        (blocks(len(sites), _SITES), blocks(channels, _CHANNELS)),
        image.device,
        *(image, *image.stride(), channels, sites.coords, *sites.coords.stride(), len(sites)),
        *(scale.contiguous(), shift.contiguous(), result),
        SITES=_SITES,
        CHANNELS=_CHANNELS,
    )
    return result


def write_labels(labels: Tensor, logits: Tensor, sites: Sites) -> None:
    """Writes the class of the largest logit, of equals the first, into ``labels`` at the sites in use.

    Args:
        labels: ``uint8`` or (above 255 classes) ``int16 [B, H, W]``, of any strides.
        logits: ``float16``, ``bfloat16`` or ``float32 [N, K]``.
        sites: of these labels; of rows that are padding, nothing is written.

    Raises:
        ValueError: another dtype or shape than promised.
    """
    if logits.dim() != 2 or len(logits) != len(sites) or logits.dtype not in _FLOATS or not logits.shape[1]:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)} for {len(sites)} sites; "
            f"expected float16, bfloat16 or float32 [{len(sites)}, K]"
        )
    classes = logits.shape[1]
    expected = (sites.batch_size, sites.height, sites.width)
    if (
        tuple(labels.shape) != expected
        or labels.dtype not in _LABEL_DTYPES
        or classes > torch.iinfo(labels.dtype).max + 1
    ):
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected {label_dtype(classes)} {list(expected)} "
            f"for {classes} classes"
        )
    _check_coords(sites.coords, labels.device)
    launch(
        kernels.write_labels,
        (blocks(len(sites), _SITES),),
        labels.device,
        *(logits.contiguous(), classes, sites.coords, *sites.coords.stride(), len(sites)),
        *(sites.coords if sites.count is None else sites.count, labels, *labels.stride()),
        COUNTED=sites.count is not None,
        SITES=_SITES,
    )


def _launches(
    logits: Tensor | Sequence[Tensor], size: tuple[int, int], how: Upsampling, windows: Sequence[Window] | None
) -> Iterator[tuple[slice, Tensor, _Taps, _Taps]]:
    """Images that have the same taps: which they are, their logits ``[n, K, h, w]``, taps of rows and of columns."""
    if isinstance(logits, Tensor) and windows is None:
        yield slice(0, len(logits)), _as_read(logits), *_taps(logits, size, how, None)
        return
    for b in range(len(logits)):
        taps = _taps(logits[b], size, how, windows[b] if windows else None)
        yield slice(b, b + 1), _as_read(logits[b])[None], *taps


def _as_read(logits: Tensor) -> Tensor:
    return logits.detach() if logits.dtype in _FLOATS else logits.detach().float()


def _tensors(taps: _Taps) -> tuple[Tensor, Tensor, Tensor]:
    return taps.low, taps.high, taps.weight


def _taps(logits: Tensor, size: tuple[int, int], how: Upsampling, window: Window | None) -> tuple[_Taps, _Taps]:
    """Taps of rows and columns of ``size`` in ``logits [..., h, w]``."""
    window = window or Window((float(size[0]), float(size[1])))
    nearest = how.input_size if how.mode == "nearest" else None
    rows, columns = (
        _kept_taps(
            (
                size[axis],
                logits.shape[axis - 2],
                float(window.full[axis]),
                float(window.offset[axis]),
                nearest[axis] if nearest else None,
                logits.device,
            )
        )
        for axis in (0, 1)
    )
    return rows, columns


def _kept_taps(key: _Key) -> _Taps:
    taps = _captured.get(key) or _device_taps(key)
    if _is_capturing(key[-1]):
        _captured[key] = taps
    return taps


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
def _device_taps(key: _Key) -> _Taps:
    """Taps of one axis; the images of a stream share theirs, and so do labels and samples of each."""
    out, coarse, full, offset, input_size, device = key
    taps = axis_taps(out, coarse, full, offset, input_size, torch.device("cpu"))
    if int(taps.low.min()) < 0 or int(taps.high.max()) >= coarse:
        raise ValueError(f"taps reach outside logits of {coarse} rows or columns; expected a finite window")
    lengths = torch.unique_consecutive(taps.low, return_counts=True)[1]
    length = next((rows for rows in _ROWS if rows * len(lengths) >= out), _ROWS[-1])
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


def _check_coarse(logits: Tensor | Sequence[Tensor], size: tuple[int, int], windows: Sequence[Window] | None) -> int:
    """Refuses what the kernels do not compute; returns K."""
    if not 1 <= len(logits) <= _MAX_IMAGES:
        raise ValueError(f"logits of {len(logits)} images; expected those of 1..{_MAX_IMAGES}")
    if windows is not None and len(windows) != len(logits):
        raise ValueError(f"{len(windows)} windows for the logits of {len(logits)} images; expected one for each image")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size = {tuple(size)}, expected height and width of at least 1 pixel")
    classes: int = logits[0].shape[0] if logits[0].dim() else 0
    for image in [logits[0]] if isinstance(logits, Tensor) else logits:
        if image.dim() != 3 or image.shape[0] != classes or image.numel() == 0 or classes > _MAX_CLASSES:
            raise ValueError(
                f"logits of an image are {tuple(image.shape)}, expected [K, h, w] with the same K of 1..{_MAX_CLASSES} "
                "for all images, and h and w of at least 1"
            )
        if not image.dtype.is_floating_point or not runs_on(image.device):
            raise ValueError(f"logits are {image.dtype} on {image.device}, expected floating point on the GPU")
    return classes


def _check_coords(coords: Tensor, device: torch.device) -> None:
    if coords.dim() != 2 or coords.shape[1] != 3 or coords.dtype != torch.int32 or coords.device != device:
        raise ValueError(
            f"coords are {coords.dtype} {tuple(coords.shape)} on {coords.device}, "
            f"expected int32 [N, 3] (batch, row, column) on {device}"
        )
