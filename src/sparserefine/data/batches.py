"""Batches of crops: resized, recoloured and mirrored on the device of the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.data.crops import Crop
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE
from sparserefine.images.normalisation import channels_text
from sparserefine.images.resize import resize
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.images.upsampling import Window


@dataclass(frozen=True)
class CropBatch:
    """Crops of one size, ready for the refiner.

    Attributes:
        image: ``[B, C, H, W]``: uint8 if all crops are, else float32 in 0..1.
        label: integers ``[B, H, W]``, 255 where ignored or padded.
        valid: ``bool [B, H, W]``, false where padded, or without data.
        logits: the base's outputs, B times ``float32 [K, h', w']``: their sizes may differ.
        windows: the part of the whole image that each crop shows.
        parts: the same of that part of the image which ``logits`` are of.
        names: names of the samples.
        teacher: for each crop the part of the teacher's prediction that it needs; ``None``: no teacher.
    """

    image: Tensor
    label: Tensor
    valid: Tensor
    logits: list[Tensor]
    windows: list[Window]
    parts: list[Window]
    names: list[str]
    teacher: list[SoftLabels] | None = None

    @classmethod
    def of(cls, crops: Sequence[Crop], size: tuple[int, int], device: torch.device) -> CropBatch:
        """Resizes, recolours, mirrors and pads crops to ``size``, on the device.

        A pixel may differ by 1 of 255 between devices.

        Raises:
            ValueError: the crops differ in their number of channels.
        """
        counts = [len(crop.image) for crop in crops]
        other = next((i for i, count in enumerate(counts) if count != counts[0]), None)
        if other is not None:
            raise ValueError(
                f"{printable(crops[other].name)}: {channels_text(counts[other])}, {printable(crops[0].name)} has "
                f"{counts[0]}; expected as many in all images"
            )
        dtype = torch.uint8 if all(crop.image.dtype == torch.uint8 for crop in crops) else torch.float32
        where = device if device.type == "cuda" else torch.device("cpu")  # others cannot resize all dtypes
        image = torch.zeros(len(crops), counts[0], *size, dtype=dtype, device=where)
        label = torch.full((len(crops), *size), IGNORE, dtype=torch.uint8, device=where)
        valid = torch.zeros(len(crops), *size, dtype=torch.bool, device=where)
        logits = []
        for index, crop in enumerate(crops):
            axes = [axis for axis, mirrored in zip((-2, -1), crop.mirrored, strict=True) if mirrored]
            pixels, truth, outputs = (x.to(where, non_blocking=True) for x in (crop.image, crop.label, crop.logits))
            here = (index, ..., slice(crop.size[0]), slice(crop.size[1]))
            image[here] = _recoloured(_resized(pixels, crop.size), crop.colour, pixels.dtype, dtype).flip(axes)
            label[here] = _nearest(truth, crop.size).flip(axes)
            valid[here] = True
            if crop.valid is not None:
                there = crop.valid.to(where, non_blocking=True).byte()
                valid[here] = _nearest(there, crop.size).flip(axes)
            logits.append(outputs.float().flip(axes).to(device))
        image, label, valid = (x.to(device) for x in (image, label, valid))
        teacher = [crop.teacher.to(device) for crop in crops if crop.teacher is not None] or None
        windows, parts, names = ([getattr(crop, name) for crop in crops] for name in ("window", "part", "name"))
        return cls(image, label, valid, logits, windows, parts, names, teacher)


def _nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Integers ``[h, w]`` -> ``[*size]``."""
    return F.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """``[C, h, w]`` -> ``[C, *size]``, antialiased, of the same range: float32, or where it is faster, as it was."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # On the CPU, uint8 is three times faster than float32; torch resizes it to a single column wrongly, or fails.
    if pixels.device.type != "cpu" or pixels.dtype != torch.uint8 or size[1] == 1:
        return resize(pixels[None], size)[0]
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def _recoloured(pixels: Tensor, colour: Tensor | None, read_as: torch.dtype, dtype: torch.dtype) -> Tensor:
    """``[C, h, w]`` -> the same of ``dtype``: uint8, or float32 in 0..1.

    Args:
        pixels: uint8, or float32 of the range of ``read_as``.
        colour: as in :class:`Crop`.
        read_as: dtype of the image.
        dtype: of the result.
    """
    white = 255 if read_as == torch.uint8 else 1
    if colour is not None:
        colour = colour.to(pixels.device, non_blocking=True)
        offset = colour[:, -1:] if white == 255 else colour[:, -1:] / 255
        mixed = torch.addmm(offset, colour[:, :-1], pixels.flatten(1).float())
        pixels = mixed.view_as(pixels)
    if dtype == torch.uint8:
        return pixels.round_().clamp_(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels
    return (pixels.float() / white).clamp_(0, 1)
