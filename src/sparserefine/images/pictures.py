"""Pictures of predictions: class colours, entropy, sites, and the changes made by refinement.

All pictures are ``uint8 [3, H, W]`` on the CPU. Inputs may be on any device. No picture contrasts red with green,
so all are readable with colour blindness: mended pixels are blue, broken ones orange, sites cyan.

Images may have any number of channels. Of more than three, pictures show the first three as red, green and blue; of one
or two, the first in grey. Values are not stretched: 0 is black and 1, or 255, is white.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sparserefine.images.classes import Classes

Colour = tuple[int, int, int]

MENDED: Colour = (86, 180, 233)
"""Sky blue of the Okabe-Ito palette, which is safe for colour blindness."""
BROKEN: Colour = (230, 120, 0)
"""Orange: between Okabe and Ito's orange and vermilion."""
STILL_WRONG: Colour = (112, 112, 112)
STILL_RIGHT: Colour = (38, 38, 38)
SITE: Colour = (0, 225, 255)
"""Cyan: stands out from a dimmed grey photograph by hue and by lightness."""
UNKNOWN: Colour = (128, 128, 128)
"""Grey, for labels that are no class, such as 255."""

_STRIP = 256  # rows blended at once; bounds memory for images of 100 megapixels

_HEAT = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
"""Nine equidistant points of the colour map "inferno" (N. Smith and S. van der Walt, for matplotlib; CC0). Lightness
grows evenly from black to pale yellow, so it is also readable in grey and with colour blindness."""


def overlay(image: Tensor, labels: Tensor, classes: Classes, alpha: float = 0.5) -> Tensor:
    """The image with the classes' colours blended over it.

    The image stays as it is at labels that are no class, and at class 0 if its colour is black (background).

    Args:
        image: ``[C, H, W]``, uint8, or floating point in 0..1.
        labels: integers ``[H, W]``.
        classes: gives the colours.
        alpha: weight of the class colour, 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha}, expected 0..1")
    result = _to_uint8(image)
    labels = _to_plane(labels, result)
    bare_background = classes.palette[0] == (0, 0, 0)
    for top in range(0, labels.shape[0], _STRIP):
        index, pixels = _class_index(labels[top : top + _STRIP], classes), result[:, top : top + _STRIP]
        shown = (index < len(classes)) & ((index != 0) | (not bare_background))
        blend = torch.lerp(pixels.float(), _class_colours(index, classes).float(), alpha).round().to(torch.uint8)
        pixels.copy_(torch.where(shown, blend, pixels))
    return result


def labels_picture(labels: Tensor, classes: Classes) -> Tensor:
    """Labels, integers ``[H, W]``, in the classes' colours; labels that are no class are grey."""
    return _class_colours(_class_index(_to_plane(labels), classes), classes)


def heat(values: Tensor, limit: float) -> Tensor:
    """Heat map of values: 0 is black, then purple and orange; ``limit`` and above is pale yellow.

    Args:
        values: floating point ``[H, W]``, such as entropy [nats].
        limit: value of the brightest colour. For entropy over K classes: ln K, or less to show low values better.
    """
    if not limit > 0:
        raise ValueError(f"limit = {limit}, expected more than 0")
    values = _to_plane(values)
    bad = int(values.numel() - values.isfinite().sum())
    if bad:
        raise ValueError(f"{bad} of {values.numel()} values are NaN or infinite, expected finite ones")
    points = np.asarray(_HEAT)
    at, knots = np.linspace(0, 1, 256), np.linspace(0, 1, len(points))
    table = np.stack([np.interp(at, knots, points[:, c]) for c in range(3)], axis=1).round().astype(np.uint8)
    index = (values.float() / limit).clamp(0, 1).mul(255).round().int()
    return _apply_palette(index, torch.from_numpy(table))


def sites_picture(image: Tensor, mask: Tensor) -> Tensor:
    """The image in dimmed grey, with the sites in cyan.

    Args:
        image: ``[C, H, W]``, uint8, or floating point in 0..1.
        mask: ``bool [H, W]``, true at the sites.
    """
    pixels = _to_uint8(image)
    mask = _to_plane(mask, pixels).bool()
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601 luma
    dimmed = (0.6 * torch.tensordot(weights, pixels.float(), 1)).round().to(torch.uint8)
    return torch.stack([dimmed.masked_fill(mask, value) for value in SITE])


def changes(before: Tensor, after: Tensor, truth: Tensor) -> Tensor:
    """What refinement changed: mended pixels sky blue, broken ones orange.

    Other pixels are dark grey if both labels are right, lighter grey if both are wrong, and black if the truth is 255
    (ignored).

    Args:
        before: labels ``[H, W]`` before refinement.
        after: labels ``[H, W]`` after it.
        truth: true labels ``[H, W]``.
    """
    truth = _to_plane(truth)
    was_right, is_right = _to_plane(before, truth) == truth, _to_plane(after, truth) == truth
    index = 2 * was_right.int() + is_right.int()
    index[truth == 255] = 4
    return _apply_palette(index, torch.tensor([STILL_WRONG, MENDED, BROKEN, STILL_RIGHT, (0, 0, 0)], dtype=torch.uint8))


def shrink(picture: Tensor, longest: int) -> Tensor:
    """Shrinks a picture or an image, ``[C, H, W]``, with antialiasing, so that no side exceeds ``longest`` [px]."""
    if longest < 1:
        raise ValueError(f"longest = {longest}, expected at least 1 pixel")
    picture = _to_uint8(picture)
    height, width = picture.shape[1:]
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return _to_tensor(_to_pillow(picture).resize(size, Image.Resampling.LANCZOS))


def side_by_side(panels: Sequence[tuple[str, Tensor]], zoom: int = 1, columns: int | None = None) -> Tensor:
    """Pictures of equal size in a grid on white, each with its caption below it.

    Args:
        panels: caption and picture ``uint8 [3, H, W]``. Captions are broken into lines as wide as the picture.
        zoom: each pixel becomes a square of ``zoom`` x ``zoom``.
        columns: pictures per row; ``None``: all in one row.
    """
    if not panels:
        raise ValueError("no panels; expected at least one (caption, picture)")
    if zoom < 1 or (columns is not None and columns < 1):
        raise ValueError(f"zoom = {zoom}, columns = {columns}; expected at least 1")
    pictures = [_to_uint8(picture) for _, picture in panels]
    for (caption, _), picture in zip(panels, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"panel {caption!r} is {_size_text(picture)} px, {panels[0][0]!r} {_size_text(pictures[0])}; "
                "they must be equal"
            )
    height, width = (zoom * side for side in pictures[0].shape[1:])
    columns = min(columns or len(panels), len(panels))
    size, font, captions = _fit_captions([caption for caption, _ in panels], width)
    line, gap = round(1.3 * size), max(4, size // 2)
    strip = line * max(len(lines) for lines in captions) + 3 * line // 4
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + strip) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + strip)
        sheet.paste(_to_pillow(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for n, text in enumerate(lines):
            draw.text((left, top + height + line // 4 + n * line), text, fill=(30, 30, 30), font=font)
    return _to_tensor(sheet)


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _fit_captions(captions: list[str], width: int) -> tuple[int, _Font, list[list[str]]]:
    """Font size, font, and the captions broken into lines, such that every line fits a picture of ``width`` [px]."""
    for size in range(min(40, max(11, width // 24)), 7, -1):
        font = ImageFont.load_default(size)
        lines = [_wrap(caption, font, width) for caption in captions]
        if all(font.getlength(line) <= width for caption in lines for line in caption):
            break
    return size, font, lines


def _wrap(caption: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in caption.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _to_uint8(image: Tensor) -> Tensor:
    """Copies the channels of an image that pictures show to ``uint8 [3, H, W]`` on the CPU."""
    if image.dim() != 3 or min(image.shape) < 1:
        raise ValueError(f"image is {tuple(image.shape)}, expected [C, H, W] with at least one pixel")
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if image.is_floating_point():
        return image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    if image.dtype != torch.uint8:
        raise ValueError(f"image is {image.dtype}, expected uint8, or floating point in 0..1")
    return image.cpu().clone()


def _to_plane(plane: Tensor, like: Tensor | None = None) -> Tensor:
    """Checks that ``plane`` is ``[H, W]``, of the same size as ``like``, and moves it to the CPU."""
    if plane.dim() != 2:
        raise ValueError(f"labels, mask or values are {tuple(plane.shape)}, expected [H, W]")
    if like is not None and plane.shape != like.shape[-2:]:
        raise ValueError(
            f"labels or mask are {tuple(plane.shape)}, expected {tuple(like.shape[-2:])} like the other input"
        )
    return plane.detach().cpu()


def _class_index(labels: Tensor, classes: Classes) -> Tensor:
    """``int32 [H, W]``: the class, or K where the label is no class."""
    index = labels.int()
    return index.masked_fill((index < 0) | (index >= len(classes)), len(classes))


def _class_colours(index: Tensor, classes: Classes) -> Tensor:
    return _apply_palette(index, torch.tensor([*classes.palette, UNKNOWN], dtype=torch.uint8))


def _apply_palette(index: Tensor, colours: Tensor) -> Tensor:
    """``int32 [H, W]``, ``uint8 [colours, 3]`` -> ``uint8 [3, H, W]``, one channel at a time to save memory."""
    flat = index.reshape(-1)
    return torch.stack([channel.index_select(0, flat) for channel in colours.t()]).view(3, *index.shape)


def _to_pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _size_text(picture: Tensor) -> str:
    return f"{picture.shape[2]}x{picture.shape[1]}"
