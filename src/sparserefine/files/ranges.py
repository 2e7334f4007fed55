"""From the values that a file stores to pixels: a declared range becomes 0..1."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparserefine.files.image_config import ImageConfig, Percentiles

_WHITE = 65535
"""Of 16 bits."""


class RangeError(ValueError):
    """What values mean is not known, or not declared for as many bands."""


def check_meaning(kind: str, bits: int, bands: int, config: ImageConfig) -> None:
    """Raises :class:`RangeError` if values of this kind (``uint``, ``int``, ``float``) need a range and have none.

    Complex ones can have none. Whole numbers of one band of 16 bits or more are let through where no bands are chosen:
    :func:`to_pixels` looks at them.
    """
    if kind.startswith("complex"):
        raise RangeError(f"{kind} pixels of {bits} bits, expected whole or floating-point ones; store their magnitude")
    # Of one band, fewer than 8 bits are read as 8.
    if config.range is not None or (kind == "uint" and bits <= 16 and (bits >= 8 or bands == 1)):
        return
    if kind == "float":
        seen = "floating-point pixels"
    elif config.bands is None and bands == 1 and bits > 8:
        return
    else:
        seen = f"integer pixels of {bits} bits{'' if kind == 'uint' else ' with sign'}"
    raise RangeError(
        f"{seen} have no defined range; say which values become 0 and 1, such as images.range: [0, 10000] or "
        "{percentile: [2, 98]}, or convert the image to 8 or 16 bits"
    )


def to_pixels(values: np.ndarray, valid: np.ndarray | None, config: ImageConfig) -> Tensor:
    """Pixels as the method takes them.

    Args:
        values: ``[C, H, W]`` as stored, or ``[1, H, W]`` where one band is all channels; 8-bit values are changed only
            by a range.
        valid: ``bool [H, W]``, false where a pixel has no data; such pixels become 0.
        config: bands and range.

    Returns:
        ``uint8 [C, H, W]`` without range, if the values have 8 bits or no bands are chosen; else ``float32 [C, H, W]``
        in 0..1.

    Raises:
        RangeError: see :func:`check_meaning`.
    """
    if config.range is not None:
        pixels = _in_range(values, valid, config)
    elif values.dtype == np.uint8:
        pixels = torch.from_numpy(values if values.flags.writeable else values.copy())
    else:
        pixels = _of_full_scale(values if valid is None else np.where(valid, values, 0), config)
    if valid is not None:
        pixels.masked_fill_(~torch.from_numpy(valid), 0)
    return pixels.repeat(config.channels, 1, 1) if len(pixels) < config.channels else pixels.contiguous()


def _of_full_scale(values: np.ndarray, config: ImageConfig) -> Tensor:
    check_meaning({"u": "uint", "i": "int"}.get(values.dtype.kind, "float"), 8 * values.itemsize, len(values), config)
    if config.bands is not None:
        return torch.from_numpy(values.astype(np.float32)) / _WHITE
    if len(values) > 1:
        return torch.from_numpy((values >> 8).astype(np.uint8))  # as Pillow does, which reads colours of 16 bits so
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if low < 0 or high > _WHITE:
        raise RangeError(
            f"integer pixels {low}..{high}, expected 0..{_WHITE}; say which values become 0 and 1, such as "
            "images.range: [0, 10000], or convert them to 16 bits"
        )
    scaled = values.astype(np.uint32)  # in place: it has four times the bytes of the result
    scaled *= 255
    scaled += _WHITE // 2
    scaled //= _WHITE
    return torch.from_numpy(scaled.astype(np.uint8))


def _in_range(values: np.ndarray, valid: np.ndarray | None, config: ImageConfig) -> Tensor:
    ranges = config.ranges
    if ranges is not None and len(ranges) > len(values):  # one band, and a range for each channel
        values = np.broadcast_to(values, (len(ranges), *values.shape[1:]))
    exact = np.float32 if values.dtype.kind in "uif" and values.itemsize <= 2 else np.float64
    pixels = torch.empty(values.shape, dtype=torch.float32)
    for channel, band in enumerate(values):
        if ranges is not None:
            low, high = ranges[channel if len(ranges) > 1 else 0]
        else:
            low, high = _percentiles(band, valid, config)
        scaled = (band.astype(exact) - low) / max(high - low, np.finfo(np.float32).tiny)
        pixels[channel] = torch.from_numpy(np.nan_to_num(scaled.clip(0, 1), copy=False))
    return pixels


def _percentiles(band: np.ndarray, valid: np.ndarray | None, config: ImageConfig) -> tuple[float, float]:
    assert isinstance(config.range, Percentiles)
    known = band if valid is None else band[valid]
    if known.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(known, config.range.percentile)
    return float(low), float(high)
