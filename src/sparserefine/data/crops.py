"""Training crops: image and label are resized, cropped and mirrored, together with the window of the coarse logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from sparserefine.data.readers.dataset import Dataset
from sparserefine.images.classes import IGNORE
from sparserefine.images.resize import resize
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
        max_class_share: a crop is drawn again, up to ten times, if one class covers a larger share of it.
        flip: mirror left-right with probability 1/2.
        flip_vertical: mirror upside down with probability 1/2; for images without a fixed "up".
        photometric: random brightness, contrast, saturation and hue.
    """

    crop: tuple[int, int] = (512, 1024)
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: bool = True
    flip_vertical: bool = False
    photometric: bool = True

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


@dataclass(frozen=True)
class Crop:
    """One augmented crop.

    Attributes:
        image: ``uint8 [3, h, w]``.
        label: integers ``[h, w]``, 255 where ignored or padded.
        valid: ``bool [h, w]``, false where padded.
        logits: the base's outputs for the whole image, ``float32 [K, h', w']``, mirrored like the crop.
        window: the part of the whole image that the crop shows.
        name: name of the sample it is cut from, for messages.
        teacher: the part of the teacher's prediction that the crop needs, mirrored like the crop; ``None``: no teacher.
    """

    image: Tensor
    label: Tensor
    valid: Tensor
    logits: Tensor
    window: Window
    name: str
    teacher: SoftLabels | None = None


@dataclass(frozen=True)
class CropBatch:
    """Crops of one size. Logits and teacher are lists, because the sizes of images and of windows may differ."""

    image: Tensor
    label: Tensor
    valid: Tensor
    logits: list[Tensor]
    windows: list[Window]
    names: list[str]
    teacher: list[SoftLabels] | None = None

    @classmethod
    def collate(cls, crops: list[Crop]) -> CropBatch:
        """Stacks crops."""
        return cls(
            torch.stack([c.image for c in crops]),
            torch.stack([c.label for c in crops]),
            torch.stack([c.valid for c in crops]),
            [c.logits for c in crops],
            [c.window for c in crops],
            [c.name for c in crops],
            [c.teacher for c in crops if c.teacher is not None] or None,
        )

    def to(self, device: torch.device) -> CropBatch:
        """The same batch on another device."""
        logits = [item.to(device, non_blocking=True) for item in self.logits]
        image, label, valid = (x.to(device, non_blocking=True) for x in (self.image, self.label, self.valid))
        teacher = None if self.teacher is None else [item.to(device) for item in self.teacher]
        return CropBatch(image, label, valid, logits, self.windows, self.names, teacher)


class Uniform:
    """Uniform random numbers from one seed, as Python floats."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))


def random_crop(
    image: Tensor,
    label: Tensor,
    logits: Tensor,
    config: AugmentConfig,
    uniform: Uniform,
    name: str = "",
    teacher: SoftLabels | None = None,
) -> Crop:
    """One augmented crop of a whole image.

    Args:
        image: ``uint8 [3, H, W]``.
        label: integers ``[H, W]``.
        logits: the base's outputs for the whole image, ``[K, h', w']``.
        config: the augmentation.
        uniform: the random number generator.
        name: of the sample.
        teacher: the teacher's prediction for the whole image.
    """
    height, width = label.shape
    scale = math.exp(uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    # The source rectangle has whole pixels, so labels need no interpolation. The exact scale per axis follows from it.
    source = [min(size, max(1, round(crop / scale))) for size, crop in zip((height, width), config.crop, strict=True)]
    target = [min(crop, max(1, round(s * scale))) for s, crop in zip(source, config.crop, strict=True)]
    for _ in range(_TRIES):
        top = math.floor(uniform(0, height - source[0] + 1))
        left = math.floor(uniform(0, width - source[1] + 1))
        part = label[top : top + source[0], left : left + source[1]]
        counted = part[part != IGNORE]
        if teacher is not None and not counted.numel():
            break  # there is something to learn without labels
        if counted.numel() and float(counted.long().bincount().max()) <= config.max_class_share * counted.numel():
            break
    size = (target[0], target[1])
    pixels = resize(image[None, :, top : top + source[0], left : left + source[1]], size)[0]
    part = F.interpolate(part[None, None].float(), size, mode="nearest-exact")[0, 0].to(label.dtype)
    if config.photometric:
        pixels = _photometric(pixels, uniform)

    ratio = (target[0] / source[0], target[1] / source[1])
    full = (height * ratio[0], width * ratio[1])
    offset = [top * ratio[0], left * ratio[1]]
    mirrored = [False, False]
    for axis, wanted in ((1, config.flip), (0, config.flip_vertical)):
        if wanted and uniform(0, 1) < 0.5:
            pixels, part, logits = pixels.flip(axis + 1), part.flip(axis), logits.flip(axis + 1)
            offset[axis] = full[axis] - offset[axis] - size[axis]
            mirrored[axis] = True

    window = Window(full, (offset[0], offset[1]))
    seen = None if teacher is None else teacher.seen_by(window, config.crop, (mirrored[0], mirrored[1]))
    pad = (0, config.crop[1] - size[1], 0, config.crop[0] - size[0])
    return Crop(
        F.pad(pixels.round().clamp(0, 255).to(torch.uint8), pad),
        F.pad(part, pad, value=IGNORE),
        F.pad(torch.ones(size, dtype=torch.bool), pad),
        logits.float(),
        window,
        name,
        seen,
    )


def _photometric(pixels: Tensor, uniform: Uniform) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2, by one affine map of the colours.

    Saturation scales, and hue rotates, the two chroma axes of YIQ. The ranges are the usual ones for segmentation
    (+-32 of 255, 0.5-1.5, 0.5-1.5, +-18 degrees).
    """

    def sometimes(low: float, high: float, otherwise: float) -> float:
        return uniform(low, high) if uniform(0, 1) < 0.5 else otherwise

    brightness = sometimes(-32, 32, 0)
    contrast = sometimes(0.5, 1.5, 1)
    saturation = sometimes(0.5, 1.5, 1)
    hue = math.radians(sometimes(-18, 18, 0))
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = torch.eye(3)
    turn[1:, 1:] = saturation * torch.tensor([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    colour = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return (torch.einsum("ij,jhw->ihw", contrast * colour, pixels) + brightness).clamp(0, 255)


class CropDataset(TorchDataset[Crop]):
    """An endless sequence of crops. Crop ``i`` depends on ``seed`` and ``i`` only, so a run can be resumed exactly.

    Args:
        data: images and labels.
        logits: function from the index in ``data`` and the image's (H, W) to the base's outputs for the whole image.
        config: augmentation.
        seed: seed of order and augmentation.
        cache_gb: maximum size of the cache of decoded images [GB].
        teacher: function from the same to the teacher's prediction for the whole image; default: no teacher.
    """

    def __init__(
        self,
        data: Dataset,
        logits: Callable[[int, tuple[int, int]], Tensor],
        config: AugmentConfig,
        seed: int,
        cache_gb: float,
        teacher: Callable[[int, tuple[int, int]], SoftLabels] | None = None,
    ) -> None:
        self.data, self.logits, self.config, self.seed = data, logits, config, seed
        self.teacher = teacher
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_bytes_left = cache_gb * 1e9

    def __getitem__(self, index: int) -> Crop:
        order = torch.randperm(
            len(self.data), generator=torch.Generator().manual_seed(self.seed + index // len(self.data))
        )
        image_index = int(order[index % len(self.data)])
        image, label = self._read(image_index)
        size = (label.shape[0], label.shape[1])
        logits = self.logits(image_index, size)
        teacher = None if self.teacher is None else self.teacher(image_index, size)
        name = self.data.samples[image_index].name
        return random_crop(image, label, logits, self.config, Uniform(self.seed * 1_000_003 + index), name, teacher)

    def _read(self, image_index: int) -> tuple[Tensor, Tensor]:
        if image_index in self._cache:
            return self._cache[image_index]
        pair = self.data.read(image_index)
        size = sum(x.numel() * x.element_size() for x in pair)
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[image_index] = pair
        return pair


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
