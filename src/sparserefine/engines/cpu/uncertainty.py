"""Compiled uncertainty and access to the sites; :mod:`sparserefine.images.uncertainty` defines the results."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, pointer
from sparserefine.images.coarse import MAX_CLASSES, Coarse
from sparserefine.images.uncertainty import is_margin, label_dtype
from sparserefine.images.upsampling import Axis, AxisTaps

_LOGITS, _SCORES, _MARGIN = range(3)  # enum Outputs of uncertainty.cpp
_TABLE_OUT_OF_RANGE, SITES_INVALID = 1, 2  # enum Status of simd.h
_IMAGE_DTYPES = (torch.uint8, torch.float32)
_LABEL_DTYPES = (torch.uint8, torch.int16)

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64


_AXIS, _SITES, _IMAGE = (ctypes.POINTER(structure) for structure in (c.Axis, c.Sites, c.Image))
_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "sr_uncertainty_scratch": (_INT,),
    "sr_uncertainty": (_ADDRESS, _INT, _INT, _INT, _AXIS, _AXIS, _INT, _ADDRESS, _INT, _ADDRESS, _ADDRESS, _INT),
    "sr_sample": (_ADDRESS, _INT, _INT, _INT, _AXIS, _AXIS, _INT, _INT, _SITES, _ADDRESS, _INT),
    "sr_gather_normalised": (_IMAGE, _SITES, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    "sr_scatter": (_ADDRESS, _INT, _SITES, _IMAGE, _INT),
}


def uncertainty(library: Library, coarse: Coarse) -> tuple[Tensor, Tensor]:
    """Like :func:`sparserefine.images.uncertainty.uncertainty`, without gradients.

    Raises:
        ValueError: the logits are not on the CPU, or taps reach outside them.
    """
    labels = torch.empty(coarse.batch, *coarse.size, dtype=label_dtype(coarse.num_classes))
    entropies = torch.empty(coarse.batch, *coarse.size, dtype=torch.float32)
    threads = torch.get_num_threads()
    margin_only = is_margin(coarse)
    outputs = _MARGIN if margin_only else _SCORES if coarse.upsampling.outputs == "scores" else _LOGITS
    each = _function(library, "sr_uncertainty_scratch")(1 if margin_only else coarse.num_classes)
    scratch = torch.empty(threads * each, dtype=torch.float32)
    for b in range(coarse.batch):
        image = coarse.logits[b].detach().float()
        image = (image[1:] - image[:1] if margin_only else image).contiguous()
        rows, columns = map(taps_of, coarse.axes(b))
        status = _function(library, "sr_uncertainty")(
            *(pointer(image, torch.float32, "logits"), *image.shape),
            *(axis_of(rows), axis_of(columns), outputs),
            *(pointer(labels[b], _LABEL_DTYPES, "labels"), labels.element_size()),
            *(pointer(entropies[b], torch.float32, "entropies"), pointer(scratch, torch.float32, "scratch"), threads),
        )
        check_taps(status, tuple(image.shape))
    return labels, entropies


def sample(library: Library, coarse: Coarse, coords: Tensor) -> Tensor:
    """Like :func:`sparserefine.images.uncertainty.sample`, without gradients; ``coords`` are ``int32``.

    Raises:
        ValueError: as for :func:`uncertainty`, or a coordinate is out of range, or batches are not ascending.
    """
    check_coords(coords)
    result = torch.empty(len(coords), coarse.num_classes, dtype=torch.float32)
    starts = torch.arange(1, coarse.batch, dtype=torch.int32)
    bounds = [0, *torch.searchsorted(coords[:, 0].contiguous(), starts).tolist(), len(coords)]
    for b, (start, end) in enumerate(pairwise(bounds)):
        if start >= end:
            continue
        image = coarse.logits[b].detach().float()
        rows, columns = map(taps_of, coarse.axes(b))
        cells = cells_of(image)  # a site reads four contiguous vectors of K
        status = _function(library, "sr_sample")(
            *(pointer(cells, torch.float32, "logits"), *image.shape),
            *(
                axis_of(rows),
                axis_of(columns),
                int(coarse.upsampling.outputs == "scores"),
                b,
                sites_of(coords[start:end]),
            ),
            *(pointer(result[start:end], torch.float32, "result"), torch.get_num_threads()),
        )
        check_taps(status, tuple(image.shape))
        _check_sites(status, coords, (coarse.batch, *coarse.size))
    return result


def gather_normalised(library: Library, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Values of an image at the sites, times ``scale`` plus ``shift``.

    Args:
        library: the kernels.
        image: ``uint8`` or ``float32 [B, C, H, W]``.
        coords: ``int32 [N, 3]``: batch, row, column.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.

    Returns:
        ``float32 [N, C]``.

    Raises:
        ValueError: a tensor has another dtype, shape or device, or a coordinate lies outside the image.
    """
    check_coords(coords)
    pointer(image, _IMAGE_DTYPES, "image")
    channels = image.shape[1] if image.dim() == 4 else -1
    if not scale.shape == shift.shape == (channels,):
        raise ValueError(
            f"image is {tuple(image.shape)}, scale {tuple(scale.shape)}, shift {tuple(shift.shape)}; "
            "expected [B, C, H, W], [C] and [C]"
        )
    values = torch.empty(len(coords), channels, dtype=torch.float32)
    status = _function(library, "sr_gather_normalised")(
        *(_image(image), sites_of(coords)),
        *(pointer(scale, torch.float32, "scale"), pointer(shift, torch.float32, "shift")),
        *(pointer(values, torch.float32, "values"), torch.get_num_threads()),
    )
    _check_sites(status, coords, (image.shape[0], *image.shape[2:]))
    return values


def scatter_argmax(library: Library, logits: Tensor, coords: Tensor, labels: Tensor) -> None:
    """Writes the class of the largest logit (the first of equals) into ``labels`` at the sites.

    Args:
        library: the kernels.
        logits: ``float32 [N, K]``.
        coords: ``int32 [N, 3]``: batch, row, column.
        labels: ``uint8`` or (above 255 classes) ``int16 [B, H, W]``.

    Raises:
        ValueError: a tensor has another dtype, shape or device, or a coordinate lies outside the labels. Labels at
            valid coordinates may have been written by then.
    """
    check_coords(coords)
    if logits.dim() != 2 or logits.shape[0] != len(coords) or not 1 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(
            f"logits are {tuple(logits.shape)} for {len(coords)} sites; "
            f"expected [{len(coords)}, K] with K from 1 to {MAX_CLASSES}"
        )
    classes = logits.shape[1]
    if labels.dim() != 3 or labels.dtype not in _LABEL_DTYPES or (labels.dtype == torch.uint8 and classes > 256):
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected {label_dtype(classes)} [B, H, W] "
            f"for {classes} classes"
        )
    pointer(labels, _LABEL_DTYPES, "labels")
    status = _function(library, "sr_scatter")(
        *(pointer(logits, torch.float32, "logits"), classes),
        *(sites_of(coords), _image(labels[:, None]), torch.get_num_threads()),
    )
    _check_sites(status, coords, tuple(labels.shape))


def cells_of(image: Tensor) -> Tensor:
    """``[K, h, w]`` with the classes last, ``[h w, K]``: torch transposes two dimensions faster than three."""
    return image.flatten(1).t().contiguous()


@cache
def _function(library: Library, name: str) -> ctypes._NamedFuncPointer:
    return library.function(name, *_PROTOTYPES[name])


@lru_cache(maxsize=32)
def taps_of(axis: Axis) -> AxisTaps:
    """Taps in the dtypes of the kernels. Cached: all images of a stream share them, for labels and for samples."""
    taps = axis.taps()
    # Taps of a non-finite window lie below -2^31. Clamp them to -1, so that they stay out of range as int32.
    return AxisTaps(taps.low.clamp(min=-1).int(), taps.high.clamp(min=-1).int(), taps.weight.float())


def axis_of(taps: AxisTaps) -> c.Axis:
    """The structure of an axis; it refers to the taps and does not keep them alive."""
    return c.Axis(taps.low.data_ptr(), taps.high.data_ptr(), taps.weight.data_ptr(), len(taps.low))


def sites_of(coords: Tensor) -> c.Sites:
    """The structure of coordinates; it refers to them and does not keep them alive."""
    return c.Sites(coords.data_ptr(), len(coords), *coords.stride())


def _image(image: Tensor) -> c.Image:
    return c.Image(image.data_ptr(), image.element_size(), *image.shape)


def check_coords(coords: Tensor) -> None:
    """Raises ``ValueError`` unless coordinates have the shape and dtype that kernels read."""
    if coords.dim() != 2 or coords.shape[1] != 3 or coords.dtype != torch.int32 or coords.device.type != "cpu":
        raise ValueError(
            f"coords are {coords.dtype} {tuple(coords.shape)} on {coords.device}, "
            "expected int32 [N, 3] (batch, row, column) on the CPU"
        )


def check_taps(status: int, coarse: tuple[int, ...]) -> None:
    """Raises ``ValueError`` if a kernel found taps outside of the coarse logits."""
    if status == _TABLE_OUT_OF_RANGE:
        raise ValueError(f"taps reach outside logits of {coarse}; expected windows of finite, positive size")


def _check_sites(status: int, coords: Tensor, size: tuple[int, ...]) -> None:
    if status == SITES_INVALID:
        raise ValueError(
            f"coords run from {coords.amin(0).tolist()} to {coords.amax(0).tolist()}; expected each within [0, 0, 0] "
            f"and {[extent - 1 for extent in size]} (batch, row, column), and batches in ascending order"
        )
