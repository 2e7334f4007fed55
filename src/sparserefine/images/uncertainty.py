"""Full-resolution labels and entropy from coarse logits, without full-resolution logits ``[K, H, W]`` in memory."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.images.coarse import Coarse
from sparserefine.images.upsampling import AxisTaps, normalised

_GPU_CHUNKS = 64  # times larger strips on a GPU, where launching kernels costs more than computing
_CHUNK_ELEMENTS = 1 << 20  # elements of one upsampled strip [K, rows, W]: 4 MiB for any image size


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
    # The result is never negative: total >= 1, and all terms of the sum are <= 0.
    return total.log() - (shifted * exponent).sum(dim) / total


def _entropy_of_two(margin: Tensor) -> Tensor:
    """Entropy of two classes from the difference m of their logits: log(1 + exp(-|m|)) + |m| sigmoid(-|m|)."""
    certainty = margin.abs()
    return F.softplus(-certainty) + certainty * torch.sigmoid(-certainty)


def label_dtype(num_classes: int) -> torch.dtype:
    """Dtype of labels: uint8, or int16 above 255 classes."""
    return torch.uint8 if num_classes <= 255 else torch.int16


def uncertainty(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """Label and entropy of each full-resolution pixel: upsample, then softmax, entropy and argmax, strip by strip.

    Returns:
        Labels ``[B, H, W]`` (uint8, int16 above 255 classes) and entropy ``float32 [B, H, W]`` [nats].
    """
    classes, device, size = coarse.num_classes, coarse.device, coarse.size
    labels = torch.empty(coarse.batch, *size, dtype=label_dtype(classes), device=device)
    entropies = torch.empty(coarse.batch, *size, dtype=torch.float32, device=device)
    margin_only = is_margin(coarse)
    elements = _CHUNK_ELEMENTS * (1 if device.type == "cpu" else _GPU_CHUNKS)
    step = max(1, elements // max(1, classes * size[1]))
    for b in range(coarse.batch):
        rows, columns = (axis.taps(device) for axis in coarse.axes(b))
        image = coarse.logits[b].float()
        image = image[1:] - image[:1] if margin_only else image
        for top in range(0, size[0], step):
            part = slice(top, min(top + step, size[0]))
            strip = _strip(image, rows, columns, part)
            if margin_only:
                labels[b, part] = strip[0] > 0
                entropies[b, part] = _entropy_of_two(strip[0])
            else:
                strip = normalised(strip, coarse.upsampling, dim=0)
                first_largest(strip, labels[b, part])
                entropies[b, part] = entropy(strip, dim=0)
    return labels, entropies


def is_margin(coarse: Coarse) -> bool:
    """True for two classes with logits: label and entropy depend on their difference only, so only it is upsampled."""
    return coarse.num_classes == 2 and coarse.upsampling.outputs == "logits"


def first_largest(strip: Tensor, labels: Tensor) -> None:
    """Writes the argmax over K of ``[K, rows, W]`` into ``labels``, class by class, as a strided argmax is slow."""
    labels.zero_()
    largest = strip[0].clone()
    for k in range(1, strip.shape[0]):
        labels.masked_fill_(strip[k] > largest, k)
        torch.maximum(largest, strip[k], out=largest)


def dense(coarse: Coarse) -> Tensor:
    """Full-resolution logits ``float32 [B, K, H, W]``: 4 K H W bytes per image."""
    images = []
    for b in range(coarse.batch):
        rows, columns = (axis.taps(coarse.device) for axis in coarse.axes(b))
        strip = _strip(coarse.logits[b], rows, columns, slice(0, coarse.size[0]))
        images.append(normalised(strip, coarse.upsampling, dim=0))
    return torch.stack(images)


def sample(coarse: Coarse, coords: Tensor) -> Tensor:
    """Full-resolution logits at some pixels.

    Args:
        coarse: coarse logits of B images.
        coords: ``int [N, 3]``: batch, row, column; sorted by batch.

    Returns:
        ``float32 [N, K]``.
    """
    result = torch.empty(coords.shape[0], coarse.num_classes, device=coords.device)
    batches = torch.arange(coarse.batch + 1, dtype=coords.dtype, device=coords.device)
    bounds = torch.searchsorted(coords[:, 0].contiguous(), batches).tolist()
    for b, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        rows, columns = (axis.taps(coarse.device) for axis in coarse.axes(b))
        r, c = coords[start:end, 1].long(), coords[start:end, 2].long()
        image = coarse.logits[b]
        cells = image.float().flatten(1).t().contiguous()  # [h w, K]: each site reads four rows of it
        width = image.shape[2]
        top, bottom, left, right = rows.low[r] * width, rows.high[r] * width, columns.low[c], columns.high[c]
        across = columns.weight[c, None]
        upper = torch.lerp(cells[top + left], cells[top + right], across)
        lower = torch.lerp(cells[bottom + left], cells[bottom + right], across)
        values = torch.lerp(upper, lower, rows.weight[r, None])
        result[start:end] = normalised(values, coarse.upsampling, dim=1)
    return result


def _strip(image: Tensor, rows: AxisTaps, columns: AxisTaps, part: slice) -> Tensor:
    """Rows ``part`` of ``image [K, h, w]`` upsampled: ``float32 [K, rows, W]``."""
    low, high, weight = rows.low[part], rows.high[part], rows.weight[part, None]
    first, last = int(low[0]), int(high[-1])
    coarse = image[:, first : last + 1].float()
    # Interpolate along the columns first: the strip reads only a few coarse rows.
    wide = torch.lerp(coarse.index_select(2, columns.low), coarse.index_select(2, columns.high), columns.weight)
    return torch.lerp(wide.index_select(1, low - first), wide.index_select(1, high - first), weight)
