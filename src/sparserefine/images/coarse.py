"""Coarse: the base's outputs for a batch of images, and how to upsample them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparserefine.images.normalisation import FLOATS
from sparserefine.images.upsampling import Axis, Upsampling, Window

MAX_CLASSES = 32767
"""Labels are int16 at most."""
LARGEST_LOGIT = 2.0**100
"""Largest absolute value of a coarse logit in float32, about 1e30.

Upsampling and entropy subtract two logits, which overflows from 1.7e38 on, and a sum over all classes is the larger the
more classes there are. The ensembler multiplies by the weights of two layers, which leaves them a factor of 1e8.
"""


@dataclass(frozen=True, eq=False)
class Coarse:
    """The base's outputs for a batch, and how they become logits of ``H x W`` pixels. Checked on creation.

    The check does not look for NaN, because that makes the host wait for the GPU; see
    :meth:`sparserefine.bases.base.FrozenBase.checked`.

    Attributes:
        logits: ``[B, K, h, w]``, floating point; or B tensors ``[K, h, w]`` if their sizes differ.
        size: H and W [px].
        upsampling: interpolation, and whether ``logits`` are logits or scores.
        windows: for each image, the part of it that the ``H x W`` pixels show; ``None``: the whole image.
        kept: interpolation tables that an engine made for these logits, so that it makes them once. A CUDA graph that
            owns this object owns the tables.

    Raises:
        ValueError: a shape, dtype, device, size or window does not fit; the message says which.
    """

    logits: Tensor | Sequence[Tensor]
    size: tuple[int, int]
    upsampling: Upsampling = Upsampling()
    windows: Sequence[Window] | None = None
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # Lists become tuples, so that nothing changes after the check.
        if not isinstance(self.logits, Tensor):
            object.__setattr__(self, "logits", tuple(self.logits))
        if self.windows is not None:
            object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "size", tuple(self.size))
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size = {self.size}, expected height and width of at least 1 pixel")
        _check_logits(self.logits)
        _check_windows(self.windows, self.batch)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self.logits[0].device

    def axes(self, image: int) -> tuple[Axis, Axis]:
        """Where the rows and columns of an image's pixels lie in its coarse logits."""
        height, width = self.logits[image].shape[1:]
        window = self.windows[image] if self.windows else Window((float(self.size[0]), float(self.size[1])))
        inner = self.upsampling.input_size if self.upsampling.mode == "nearest" else None
        rows, columns = (
            Axis(self.size[i], coarse, float(window.full[i]), float(window.offset[i]), inner[i] if inner else None)
            for i, coarse in enumerate((height, width))
        )
        return rows, columns


def bad_logits(logits: Sequence[Tensor]) -> str:
    """What is wrong with logits that are not all within :data:`LARGEST_LOGIT`, as the end of a message."""
    count, values = sum(one.numel() for one in logits), [one.detach().float() for one in logits]
    if bad := sum(int((~one.isfinite()).sum()) for one in values):
        cause = "" if any(bool((~one.isfinite()).any()) for one in logits) else " in float32"
        return (
            f"{bad} of {count} coarse logits are NaN or infinite{cause}; check its weights, its normalisation, and the "
            "precision it runs in"
        )
    largest = max(float(one.abs().max()) for one in values)
    return (
        f"coarse logits reach {largest:.4g}, expected at most {LARGEST_LOGIT:.0e}; check its weights, and mark classes "
        "that cannot be with -1e4 instead"
    )


def _check_logits(logits: Tensor | Sequence[Tensor]) -> None:
    if isinstance(logits, Tensor) and logits.dim() != 4:
        raise ValueError(f"logits are {tuple(logits.shape)}, expected [B, K, h, w], or B times [K, h, w]")
    if len(logits) == 0:
        raise ValueError("logits of no image; expected at least one image")
    first = logits[0]
    for image in [first] if isinstance(logits, Tensor) else logits:
        if image.dim() != 3 or image.shape[0] != first.shape[0] or not image.numel() or image.shape[0] > MAX_CLASSES:
            raise ValueError(
                f"logits of an image are {tuple(image.shape)}, expected [K, h, w] with the same K of 1..{MAX_CLASSES} "
                "for all images, and h and w of at least 1"
            )
        if image.dtype not in FLOATS:
            raise ValueError(
                f"logits are {image.dtype}, expected floating-point logits, not labels (float16, bfloat16, 32 or 64)"
            )
        if image.device != first.device:
            raise ValueError(f"logits of an image are on {image.device}, those of the first image on {first.device}")


def _check_windows(windows: Sequence[Window] | None, batch: int) -> None:
    if windows is None:
        return
    if len(windows) != batch:
        raise ValueError(f"{len(windows)} windows for the logits of {batch} images; expected one for each image")
    for window in windows:
        if not all(map(math.isfinite, (*window.full, *window.offset))) or min(window.full) <= 0:
            raise ValueError(f"{window} is empty or not finite; expected finite numbers and a full size above 0 pixels")
