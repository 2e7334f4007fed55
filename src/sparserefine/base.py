"""FrozenBase: whatever segments images, as one thing that maps full-size images to coarse logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BaseConfig:
    """Which base, and how it wants its input.

    Attributes:
        name: ``unet:<file>`` or ``python:<module>:<callable>``; empty: a base given in Python.
        ratio: input size relative to the image; give this or ``size``.
        size: fixed input height and width [px].
        mean: subtracted from pixels in 0..1, per channel.
        std: divided by, per channel.
        outputs: ``logits``, or ``scores`` >= 0 that are proportional to probabilities.
    """

    name: str = ""
    ratio: float | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    outputs: Literal["logits", "scores"] = "logits"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.size is None):
            raise ValueError(f"base: give either ratio or size of its input, got ratio={self.ratio}, size={self.size}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"base.ratio = {self.ratio}, expected more than 0 and at most 1")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"base.size = {self.size}, expected at least 1 pixel each way")
        check_normalisation("base", self.mean, self.std)
        if self.outputs not in ("logits", "scores"):
            raise ValueError(f"base.outputs = {self.outputs!r}, expected 'logits' or 'scores'")


def check_normalisation(whose: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ``ValueError`` unless there are three of each and the spreads are positive."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{whose}.mean = {mean}, {whose}.std = {std}; expected 3 values each, std above 0")


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize, ``[B, C, H, W]`` of any real dtype -> ``float32 [B, C, h, w]``, same value range.

    One channel at a time, so that a 100-megapixel uint8 image costs one float plane and not three.
    """
    if tuple(image.shape[-2:]) == size:
        return image.float()
    planes = [
        F.interpolate(image[:, c : c + 1].float(), size, mode="bilinear", align_corners=False, antialias=True)
        for c in range(image.shape[1])
    ]
    return torch.cat(planes, dim=1)


class FrozenBase(nn.Module):
    """A frozen segmentation model: image at full size in, coarse logits out.

    The model is put into evaluation mode and its parameters stop requiring gradients; calling ``.train()`` on a module
    that contains this one changes neither. It runs without recording gradients.

    Args:
        model: a module or any callable, ``float32 [B, 3, h, w]`` -> coarse outputs: a tensor, a tuple or list that
            starts with it, a mapping with ``logits`` or ``out``, or an object with ``.logits``.
        num_classes: K; checked against every output.
        config: input size, normalisation and meaning of the outputs.
    """

    def __init__(self, model: Callable[..., Any], num_classes: int, config: BaseConfig) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes = {num_classes}, expected at least 2; a model with one foreground channel z becomes one "
                "of two with torch.cat([torch.zeros_like(z), z], 1)"
            )
        self.model = model
        self.num_classes = num_classes
        self.config = config
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
        self._macs: dict[tuple[int, ...], int | None] = {}
        self.train(False)

    def train(self, mode: bool = True) -> FrozenBase:
        """Stays in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the model's input for an image of ``height`` x ``width`` [px]."""
        if self.config.size is not None:
            return self.config.size
        assert self.config.ratio is not None  # BaseConfig has one of the two
        return max(1, round(height * self.config.ratio)), max(1, round(width * self.config.ratio))

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Coarse outputs of images.

        Args:
            image: ``[B, 3, H, W]``, uint8, or floating point in 0..1.

        Returns:
            ``[B, K, h, w]`` at the model's own output size.

        Raises:
            ValueError: wrong shape or class count, or values that are not finite (NaN, infinity).
            TypeError: the model returned something else than the forms above.
        """
        check_image(image)
        x = resize(image, self.input_size(*image.shape[-2:]))
        scale = 255.0 if image.dtype == torch.uint8 else 1.0
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std))
        x = ((x / scale - mean) / std).contiguous()
        if isinstance(self.model, nn.Module):  # a model in half precision takes its input so
            x = x.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype))
        return self.checked(_tensor_of(self.model(x), self.label), len(image))

    @property
    def label(self) -> str:
        """What messages call this base."""
        return self.config.name or _name_of(self.model)

    def checked(self, logits: Tensor, batch: int) -> Tensor:
        """Returns ``logits``, or raises ``ValueError`` if shape, class count or values are wrong."""
        if logits.dim() != 4 or logits.shape[0] != batch:
            raise ValueError(f"base {self.label}: output is {tuple(logits.shape)}, expected [{batch}, K, h, w]")
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"base {self.label}: {logits.shape[1]} classes, expected {self.num_classes}")
        if not logits.is_floating_point():
            raise ValueError(f"base {self.label}: output is {logits.dtype}, expected floating-point logits, not labels")
        bad = int(logits.numel() - logits.isfinite().sum())
        if bad:
            raise ValueError(
                f"base {self.label}: {bad} of {logits.numel()} coarse logits are NaN or infinite; check its "
                "weights, its normalisation, and the precision it runs in"
            )
        if self.config.outputs == "scores" and logits.min() < 0:
            raise ValueError(
                f"base {self.label}: outputs='scores' but the smallest is {float(logits.min()):.4g}, expected >= 0; "
                "say outputs='logits' if these are logits"
            )
        return logits

    def macs(self, height: int, width: int) -> int | None:
        """Multiply-accumulates for one image of that size; ``None`` where torch cannot see them (not a torch model)."""
        size = self.input_size(height, width)
        if size not in self._macs:
            self._macs[size] = count_macs(self.model, (1, 3, *size))
        return self._macs[size]

    @property
    def identity(self) -> str:
        """Changes with the weights and with anything that changes the outputs; stored beside coarse logits."""
        digest = hashlib.sha256()
        if isinstance(self.model, nn.Module):
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        c = self.config
        digest.update(repr((c.ratio, c.size, c.mean, c.std, c.outputs, self.num_classes)).encode())
        return f"{_name_of(self.model)}:{digest.hexdigest()[:16]}"


def check_image(image: Tensor) -> None:
    """Raises ``ValueError`` unless ``image`` is uint8 or floating point ``[B, 3, H, W]`` with pixels."""
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise ValueError(f"image is {tuple(image.shape)}, expected [B, 3, H, W] with at least one pixel")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}, expected uint8, or floating point in 0..1")


def _name_of(model: Callable[..., Any]) -> str:
    """The same in every process, which the repr of a function is not."""
    name = getattr(model, "__qualname__", None)
    return f"{model.__module__}.{name}" if name else type(model).__name__


def _tensor_of(output: Any, label: str) -> Tensor:
    found = output
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("logits", "out") if key in found), found)
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, Sequence) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"base {label}: returned {type(output).__name__}{keys}, expected a tensor, a tuple that starts with one, a "
            "mapping with 'logits' or 'out', or an object with .logits; wrap the model in a function that returns it"
        )
    return found


def count_macs(model: Callable[..., Any], shape: tuple[int, ...]) -> int | None:
    """Multiply-accumulates of convolutions and matrix products of ``model(float32 shape)``.

    A module is counted on the meta device (no memory, no time); what cannot run there is run once for real.
    """
    counter = FlopCounterMode(display=False)
    try:
        if not isinstance(model, nn.Module):
            raise TypeError("a plain callable may hold tensors that are not on the meta device")
        state = {k: v.to("meta") for k, v in (*model.named_parameters(), *model.named_buffers())}
        with torch.no_grad(), counter:
            functional_call(model, state, (torch.empty(shape, device="meta"),))
    except Exception:  # whatever a foreign model does on meta, counting by running it is right
        counter = FlopCounterMode(display=False)
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = tensors[0].device if tensors else torch.device("cpu")
        try:
            with torch.no_grad(), counter:
                model(torch.zeros(shape, device=device))
        except Exception:  # what cannot be counted is reported as unknown, and must not stop a prediction
            return None
    flops = counter.get_total_flops()
    return flops // 2 if flops else None
