"""Compiled means over blocks of pixels; :mod:`sparserefine.engines.reference.context` defines the results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, pointer
from sparserefine.engines.cpu.uncertainty import (
    SITES_INVALID,
    axis_of,
    cells_of,
    check_coords,
    check_taps,
    sites_of,
    taps_of,
)
from sparserefine.images.coarse import Coarse

_INT = ctypes.c_int64
_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "sr_block_means_floats": (_INT, _INT, _INT),
    "sr_block_means_cursors": (_INT,),
    "sr_block_means": (ctypes.POINTER(c.BlockMeans),),
}
_EXPECTED = (
    "outside of {batch} images of {height} x {width} pixels, or not in ascending order of batch, row and column, each "
    "once; expected the cells of a plan of these images"
)


def block_means(
    library: Library,
    image: Tensor,
    coarse: Coarse,
    valid: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    cells: Sequence[Tensor],
) -> list[Tensor]:
    """See :meth:`sparserefine.sparse.interface.Engine.block_means`; without gradients.

    Args:
        library: the kernels.
        image: ``uint8`` or ``float32 [B, C, H, W]``.
        coarse: the base's outputs for it.
        valid: ``bool [B, H, W]``.
        scale: ``float32 [C]``.
        shift: ``float32 [C]``.
        cells: of each level, ``int32 [n_l, 3]``: batch, row, column.

    Returns:
        ``float32 [n_l, C + K]`` of each level.

    Raises:
        ValueError: a tensor has another dtype, shape or device; taps reach outside the logits; or cells are outside of
            the image, not sorted, or not unique.
    """
    batch, classes, size, channels = coarse.batch, coarse.num_classes, coarse.size, len(scale)
    if tuple(image.shape) != (batch, channels, *size) or (valid is not None and tuple(valid.shape) != (batch, *size)):
        given = None if valid is None else tuple(valid.shape)
        raise ValueError(
            f"image is {tuple(image.shape)}, valid {given}; expected {[batch, channels, *size]} and {[batch, *size]}"
        )
    if not scale.shape == shift.shape == (channels,):
        raise ValueError(f"scale is {tuple(scale.shape)}, shift {tuple(shift.shape)}; expected [C] for both")
    count, threads = len(cells), torch.get_num_threads()
    starts = torch.arange(1, batch, dtype=torch.int32)
    bounds = []
    for level, coords in enumerate(cells):
        check_coords(coords)
        bounds.append([0, *torch.searchsorted(coords[:, 0].contiguous(), starts).tolist(), len(coords)])
        if bounds[-1] != sorted(bounds[-1]) or (len(coords) and not 0 <= coords[0, 0] <= coords[-1, 0] < batch):
            raise ValueError(f"cells of level {level}: {_EXPECTED.format(batch=batch, height=size[0], width=size[1])}")
    means = [torch.empty(len(coords), channels + classes) for coords in cells]
    floats = torch.empty(threads * _function(library, "sr_block_means_floats")(count, classes, channels))
    cursors = torch.empty(threads * _function(library, "sr_block_means_cursors")(count), dtype=torch.int64)
    for b in range(batch):
        logits = coarse.logits[b].detach().float()
        height, width = logits.shape[1:]
        of_pixels = cells_of(logits)
        rows, columns = map(taps_of, coarse.axes(b))
        levels = (c.Level * count)()
        for held, coords, one, at in zip(levels, cells, means, bounds, strict=True):
            part = slice(at[b], at[b + 1])
            held.cells, held.means = sites_of(coords[part]), one[part].data_ptr()
        call = c.BlockMeans(
            pointer(of_pixels, torch.float32, "logits"), classes, height, width, coarse.upsampling.outputs == "scores",
            axis_of(rows), axis_of(columns),
            pointer(image[b], (torch.uint8, torch.float32), "image"), image.element_size(), channels,
            pointer(None if valid is None else valid[b], torch.bool, "valid"),
            pointer(scale, torch.float32, "scale"), pointer(shift, torch.float32, "shift"),
            levels, count, floats.data_ptr(), cursors.data_ptr(), threads,
        )  # fmt: skip
        status = _function(library, "sr_block_means")(call)
        check_taps(status, tuple(coarse.logits[b].shape))
        if status == SITES_INVALID:
            raise ValueError(f"cells of image {b}: {_EXPECTED.format(batch=batch, height=size[0], width=size[1])}")
    return means


@cache
def _function(library: Library, name: str) -> ctypes._NamedFuncPointer:
    return library.function(name, *_PROTOTYPES[name])
