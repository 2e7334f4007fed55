"""Training crops: image and label are resized, cropped and mirrored, together with the window of the coarse logits.

A crop is made in two steps. Where the data are, the rectangle that it shows is cut out, and everything random is drawn
(:func:`random_crop`). On the device, in front of the training step, it is resized, recoloured and mirrored
(:meth:`sparserefine.data.batches.CropBatch.of`). So a GPU does not wait for the processor to resize images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from sparserefine.data.focus import with_data
from sparserefine.data.readers.dataset import Dataset
from sparserefine.images.classes import IGNORE
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.images.upsampling import Window
from sparserefine.machine.bounds import check_number, check_whole

_TRIES = 10  # attempts to find a crop in which no class covers too much
_MAX_SIDE = 16_384
"""Of a crop [px]."""
_MAX_AREA = 2**26
"""Of a crop [px]: 8192 x 8192."""
_MAX_SCALE = 100.0
"""Largest factor of the random resize; the smallest is its inverse."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random crops for training (paper, section 4.1).

    Attributes:
        crop: height and width [px], each at most 16,384 and together at most 8192 x 8192; smaller images are padded,
            and padding is never refined.
        scale: smallest and largest factor of the random resize, from 0.01 to 100.
        max_class_share: a crop is drawn again, up to ten times, if one class covers a larger share of it by its label;
            without labels it is not.
        flip: mirror left-right with probability 1/2.
        flip_vertical: mirror upside down with probability 1/2; for images without a fixed "up".
        photometric: random brightness and contrast, the same for all channels; and saturation and hue, if the channels
            are red, green and blue.
        focus: probability that a crop is drawn around a pixel where the base is uncertain, and not anywhere.
    """

    crop: tuple[int, int] = (512, 1024)
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: bool = True
    flip_vertical: bool = False
    photometric: bool = True
    focus: float = 0.0

    def __post_init__(self) -> None:
        for side in self.crop:
            check_whole("augment.crop", side, 1, _MAX_SIDE)
        area = self.crop[0] * self.crop[1]
        if area > _MAX_AREA:
            raise ValueError(f"augment.crop = {self.crop}: {area} pixels, expected at most {_MAX_AREA}")
        for factor in self.scale:
            check_number("augment.scale", factor, 1 / _MAX_SCALE, _MAX_SCALE)
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augment.scale = {self.scale}, expected the smaller factor first")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"augment.max_class_share = {self.max_class_share}, expected more than 0 and at most 1")
        check_number("augment.focus", self.focus, 0, 1)


@dataclass(frozen=True)
class Crop:
    """One crop as it is cut out of the image, and what is to be done with it.

    Attributes:
        image: ``[C, h, w]``, uint8, or float32 in 0..1: the rectangle of the image that the crop shows.
        label: integers ``[h, w]``, 255 where ignored.
        logits: the base's outputs ``[K, h', w']``: of the whole image, or the part that the crop reads.
        size: height and width after the resize [px]; what is missing to the size of the batch is padding.
        colour: affine map of the channels of values in 0..255, ``float32 [C, C + 1]``; ``None``: as they are.
        mirrored: upside down, and left-right; applied to image, label and logits.
        window: the part of the whole image, resized and mirrored, that the crop shows.
        part: the same of that part of the image which ``logits`` are of.
        name: name of the sample it is cut from, for messages.
        teacher: the part of the teacher's prediction that the crop needs, mirrored already; ``None``: no teacher.
        valid: ``bool [h, w]``, false where there is no data; ``None``: there is data everywhere.
    """

    image: Tensor
    label: Tensor
    logits: Tensor
    size: tuple[int, int]
    colour: Tensor | None
    mirrored: tuple[bool, bool]
    window: Window
    part: Window
    name: str
    teacher: SoftLabels | None
    valid: Tensor | None = None


@dataclass(frozen=True)
class Whole:
    """An image with all that belongs to it.

    Attributes:
        image: ``[C, H, W]``, uint8, or float32 in 0..1.
        label: integers ``[H, W]``.
        logits: the base's outputs for the whole image, ``[K, h', w']``.
        name: name of the sample.
        teacher: the teacher's prediction for the whole image.
        focus: for ``AugmentConfig.focus``: pixels of ``logits`` that crops are drawn around, as indices into h' x w'.
        valid: ``bool [H, W]``, false where there is no data; ``None``: there is data everywhere.
    """

    image: Tensor
    label: Tensor
    logits: Tensor
    name: str = ""
    teacher: SoftLabels | None = None
    focus: Tensor | None = None
    valid: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        parts = (self.image, self.label, self.logits, self.teacher, self.focus, self.valid)
        return sum(part.nbytes for part in parts if part is not None)


class Uniform:
    """Uniform random numbers from one seed, as Python floats."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))


def random_crop(
    whole: Whole,
    config: AugmentConfig,
    uniform: Uniform,
    *,
    rgb: bool = True,
    whole_logits: bool = False,
    pin: bool = False,
) -> Crop:
    """One random crop.

    Args:
        whole: the image.
        config: the augmentation.
        uniform: the random number generator.
        rgb: whether three channels are red, green and blue.
        whole_logits: keep the logits of the whole image.
        pin: into memory from which a GPU copies by itself.
    """
    (height, width), coarse = whole.label.shape, whole.logits.shape[1:]
    scale = math.exp(uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    # The source rectangle has whole pixels, so labels need no interpolation. The exact scale per axis follows from it.
    source = [min(size, max(1, round(crop / scale))) for size, crop in zip((height, width), config.crop, strict=True)]
    target = [min(crop, max(1, round(s * scale))) for s, crop in zip(source, config.crop, strict=True)]
    focus = whole.focus if config.focus > 0 and uniform(0, 1) < config.focus else None
    for _ in range(_TRIES):
        if focus is not None and len(focus):
            top, left = _around(focus, coarse, (height, width), source, uniform)
        else:
            top = math.floor(uniform(0, height - source[0] + 1))
            left = math.floor(uniform(0, width - source[1] + 1))
        there = slice(top, top + source[0]), slice(left, left + source[1])
        if (
            whole.teacher is not None
            and not bool((whole.label[there] != IGNORE).any())
            and (whole.valid is None or bool(whole.valid[there].any()))
        ):
            break  # there is something to learn without labels
        if _is_varied(whole.label[there], config.max_class_share):
            break
    channels = len(whole.image)
    colour = _photometric(uniform, channels, rgb=rgb and channels == 3) if config.photometric else None
    size, ratio = (target[0], target[1]), (target[0] / source[0], target[1] / source[1])
    window = Window((height * ratio[0], width * ratio[1]), (top * ratio[0], left * ratio[1]))
    read, part = _read_by(window, size, coarse, whole=whole_logits)
    swapped = config.flip and uniform(0, 1) < 0.5
    upside_down = config.flip_vertical and uniform(0, 1) < 0.5
    mirrored = (upside_down, swapped)
    window, part = (_mirrored(one, size, mirrored) for one in (window, part))
    return Crop(
        _cut(whole.image, *there, pin=pin),
        _cut(whole.label, *there, pin=pin),
        _cut(whole.logits, *read, pin=pin),
        size,
        colour,
        mirrored,
        window,
        part,
        whole.name,
        whole.teacher.seen_by(window, config.crop, mirrored) if whole.teacher else None,
        None if whole.valid is None else _cut(whole.valid, *there, pin=pin),
    )


def _mirrored(window: Window, size: tuple[int, int], mirrored: tuple[bool, bool]) -> Window:
    """The window of ``size`` pixels in the mirrored image."""
    row, column = (
        full - offset - pixels if turned else offset
        for full, offset, pixels, turned in zip(window.full, window.offset, size, mirrored, strict=True)
    )
    return Window(window.full, (row, column))


def _is_varied(label: Tensor, share: float) -> bool:
    """Whether a part of a label has labelled pixels, and no class covers a larger share of them."""
    if share == 1:
        return bool((label.numpy() != IGNORE).any())
    counts = np.bincount(label.numpy().ravel(), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.any() and counts.max() <= share * counts.sum())


def _around(
    focus: Tensor, coarse: Sequence[int], image: Sequence[int], source: Sequence[int], uniform: Uniform
) -> tuple[int, int]:
    """Top and left of a rectangle of the image, its centre in a random one of the coarse pixels ``focus``."""
    pixel = divmod(int(focus[math.floor(uniform(0, len(focus)))]), coarse[1])
    corner = []
    for index, pixels, height, part in zip(pixel, coarse, image, source, strict=True):
        centre = (index + uniform(0, 1)) * height / pixels
        corner.append(min(max(0, round(centre - part / 2)), height - part))
    return corner[0], corner[1]


def _read_by(
    window: Window, size: Sequence[int], coarse: Sequence[int], *, whole: bool
) -> tuple[tuple[slice, slice], Window]:
    """The part of the coarse logits that a window of ``size`` pixels is interpolated from, and its window there.

    A coarse pixel more is kept on each side: rounding must not make a difference.
    """
    parts, full, offset = [], [], []
    for length, start, pixels, count in zip(window.full, window.offset, size, coarse, strict=True):
        step = count / length
        first, last = (math.floor((at + 0.5) * step - 0.5) for at in (start, start + pixels - 1))
        part = slice(0, count) if whole else slice(max(0, first - 1), min(count, last + 3))
        parts.append(part)
        full.append((part.stop - part.start) / step)
        offset.append(start - part.start / step)
    return (parts[0], parts[1]), Window((full[0], full[1]), (offset[0], offset[1]))


def _cut(values: Tensor, rows: slice, columns: slice, *, pin: bool) -> Tensor:
    """A copy of a part, made by NumPy: torch would use all its threads for it, in each of the loader's threads."""
    part = values[..., rows, columns]
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=pin)
    np.copyto(copy.numpy(), part.numpy())
    return copy


def _photometric(uniform: Uniform, channels: int, *, rgb: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2, as one affine map of the channels.

    Saturation scales, and hue rotates, the two chroma axes of YIQ, which only RGB has. The ranges are the usual ones
    for segmentation (+-32 of 255, 0.5-1.5, 0.5-1.5, +-18 degrees).

    Returns:
        ``float32 [C, C + 1]``: the matrix, and what is added.
    """

    def sometimes(low: float, high: float, otherwise: float) -> float:
        return uniform(low, high) if uniform(0, 1) < 0.5 else otherwise

    brightness = sometimes(-32, 32, 0)
    contrast = sometimes(0.5, 1.5, 1)
    offset = torch.full((channels, 1), float(brightness))
    if not rgb:
        return torch.cat([contrast * torch.eye(channels), offset], dim=1)
    saturation = sometimes(0.5, 1.5, 1)
    hue = math.radians(sometimes(-18, 18, 0))
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = torch.eye(3)
    turn[1:, 1:] = saturation * torch.tensor([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    colour = contrast * (torch.linalg.inv(to_yiq) @ turn @ to_yiq)
    return torch.cat([colour, offset], dim=1)


class CropDataset(TorchDataset[Crop]):
    """An endless sequence of crops. Crop ``i`` depends on ``seed`` and ``i`` only, so a run can be resumed exactly.

    Several threads may take crops at once; they share the cache.

    Args:
        data: images and labels.
        logits: function from the index in ``data`` and the image's (H, W) to the base's outputs for the whole image.
        config: augmentation.
        seed: seed of order and augmentation.
        cache_gb: maximum size of the cache of decoded images with their logits and teacher's predictions [GB].
        teacher: function from the same to the teacher's prediction for the whole image; default: no teacher.
        focus: for ``config.focus``: function from logits to the pixels of them that crops are drawn around.
        rgb: whether three channels are red, green and blue.
        whole_logits: crops come with the logits of the whole image, not only with the part that they read.
        pin: crops are in memory from which a GPU copies by itself.
    """

    def __init__(
        self,
        data: Dataset,
        logits: Callable[[int, tuple[int, int]], Tensor],
        config: AugmentConfig,
        seed: int,
        cache_gb: float,
        teacher: Callable[[int, tuple[int, int]], SoftLabels] | None = None,
        *,
        focus: Callable[[Tensor], Tensor] | None = None,
        rgb: bool = True,
        whole_logits: bool = False,
        pin: bool = False,
    ) -> None:
        self.data, self.logits, self.config, self.seed = data, logits, config, seed
        self.teacher = teacher
        self._focus, self._rgb, self._whole_logits, self._pin = focus, rgb, whole_logits, pin
        self._cache: dict[int, Whole] = {}
        self._cache_bytes_left = cache_gb * 1e9
        self._one_reads: defaultdict[int, Lock] = defaultdict(Lock)
        self._one_keeps = Lock()

    def __getitem__(self, index: int) -> Crop:
        order = torch.randperm(
            len(self.data), generator=torch.Generator().manual_seed(self.seed + index // len(self.data))
        )
        image_index = int(order[index % len(self.data)])
        return random_crop(
            self._read(image_index),
            self.config,
            Uniform(self.seed * 1_000_003 + index),
            rgb=self._rgb,
            whole_logits=self._whole_logits,
            pin=self._pin,
        )

    def _read(self, index: int) -> Whole:
        with self._one_reads[index]:
            if index in self._cache:
                return self._cache[index]
            image, label, valid = self.data.example(index)
            size = (label.shape[0], label.shape[1])
            logits = self.logits(index, size)
            teacher = None if self.teacher is None else self.teacher(index, size)
            focus = self._focus(logits) if self._focus and self.config.focus else None
            if focus is not None and valid is not None:
                focus = with_data(focus, logits, valid)
            whole = Whole(image, label, logits, self.data.samples[index].name, teacher, focus, valid)
            with self._one_keeps:
                if whole.nbytes <= self._cache_bytes_left:
                    self._cache_bytes_left -= whole.nbytes
                    self._cache[index] = whole
            return whole


class EpochSampler(Sampler[int]):
    """Indices of the crops of one epoch: ``length`` of them, from ``epoch * length`` on."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; the trainer calls this when an epoch starts."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))

    def __len__(self) -> int:
        return self.length
