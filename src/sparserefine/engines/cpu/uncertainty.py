"""Uncertainty and access to the sites, compiled; :mod:`sparserefine.images.uncertainty` defines the results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, pointer
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import AxisTaps, Upsampling, Window, taps_of

_LOGITS, _SCORES, _MARGIN = range(3)  # enum Outputs of uncertainty.cpp
_TABLE_OUT_OF_RANGE, _SITES_INVALID = 1, 2  # enum Status of simd.h
_MAX_CLASSES = 32767  # labels are int16
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


def uncertainty(
    library: Library,
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`sparserefine.images.uncertainty.uncertainty`, without gradients.

    Raises:
        ValueError: the logits are not on the CPU, want a gradient, or have another shape or dtype than promised.
    """
    how = how or Upsampling()
    classes = _check_coarse(logits, size, windows)
    labels = torch.empty(len(logits), *size, dtype=label_dtype(classes))
    entropies = torch.empty(len(logits), *size, dtype=torch.float32)
    threads = torch.get_num_threads()
    # Interpolation is linear, so of two classes only the difference of the logits need be interpolated.
    margin_only = classes == 2 and how.outputs == "logits"
    outputs = _MARGIN if margin_only else _SCORES if how.outputs == "scores" else _LOGITS
    each = _function(library, "sr_uncertainty_scratch")(1 if margin_only else classes)
    scratch = torch.empty(threads * each, dtype=torch.float32)
    for b in range(len(logits)):
        image = logits[b].detach().float()
        image = (image[1:] - image[:1] if margin_only else image).contiguous()
        rows, columns = _taps(tuple(image.shape[1:]), tuple(size), how, windows[b] if windows else None)
        status = _function(library, "sr_uncertainty")(
            *(pointer(image, torch.float32, "logits"), *image.shape),
            *(_axis(rows), _axis(columns), outputs),
            *(pointer(labels[b], _LABEL_DTYPES, "labels"), labels.element_size()),
            *(pointer(entropies[b], torch.float32, "entropies"), pointer(scratch, torch.float32, "scratch"), threads),
        )
        _check_taps(status, tuple(image.shape))
    return labels, entropies


def sample(
    library: Library,
    logits: Tensor | Sequence[Tensor],
    coords: Tensor,
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> Tensor:
    """As :func:`sparserefine.images.uncertainty.sample`, without gradients; ``coords`` are ``int32``.

    Raises:
        ValueError: as for :func:`uncertainty`; or a coordinate lies outside, or batches are not ascending.
    """
    how = how or Upsampling()
    classes = _check_coarse(logits, size, windows)
    _check_coords(coords)
    result = torch.empty(len(coords), classes, dtype=torch.float32)
    starts = torch.arange(1, len(logits), dtype=torch.int32)
    bounds = [0, *torch.searchsorted(coords[:, 0].contiguous(), starts).tolist(), len(coords)]
    for b, (start, end) in enumerate(pairwise(bounds)):
        if start >= end:
            continue
        image = logits[b].detach().float()
        rows, columns = _taps(tuple(image.shape[1:]), tuple(size), how, windows[b] if windows else None)
        cells = image.permute(1, 2, 0).contiguous()  # [h, w, K]: a site reads four whole rows
        status = _function(library, "sr_sample")(
            *(pointer(cells, torch.float32, "logits"), *image.shape),
            *(_axis(rows), _axis(columns), int(how.outputs == "scores"), b, _sites(coords[start:end])),
            *(pointer(result[start:end], torch.float32, "result"), torch.get_num_threads()),
        )
        _check_taps(status, tuple(image.shape))
        _check_sites(status, coords, (len(logits), *size))
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
        ValueError: another dtype, shape or device than promised, or a coordinate outside the image.
    """
    _check_image(image)
    _check_coords(coords)
    channels = image.shape[1]
    for name, factors in (("scale", scale), ("shift", shift)):
        if factors.shape != (channels,):
            raise ValueError(f"{name} is {tuple(factors.shape)}, expected [{channels}], one value for each channel")
        _check_no_gradient(factors, name)
    values = torch.empty(len(coords), channels, dtype=torch.float32)
    status = _function(library, "sr_gather_normalised")(
        *(_image(image), _sites(coords)),
        *(pointer(scale, torch.float32, "scale"), pointer(shift, torch.float32, "shift")),
        *(pointer(values, torch.float32, "values"), torch.get_num_threads()),
    )
    _check_sites(status, coords, (image.shape[0], *image.shape[2:]))
    return values


def scatter_argmax(library: Library, logits: Tensor, coords: Tensor, labels: Tensor) -> None:
    """Writes the class of the largest logit, of equals the first, into ``labels`` at the sites.

    Args:
        library: the kernels.
        logits: ``float32 [N, K]``.
        coords: ``int32 [N, 3]``: batch, row, column.
        labels: ``uint8`` or (above 255 classes) ``int16 [B, H, W]``.

    Raises:
        ValueError: another dtype, shape or device than promised, or a coordinate outside the labels; of those inside,
            labels may have been written then.
    """
    _check_coords(coords)
    if logits.dim() != 2 or logits.shape[0] != len(coords) or not 1 <= logits.shape[1] <= _MAX_CLASSES:
        raise ValueError(
            f"logits are {tuple(logits.shape)} for {len(coords)} sites; "
            f"expected [{len(coords)}, K], K of 1..{_MAX_CLASSES}"
        )
    _check_no_gradient(logits, "logits")
    classes = logits.shape[1]
    if labels.dim() != 3 or labels.dtype not in _LABEL_DTYPES or (labels.dtype == torch.uint8 and classes > 256):
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected {label_dtype(classes)} [B, H, W] "
            f"for {classes} classes"
        )
    pointer(labels, _LABEL_DTYPES, "labels")
    status = _function(library, "sr_scatter")(
        *(pointer(logits, torch.float32, "logits"), classes),
        *(_sites(coords), _image(labels[:, None]), torch.get_num_threads()),
    )
    _check_sites(status, coords, tuple(labels.shape))


@cache
def _function(library: Library, name: str) -> ctypes._NamedFuncPointer:
    return library.function(name, *_PROTOTYPES[name])


@lru_cache(maxsize=16)
def _taps(
    coarse: tuple[int, int], size: tuple[int, int], how: Upsampling, window: Window | None
) -> tuple[AxisTaps, AxisTaps]:
    """Taps in the dtypes of the kernels; the images of a stream share theirs, and so do labels and samples of each."""
    rows, columns = taps_of(torch.empty(1).expand(coarse), size, how, window)
    return _narrow(rows), _narrow(columns)


def _narrow(taps: AxisTaps) -> AxisTaps:
    # Those of a window that is not finite lie below -2^31: they shall stay out of range.
    return AxisTaps(taps.low.clamp(min=-1).int(), taps.high.clamp(min=-1).int(), taps.weight.float())


def _axis(taps: AxisTaps) -> c.Axis:
    return c.Axis(taps.low.data_ptr(), taps.high.data_ptr(), taps.weight.data_ptr(), len(taps.low))


def _sites(coords: Tensor) -> c.Sites:
    return c.Sites(coords.data_ptr(), len(coords), *coords.stride())


def _image(image: Tensor) -> c.Image:
    return c.Image(image.data_ptr(), image.element_size(), *image.shape)


def _check_coarse(logits: Tensor | Sequence[Tensor], size: tuple[int, int], windows: Sequence[Window] | None) -> int:
    """Refuses what the kernels do not compute; returns K."""
    if len(logits) == 0:
        raise ValueError("logits of no image; expected those of one at least")
    if windows is not None and len(windows) != len(logits):
        raise ValueError(f"{len(windows)} windows for the logits of {len(logits)} images; expected one for each image")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size = {tuple(size)}, expected height and width of at least 1 pixel")
    classes: int = logits[0].shape[0] if logits[0].dim() else 0
    for image in logits:
        if image.dim() != 3 or image.shape[0] != classes or image.numel() == 0 or classes > _MAX_CLASSES:
            raise ValueError(
                f"logits of an image are {tuple(image.shape)}, expected [K, h, w] with the same K of 1..{_MAX_CLASSES} "
                "for all images, and h and w of at least 1"
            )
        if image.device.type != "cpu" or not image.dtype.is_floating_point:
            raise ValueError(
                f"logits are {image.dtype} on {image.device}, expected floating point on the CPU; "
                "elsewhere, use the torch engine"
            )
        _check_no_gradient(image, "logits")
    return classes


def _check_no_gradient(tensor: Tensor, name: str) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} want a gradient, which the compiled kernels do not have; "
            "call under torch.inference_mode() or use the torch engine"
        )


def _check_image(image: Tensor) -> None:
    if image.dim() != 4:
        raise ValueError(f"image is {tuple(image.shape)}, expected [B, C, H, W]")
    _check_no_gradient(image, "image")
    pointer(image, _IMAGE_DTYPES, "image")


def _check_coords(coords: Tensor) -> None:
    if coords.dim() != 2 or coords.shape[1] != 3 or coords.dtype != torch.int32 or coords.device.type != "cpu":
        raise ValueError(
            f"coords are {coords.dtype} {tuple(coords.shape)} on {coords.device}, "
            "expected int32 [N, 3] (batch, row, column) on the CPU"
        )


def _check_taps(status: int, coarse: tuple[int, ...]) -> None:
    if status == _TABLE_OUT_OF_RANGE:
        raise ValueError(f"taps reach outside logits of {coarse}; expected windows of finite, positive size")


def _check_sites(status: int, coords: Tensor, size: tuple[int, ...]) -> None:
    if status == _SITES_INVALID:
        raise ValueError(
            f"coords run from {coords.amin(0).tolist()} to {coords.amax(0).tolist()}; expected each within [0, 0, 0] "
            f"and {[extent - 1 for extent in size]} (batch, row, column), and batches in ascending order"
        )
