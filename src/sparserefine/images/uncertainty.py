"""Labels and entropy of coarse logits at full resolution, without ever holding ``[K, H, W]`` there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.upsampling import AxisTaps, Upsampling, Window, normalised, taps_of

_GPU_CHUNKS = 64  # a GPU takes larger strips: its time goes into launches
_CHUNK_ELEMENTS = 1 << 20  # of one upsampled strip [K, rows, W]: 4 MiB, bounded whatever the image


def entropy(logits: Tensor, dim: int = -1) -> Tensor:
    """Shannon entropy of softmax(logits) along ``dim`` [nats]: H = log sum exp(z) - sum p z, with z the shifted logits.

    >>> float(entropy(torch.tensor([0.0, 0.0])))  # ln 2
    0.6931471824645996
    """
    if logits.shape[dim] == 2:
        first, second = logits.unbind(dim)
        return _entropy_of_two(second - first)
    shifted = logits - logits.amax(dim, keepdim=True)
    exponent = shifted.exp()
    total = exponent.sum(dim)
    # Never negative: the total is at least 1, and no term of the sum is positive.
    return total.log() - (shifted * exponent).sum(dim) / total


def _entropy_of_two(margin: Tensor) -> Tensor:
    """Entropy of two classes from the difference m of their logits: log(1 + exp(-|m|)) + |m| sigmoid(-|m|)."""
    certainty = margin.abs()
    return F.softplus(-certainty) + certainty * torch.sigmoid(-certainty)


def label_dtype(num_classes: int) -> torch.dtype:
    """uint8, or int16 above 255 classes."""
    return torch.uint8 if num_classes <= 255 else torch.int16


def uncertainty(
    logits: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> tuple[Tensor, Tensor]:
    """Label and entropy of each full-resolution pixel: upsample, then softmax, entropy and argmax, strip by strip.

    Args:
        logits: the base's outputs, ``[B, K, h, w]``, floating point; or B times ``[K, h, w]`` where sizes differ.
        size: H and W of the result [px].
        how: interpolation and meaning of ``logits``.
        windows: for each image the part of it that the result shows; ``None``: all of it.

    Returns:
        Labels ``[B, H, W]`` (uint8, int16 above 255 classes) and entropy ``float32 [B, H, W]`` [nats].
    """
    how = how or Upsampling()
    batch, classes, device = len(logits), logits[0].shape[0], logits[0].device
    labels = torch.empty(batch, *size, dtype=label_dtype(classes), device=device)
    entropies = torch.empty(batch, *size, dtype=torch.float32, device=device)
    # Interpolation is linear, so of two classes only the difference of the logits need be interpolated.
    margin_only = classes == 2 and how.outputs == "logits"
    elements = _CHUNK_ELEMENTS * (1 if device.type == "cpu" else _GPU_CHUNKS)
    step = max(1, elements // max(1, classes * size[1]))
    for b in range(batch):
        rows, columns = taps_of(logits[b], size, how, windows[b] if windows else None)
        image = logits[b].float()
        image = image[1:] - image[:1] if margin_only else image
        for top in range(0, size[0], step):
            part = slice(top, min(top + step, size[0]))
            strip = _strip(image, rows, columns, part)
            if margin_only:
                labels[b, part] = strip[0] > 0
                entropies[b, part] = _entropy_of_two(strip[0])
            else:
                strip = normalised(strip, how, dim=0)
                first_largest(strip, labels[b, part])
                entropies[b, part] = entropy(strip, dim=0)
    return labels, entropies


def first_largest(strip: Tensor, labels: Tensor) -> None:
    """Writes the argmax over the first of ``[K, rows, W]``, class by class: argmax along a strided axis is slow."""
    labels.zero_()
    largest = strip[0].clone()
    for k in range(1, strip.shape[0]):
        labels.masked_fill_(strip[k] > largest, k)
        torch.maximum(largest, strip[k], out=largest)


def dense(logits: Tensor | Sequence[Tensor], size: tuple[int, int], how: Upsampling | None = None) -> Tensor:
    """Full-resolution logits ``float32 [B, K, H, W]``, for who asks for them: 4 K H W bytes an image."""
    how = how or Upsampling()
    images = []
    for image in logits:
        rows, columns = taps_of(image, size, how, None)
        images.append(normalised(_strip(image, rows, columns, slice(0, size[0])), how, dim=0))
    return torch.stack(images)


def sample(
    logits: Tensor | Sequence[Tensor],
    coords: Tensor,
    size: tuple[int, int],
    how: Upsampling | None = None,
    windows: Sequence[Window] | None = None,
) -> Tensor:
    """Full-resolution logits at some pixels only.

    Args:
        logits: as for :func:`uncertainty`.
        coords: ``int [N, 3]``: batch, row, column.
        size: H and W [px] that rows and columns refer to.
        how: as for :func:`uncertainty`.
        windows: as for :func:`uncertainty`.

    Returns:
        ``float32 [N, K]``.
    """
    how = how or Upsampling()
    result = torch.empty(coords.shape[0], logits[0].shape[0], device=coords.device)
    bounds = torch.searchsorted(
        coords[:, 0].contiguous(), torch.arange(len(logits) + 1, dtype=coords.dtype, device=coords.device)
    ).tolist()
    for b, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        rows, columns = taps_of(logits[b], size, how, windows[b] if windows else None)
        r, c = coords[start:end, 1].long(), coords[start:end, 2].long()
        cells = logits[b].float().flatten(1).t().contiguous()  # [h w, K]: a site reads four whole rows
        width = logits[b].shape[2]
        top, bottom, left, right = rows.low[r] * width, rows.high[r] * width, columns.low[c], columns.high[c]
        across = columns.weight[c, None]
        upper = torch.lerp(cells[top + left], cells[top + right], across)
        lower = torch.lerp(cells[bottom + left], cells[bottom + right], across)
        result[start:end] = normalised(torch.lerp(upper, lower, rows.weight[r, None]), how, dim=1)
    return result


def _strip(image: Tensor, rows: AxisTaps, columns: AxisTaps, part: slice) -> Tensor:
    """Rows ``part`` of ``image [K, h, w]`` upsampled: ``float32 [K, rows, W]``."""
    low, high, weight = rows.low[part], rows.high[part], rows.weight[part, None]
    first, last = int(low[0]), int(high[-1])
    coarse = image[:, first : last + 1].float()
    # Columns first, on the few coarse rows that this strip reads.
    wide = torch.lerp(coarse.index_select(2, columns.low), coarse.index_select(2, columns.high), columns.weight)
    return torch.lerp(wide.index_select(1, low - first), wide.index_select(1, high - first), weight)
