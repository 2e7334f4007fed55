"""Compiled means over blocks of pixels; :mod:`sparserefine.engines.reference.context` defines the results."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures as c
from sparserefine.engines.cpu.native.library import Library, pointer
from sparserefine.engines.cpu.uncertainty import SITES_INVALID, axis_of, check_coords, check_taps, sites_of, taps_of
from sparserefine.images.coarse import Coarse

_INT = ctypes.c_int64
_PROTOTYPES: dict[str, tuple[type, ...]] = {
    "sr_block_means_floats": (_INT, _INT),
    "sr_block_means_cursors": (_INT,),
    "sr_block_means": (ctypes.POINTER(c.BlockMeans),),
}


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
        image: ``uint8`` or ``float32 [B, 3, H, W]``.
        coarse: the base's outputs for it.
        valid: ``bool [B, H, W]``.
        scale: ``float32 [3]``.
        shift: ``float32 [3]``.
        cells: of each level, ``int32 [n_l, 3]``: batch, row, column.

    Returns:
        ``float32 [n_l, 3 + K]`` of each level.

    Raises:
        ValueError: a tensor has another dtype, shape or device; taps reach outside the logits; or cells are outside of
            the image, not sorted, or not unique.
    """
    batch, classes, size = coarse.batch, coarse.num_classes, coarse.size
    if tuple(image.shape) != (batch, 3, *size) or (valid is not None and tuple(valid.shape) != (batch, *size)):
        given = None if valid is None else tuple(valid.shape)
        raise ValueError(
            f"image is {tuple(image.shape)}, valid {given}; expected {[batch, 3, *size]} and {[batch, *size]}"
        )
    if not scale.shape == shift.shape == (3,):
        raise ValueError(f"scale is {tuple(scale.shape)}, shift {tuple(shift.shape)}; expected [3] for both")
    for coords in cells:
        check_coords(coords)
    count, threads = len(cells), torch.get_num_threads()
    starts = torch.arange(1, batch, dtype=torch.int32)
    bounds = [[0, *torch.searchsorted(coords[:, 0].contiguous(), starts).tolist(), len(coords)] for coords in cells]
    means = [torch.empty(len(coords), 3 + classes) for coords in cells]
    floats = torch.empty(threads * _function(library, "sr_block_means_floats")(count, classes))
    cursors = torch.empty(threads * _function(library, "sr_block_means_cursors")(count), dtype=torch.int64)
    for b in range(batch):
        logits = coarse.logits[b].detach().float().permute(1, 2, 0).contiguous()
        rows, columns = map(taps_of, coarse.axes(b))
        levels = (c.Level * count)()
        for level, coords, one, (start, end) in zip(
            levels, cells, means, ((at[b], at[b + 1]) for at in bounds), strict=True
        ):
            level.cells, level.means = sites_of(coords[start:end]), one[start:end].data_ptr()
        call = c.BlockMeans(
            pointer(logits, torch.float32, "logits"), classes, *logits.shape[:2], coarse.upsampling.outputs == "scores",
            axis_of(rows), axis_of(columns),
            pointer(image[b], (torch.uint8, torch.float32), "image"), image.element_size(),
            pointer(None if valid is None else valid[b], torch.bool, "valid"),
            pointer(scale, torch.float32, "scale"), pointer(shift, torch.float32, "shift"),
            levels, count, floats.data_ptr(), cursors.data_ptr(), threads,
        )  # fmt: skip
        status = _function(library, "sr_block_means")(call)
        check_taps(status, tuple(coarse.logits[b].shape))
        if status == SITES_INVALID:
            raise ValueError(
                f"cells of image {b} of {batch} lie outside of its {size[0]} x {size[1]} pixels, or are not in "
                "ascending order of batch, row and column, each once; expected the cells of a plan of these images"
            )
    return means


@cache
def _function(library: Library, name: str) -> ctypes._NamedFuncPointer:
    return library.function(name, *_PROTOTYPES[name])
