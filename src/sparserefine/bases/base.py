"""FrozenBase: wraps any segmentation model to map full-size images to coarse logits."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparserefine.bases.agreement import USE_CLASS_MAP, check_order, class_count, class_map_of, normalisation_of
from sparserefine.bases.class_map import merged
from sparserefine.bases.loaded import LoadedModel, tensor_of
from sparserefine.bases.macs import count_macs
from sparserefine.bases.refined import RefinedModel
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import LARGEST_LOGIT, MAX_CLASSES, bad_logits
from sparserefine.images.normalisation import (
    FLOATS,
    IMAGENET_MEAN,
    MOST_CHANNELS,
    ROUNDING,
    channels_text,
    check_image,
    check_normalisation,
    check_pixels,
    constant,
    default_normalisation,
    extremes,
)
from sparserefine.images.resize import resize

_log = logging.getLogger(__name__)

_MOST_PIXELS = 1 << 28
"""Of a base's input [px]: 268 megapixels, 3.2 GB in float32."""


@dataclass(frozen=True)
class BaseConfig:
    """Which base to use, and the input it expects.

    Attributes:
        name: one of the forms in :data:`sparserefine.bases.load.BASE_NAMES`, such as ``hf:<folder or hub id>``; empty
            for a base given in Python.
        ratio: input size relative to the image; give either this or ``size``.
        size: fixed input height and width [px].
        mean: per channel of the model, subtracted from pixels in 0..1; default: the value in the model's files, else
            ImageNet's for three channels, and 0.5 for each of another number.
        std: per channel, divides the result; default: like ``mean``, but 0.25.
        outputs: ``logits``, or ``scores``, which are >= 0 and proportional to probabilities; default: what this kind of
            model returns, else logits.
        class_map: needed if the model's classes differ from the data's: a YAML file (see
            :mod:`sparserefine.bases.class_map`), or for each class of the model the class of the data, -1 for none.
        runtime: library that runs a torch model on the CPU: ``onnxruntime`` or ``openvino``; default: torch.
        bands: the channels of the image that the model sees, in its order, counted from 1: ``(3, 2, 1)``, or
            ``(1, 1, 1)`` to show an image of one channel to an RGB model. Default: all of them, as many as it takes.
    """

    name: str = ""
    ratio: float | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    outputs: Literal["logits", "scores"] | None = None
    class_map: tuple[int, ...] | str | None = None
    runtime: Literal["onnxruntime", "openvino"] | None = None
    bands: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):  # null in a configuration
            raise ValueError(f"base.name = {self.name!r}, expected the name of a base")
        if (self.ratio is None) == (self.size is None):
            raise ValueError(f"base: give either ratio or size of its input, got ratio={self.ratio}, size={self.size}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"base.ratio = {self.ratio}, expected more than 0 and at most 1")
        if self.size is not None and (min(self.size) < 1 or self.size[0] * self.size[1] > _MOST_PIXELS):
            raise ValueError(
                f"base.size = {self.size}, expected at least 1 pixel each way, and at most {_MOST_PIXELS} in all"
            )
        _check_channels(self)
        if self.outputs not in ("logits", "scores", None):
            raise ValueError(f"base.outputs = {self.outputs!r}, expected 'logits' or 'scores'")
        if isinstance(self.class_map, tuple):
            worst = next((k for k in self.class_map if k >= MAX_CLASSES), None)
            if worst is not None or len(self.class_map) > MAX_CLASSES:
                raise ValueError(
                    f"base.class_map has {len(self.class_map)} entries up to {max(self.class_map)}, expected at most "
                    f"{MAX_CLASSES} classes"
                )
        if self.runtime not in ("onnxruntime", "openvino", None):
            raise ValueError(
                f"base.runtime = {self.runtime!r}, expected 'onnxruntime' or 'openvino'; leave it out for torch"
            )


def _check_channels(config: BaseConfig) -> None:
    """Raises ``ValueError`` unless mean, std and bands are good, and as many as each other if they are given."""
    mean, std = config.mean, config.std
    given = next((v for v in (mean, std) if isinstance(v, (tuple, list))), IMAGENET_MEAN)
    usual = default_normalisation(len(given))
    check_normalisation("base", usual[0] if mean is None else mean, usual[1] if std is None else std)
    bands = config.bands
    if bands is None:
        return
    good = isinstance(bands, (tuple, list)) and 1 <= len(bands) <= MOST_CHANNELS
    if not good or not all(type(band) is int and 1 <= band <= MOST_CHANNELS for band in bands):
        raise ValueError(
            f"base.bands = {bands}, expected the channels of the image that the base sees, from 1 to {MOST_CHANNELS}"
        )
    if (mean is not None or std is not None) and len(given) != len(bands):
        raise ValueError(
            f"base.bands = {bands}: {len(bands)} of them, base.mean and base.std have {channels_text(len(given))}; "
            "expected as many"
        )


class FrozenBase(nn.Module):
    """A frozen segmentation model: image at full size in, coarse logits out.

    The model is put into evaluation mode and its parameters stop requiring gradients; calling ``.train()`` on a module
    that contains this one changes neither. It runs without recording gradients.

    Args:
        model: a module or any callable, ``float32 [B, C, h, w]`` -> coarse outputs: a tensor, a tuple or list whose
            first item is that tensor, a mapping with ``logits`` or ``out``, or an object with ``.logits``. Or the
            :class:`LoadedModel` of a loader, which also has classes and normalisation.
        num_classes: K of the data; default: the model's own. Every output is checked against it.
        config: input size, normalisation, and whether outputs are logits or scores.
        classes: names and colours of the data's classes; default: the model's own, unless there is a class map.

    Raises:
        ValueError: the class counts of model and data differ, and there is no class map.
    """

    def __init__(
        self,
        model: Callable[..., Any] | LoadedModel,
        num_classes: int | None = None,
        config: BaseConfig | None = None,
        *,
        classes: Classes | None = None,
    ) -> None:
        super().__init__()
        if config is None:
            raise ValueError("config is missing; give the size of the base's input as config=BaseConfig(ratio=0.5)")
        loaded = model if isinstance(model, LoadedModel) else LoadedModel(model)
        self.model = loaded.model
        self.outputs = config.outputs or loaded.outputs
        label = config.name or _name_of(self.model)
        self.mean, self.std = normalisation_of(loaded, config.mean, config.std, config.bands, label)
        self._channels_known = loaded.channels is not None
        self.class_map = class_map_of(config.class_map, loaded, classes or num_classes, label)
        self.num_classes = class_count(loaded, num_classes, classes, self.class_map, label)
        if self.class_map is None:
            check_order(loaded.classes, classes, label)
        self.classes = classes or (loaded.classes if self.class_map is None else None)
        self.config = replace(config, mean=self.mean, std=self.std, outputs=self.outputs, class_map=self.class_map)
        if isinstance(self.model, nn.Module):
            self.model.requires_grad_(False)
        self._runtime: Callable[[Tensor], Tensor] | None = None
        if isinstance(self.model, RefinedModel):
            _check_refined(self.model, config, (self.mean, self.std), label)
        elif config.runtime is not None:
            from sparserefine.bases.runtimes import Runtime

            self._runtime = Runtime(config.runtime, self.model)
        self._warned = False
        self._macs: dict[tuple[int, ...], int | None] = {}
        self.train(False)

    def train(self, mode: bool = True) -> FrozenBase:
        """Does nothing: a frozen base always stays in evaluation mode."""
        return super().train(False)

    def run_on(self, engine: str) -> None:
        """Makes a base that is itself a refiner run on the engine of this name. Other bases have none."""
        if isinstance(self.model, RefinedModel):
            self.model.run_on(engine)

    @property
    def channels(self) -> int:
        """Channels that the model takes; of which channels of an image, ``config.bands`` says."""
        return len(self.mean)

    def check_channels(self, channels: int) -> None:
        """Raises ``ValueError`` unless this base can see images of so many channels."""
        bands = self.config.bands
        if bands is not None and max(bands) > channels:
            raise ValueError(f"base {self.label}: bands = {list(bands)}, but images have {channels_text(channels)}")
        if bands is None and channels != self.channels:
            raise ValueError(
                f"base {self.label}: takes {channels_text(self.channels)}, images have {channels}; "
                + self._use_bands(channels)
            )

    def _use_bands(self, channels: int) -> str:
        """What to do if the model takes another number of channels than images have."""
        example = [min(band, max(1, channels)) for band in range(1, self.channels + 1)]
        other = "" if self._channels_known else "; if the model takes more, give base.mean and base.std for each"
        return (
            f"say which of them it sees, for instance base.bands: {example}, counted from 1 (for a dense model "
            f"teacher.bands or --dense_bands){other}"
        )

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width [px] of the model's input for an image of ``height`` x ``width`` [px]."""
        if self.config.size is not None:
            return self.config.size
        assert self.config.ratio is not None  # BaseConfig requires one of the two
        return max(1, round(height * self.config.ratio)), max(1, round(width * self.config.ratio))

    def forward(self, image: Tensor) -> Tensor:
        """Coarse outputs of images.

        Args:
            image: ``[B, C, H, W]``, uint8, or floating point in 0..1.

        Returns:
            ``[B, K, h, w]`` at the model's own output size.

        Raises:
            ValueError: wrong shape or class count, pixels outside 0..1, or outputs that :meth:`look_at` refuses.
            TypeError: the model's return value has none of the forms listed for ``model`` in the class docstring.
        """
        output, check_values = self.begin(image)
        check_values()
        return output

    def begin(self, image: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Like a call, but the host does not wait for the GPU.

        Returns:
            The coarse outputs, and a function that checks them and the pixels: it waits for the GPU and raises what a
            call would.
        """
        output = self._output(image)
        return self._to_data_classes(output), self.look_at(output, image=image)

    def unchecked(self, image: Tensor) -> Tensor:
        """Like a call, without the check of values, which makes the host wait for the GPU; see :meth:`bad_values`."""
        return self._to_data_classes(self._output(image))

    @torch.no_grad()
    def _output(self, image: Tensor) -> Tensor:
        """The model's output in its own classes, with shape and dtype checked but not its values."""
        x = self._seen(image)
        scale = 255.0 if image.dtype == torch.uint8 else 1.0
        mean, std = (constant(v, x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        x = ((x / scale - mean) / std).contiguous()
        if isinstance(self.model, nn.Module):  # a half-precision model needs half-precision input
            x = x.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype))
        output = tensor_of((self._runtime or self.model)(x), self.label)
        self._check_shape_and_dtype(
            output, len(image), self.num_classes if self.class_map is None else len(self.class_map)
        )
        return output

    def _seen(self, image: Tensor) -> Tensor:
        """The channels of an image that the model sees, resized for it: ``float32``, in the image's range."""
        bands = self.config.bands
        if bands is None:
            check_image(image, self.channels, self._use_bands(image.shape[1] if image.dim() == 4 else self.channels))
            return resize(image, self.input_size(*image.shape[-2:]))
        there = image.shape[1] if image.dim() == 4 else 0
        check_image(image, max(there, *bands), f"base {self.label} sees bands {list(bands)}; give others as base.bands")
        size = self.input_size(*image.shape[-2:])
        return torch.cat([resize(image[:, band - 1 : band], size) for band in bands], dim=1)

    @torch.no_grad()
    def _to_data_classes(self, output: Tensor) -> Tensor:
        """Converts the model's classes to the data's, if there is a class map."""
        return output if self.class_map is None else merged(output, self.class_map, self.outputs)

    @property
    def label(self) -> str:
        """The name of this base in messages."""
        return self.config.name or _name_of(self.model)

    def checked(self, logits: Tensor, batch: int, image: Tensor | None = None) -> Tensor:
        """Returns ``logits [B, K, h, w]``, or raises ``ValueError`` if shape, class count or values are wrong.

        The pixels of ``image`` are checked too, if it is given.
        """
        self._check_shape_and_dtype(logits, batch, self.num_classes)
        self.look_at(logits, image=image)()
        return logits

    def check_classes(self, found: int) -> None:
        """Raises ``ValueError`` unless ``found`` is this base's class count K."""
        self._check_classes(found, self.num_classes)

    def bad_values(self, logits: Tensor, image: Tensor) -> Tensor:
        """Whether :meth:`look_at` would refuse these values: ``int32 []`` on their device, 0 if not.

        The host does not wait for the GPU.
        """
        low, high = extremes(logits)
        floor = 0.0 if self.outputs == "scores" else -LARGEST_LOGIT
        good = (low >= floor) & (high <= LARGEST_LOGIT)  # false for NaN
        if image.dtype != torch.uint8:
            low, high = extremes(image)
            good &= (low >= -ROUNDING) & (high <= 1 + ROUNDING)
        return (~good).int()

    @torch.no_grad()
    def look_at(self, *logits: Tensor, image: Tensor | None = None) -> Callable[[], None]:
        """Starts the check of coarse logits, ``[..., K, h, w]`` each; the host does not wait for the GPU.

        Args:
            logits: judged as they become in float32, in which everything after the base is computed.
            image: ``[B, C, H, W]``, to check its pixels too; default: not checked. Those of uint8 are always good.

        Returns:
            A function that reads the result, which makes the host wait for the GPU, and raises ``ValueError`` if logits
            are NaN, infinite or beyond :data:`~sparserefine.images.coarse.LARGEST_LOGIT`, scores are negative, or
            floating-point pixels are outside 0..1. Called after the host has waited for later work, it adds no wait.
        """
        found = [self._value_checks(one) for one in logits]
        if image is not None and image.dtype != torch.uint8:
            found.append(torch.stack(extremes(image)))
        together = torch.cat(found)

        def raise_if_bad() -> None:
            numbers = together.tolist()  # one read for all: each read makes the host wait for the GPU
            rows = [numbers[start : start + 3] for start in range(0, 3 * len(logits), 3)]
            if len(numbers) > 3 * len(logits):
                check_pixels(*numbers[-2:])
            if not all(low >= -LARGEST_LOGIT and high <= LARGEST_LOGIT for low, high, _ in rows):  # NaN is neither
                raise ValueError(f"base {self.label}: {bad_logits(logits)}")
            smallest = min(low for low, _, _ in rows)
            if self.outputs == "scores" and smallest < 0:
                raise ValueError(
                    f"base {self.label}: outputs='scores' but the smallest is {smallest:.4g}, expected >= 0; "
                    "set outputs='logits' if these are logits"
                )
            suspicious = self.outputs == "logits" and not self._warned and all(row[2] for row in rows)
            if suspicious and all(_are_probabilities(one) for one in logits):
                self._warned = True
                _log.warning(
                    "base %s: its outputs look like probabilities; if so, set base.outputs: scores", self.label
                )

        return raise_if_bad

    def _value_checks(self, logits: Tensor) -> Tensor:
        """``float32 [3]``: smallest and largest value, and whether these may be probabilities."""
        few = logits[..., :1, :8].float()  # for most logits a few pixels show that they are no probabilities
        maybe_probabilities = (few.min() >= 0) & ((few.sum(-3) - 1).abs().max() <= 1e-3)
        return torch.stack([*extremes(logits), maybe_probabilities.float()])

    def _check_shape_and_dtype(self, logits: Tensor, batch: int, classes: int) -> None:
        if logits.dim() != 4 or logits.shape[0] != batch:
            raise ValueError(f"base {self.label}: output is {tuple(logits.shape)}, expected [{batch}, K, h, w]")
        self._check_classes(logits.shape[1], classes)
        if logits.dtype not in FLOATS:
            raise ValueError(
                f"base {self.label}: output is {logits.dtype}, expected floating-point logits, not labels (float16, "
                "bfloat16, 32 or 64)"
            )

    def _check_classes(self, found: int, expected: int) -> None:
        if found != expected:
            cure = f"; {USE_CLASS_MAP}" if self.class_map is None else ""
            raise ValueError(f"base {self.label}: {found} classes, expected {expected}{cure}")

    def macs(self, height: int, width: int) -> int | None:
        """Multiply-accumulates for one image of that size [px]; ``None`` if torch cannot count them (ONNX files).

        Of a base that is itself a refiner, they depend on the image: those of the last one of that size.
        """
        size = self.input_size(height, width)
        if isinstance(self.model, RefinedModel):
            return self.model.macs(*size)
        if size not in self._macs:
            self._macs[size] = count_macs(self.model, (1, self.channels, *size))
        return self._macs[size]

    @property
    def identity(self) -> str:
        """A fingerprint of the weights and of every setting that changes the outputs; stored with coarse logits."""
        digest = hashlib.sha256()
        settings = getattr(self.model, "settings", None)  # of a loader's wrapper: what changes outputs but is no weight
        if isinstance(settings, str):
            digest.update(settings.encode())
        if isinstance(self.model, nn.Module):
            state = {**self.model.state_dict(), **dict(self.model.named_buffers())}  # non-persistent buffers too
            for name, tensor in sorted(state.items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(getattr(self.model, "digest", "").encode())  # of the model's file, for loaders that set it
        c = self.config
        digest.update(repr((c.ratio, c.size, c.mean, c.std, c.outputs, self.num_classes, c.class_map)).encode())
        if c.bands is not None:
            digest.update(repr(c.bands).encode())
        return f"{_name_of(self.model)}:{digest.hexdigest()[:16]}"


def _check_refined(model: RefinedModel, config: BaseConfig, normalisation: tuple[Any, Any], label: str) -> None:
    """Raises ``ValueError`` if a base that is itself a refiner cannot be used in this way."""
    mean, std = normalisation
    if any(mean) or {*std} != {1.0}:
        raise ValueError(
            f"base {label}: base.mean = {mean}, base.std = {std}, but it is a refiner, which normalises pixels "
            "itself; leave base.mean and base.std out"
        )
    own = model.refiner.base.config.runtime
    if config.runtime != own:
        raise ValueError(
            f"base {label}: base.runtime = {config.runtime!r}, but its own base runs with {own or 'torch'}; load it by "
            "name, or give the runtime to its own base"
        )


def _are_probabilities(logits: Tensor) -> bool:
    return bool(logits.min() >= 0) and bool(((logits.float().sum(-3) - 1).abs() < 1e-3).all())


def _name_of(model: Callable[..., Any]) -> str:
    """A name that is the same in every process, unlike the repr of a function."""
    name = getattr(model, "__qualname__", None)
    return f"{model.__module__}.{name}" if name else type(model).__name__
