"""A plain dense U-Net: the base, and the dense model to compare with, in the demo and ``examples/hrf``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.files.tensors import check_finite, check_weights, read_header, read_tensors, write_tensors
from sparserefine.files.text import first_line
from sparserefine.files.typed import from_json, shown
from sparserefine.files.whole import written_whole
from sparserefine.images.coarse import MAX_CLASSES
from sparserefine.images.normalisation import IMAGENET_MEAN, MOST_CHANNELS

_MOST_LEVELS, _MOST_CHANNELS = 16, 1 << 16


def _double_conv(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with batch normalisation and padded convolutions.

    Args:
        num_classes: K.
        planes: channels of each level, from full size down.
        in_channels: C of the image.
    """

    def __init__(
        self,
        num_classes: int,
        planes: Sequence[int] = (16, 32, 64, 96, 128),
        in_channels: int = len(IMAGENET_MEAN),
    ) -> None:
        super().__init__()
        self.num_classes, self.planes, self.in_channels = num_classes, tuple(planes), in_channels
        before = (in_channels, *self.planes[:-1])
        self.down = nn.ModuleList(_double_conv(a, b) for a, b in zip(before, self.planes, strict=True))
        pairs = [(self.planes[i + 1], self.planes[i]) for i in reversed(range(len(self.planes) - 1))]
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_double_conv(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(self.planes[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """``float [B, C, H, W]``, normalised -> logits ``[B, K, H, W]``; any H and W."""
        h, w = image.shape[-2:]
        multiple = 2 ** (len(self.planes) - 1)
        x = F.pad(image, (0, -w % multiple, 0, -h % multiple))
        x = x.contiguous(memory_format=torch.channels_last)  # 1.7 times faster on the CPU
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits[..., :h, :w].contiguous()


def unet_tensors(model: UNet, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file that :func:`load_unet` reads; weights are converted to ``dtype``.

    Raises:
        ValueError: weights are NaN or infinite, or not within the range of ``dtype``.
    """
    tensors = {
        name: value.detach().to(dtype) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    check_finite(tensors, f"U-Net in {dtype}, not stored")
    architecture = {"num_classes": model.num_classes, "planes": list(model.planes)}
    if model.in_channels != len(IMAGENET_MEAN):  # versions that do not know it can still read the others
        architecture["in_channels"] = model.in_channels
    return tensors, {"unet": json.dumps(architecture)}


def save_unet(model: UNet, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the weights, converted to ``dtype``, and the architecture into one safetensors file.

    Raises:
        ValueError: weights are NaN or infinite, or not within the range of ``dtype``; nothing is written.
        OSError: the file cannot be written.
    """
    tensors, header = unet_tensors(model, dtype)
    with written_whole(path) as temporary:
        write_tensors(temporary, tensors, header)


def load_unet(path: str | Path) -> UNet:
    """Reads a file of :func:`save_unet`; the weights become float32.

    Raises:
        ValueError: the file has another format, header and weights do not fit, or weights are NaN or infinite.
        FileNotFoundError: there is no such file.
    """
    header = read_header(path).get("unet")
    if header is None:
        raise ValueError(
            f"{path}: no 'unet' header; expected a file written by sparserefine.bases.families.unet.save_unet"
        )
    found = _architecture(header, path)
    tensors = read_tensors(path)
    with torch.device("meta"):  # shapes only: a header may claim any size, and the tensors decide
        own = UNet(found.num_classes, found.planes, found.in_channels).state_dict()
    check_weights(tensors, own, path)
    model = UNet(found.num_classes, found.planes, found.in_channels)
    model.load_state_dict(tensors)
    return model.eval()


@dataclass(frozen=True)
class _Architecture:
    """The arguments of a :class:`UNet` in the header of its file."""

    num_classes: int
    planes: tuple[int, ...]
    in_channels: int = len(IMAGENET_MEAN)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes = {self.num_classes}, expected 1 to {MAX_CLASSES}")
        if not 1 <= len(self.planes) <= _MOST_LEVELS or not all(1 <= c <= _MOST_CHANNELS for c in self.planes):
            raise ValueError(
                f"planes = {shown(self.planes)}, expected 1 to {_MOST_LEVELS} numbers of channels, each of 1 to "
                f"{_MOST_CHANNELS}"
            )
        if not 1 <= self.in_channels <= MOST_CHANNELS:
            raise ValueError(f"in_channels = {self.in_channels}, expected 1 to {MOST_CHANNELS}")


def _architecture(header: str, path: str | Path) -> _Architecture:
    """What a file's header says; errors as in :func:`load_unet`."""
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its 'unet' header is not readable as JSON ({first_line(error)})") from error
    return from_json(_Architecture, values, f"{path}: 'unet' header", optional=("in_channels",))
