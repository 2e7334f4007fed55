"""``sparserefine data preview``: a contact sheet of what training would see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.text import printable
from sparserefine.images.pictures import heat, labels_picture, overlay, shrink, side_by_side, sites_picture
from sparserefine.images.upsampling import entropy_limit
from sparserefine.refiner import SparseRefiner

WIDTH = 480
"""Of a picture of the sheet [px]: images are shrunk to it."""
_MOST_IMAGES = 50


@torch.no_grad()
def preview(data: Dataset, images: int, refiner: SparseRefiner | None = None) -> Tensor:
    """A sheet with a row for each image: the image, its label, and what a base makes of it.

    Args:
        data: the split; ``images`` of them are shown, from all parts of it.
        images: how many.
        refiner: an untrained one, for its base and threshold: coarse labels, entropy and sites; default: none of them.

    Returns:
        ``uint8 [3, h, w]``.

    Raises:
        ValueError: ``images`` is out of range, or a file or prediction is not as it must be.
    """
    if not 1 <= images <= _MOST_IMAGES:
        raise ValueError(f"--most_images = {images}, expected 1 to {_MOST_IMAGES}")
    count = min(images, len(data))
    panels = []
    for row in range(count):
        index = (2 * row + 1) * len(data) // (2 * count)
        panels += [(text, shrink(picture, WIDTH)) for text, picture in _row(data, index, refiner)]
    height, width = (max(picture.shape[axis] for _, picture in panels) for axis in (1, 2))
    return side_by_side(
        [(text, _on_white(picture, height, width)) for text, picture in panels], columns=len(panels) // count
    )


def _row(data: Dataset, index: int, refiner: SparseRefiner | None) -> Iterator[tuple[str, Tensor]]:
    """Caption and picture of each column."""
    image, label, valid = data.example(index)
    sample, k = data.samples[index], len(data.classes)
    size = f"{image.shape[2]}x{image.shape[1]}"
    without = "" if valid is None else f", {100 * float((~valid).float().mean()):.1f} % without data"
    yield f"{printable(sample.name)}, {size}{without}", image
    if sample.label is None:
        yield "no label", image
    else:
        yield "label; grey: ignored", labels_picture(label, data.classes)
    if refiner is None:
        return
    engine, there = refiner.engine.on(image.device), (image.shape[1], image.shape[2])
    coarse = refiner.coarse_of(refiner.base(image[None]), there)
    labels, entropies = engine.uncertainty(coarse)
    mask = refiner.selector.mask(entropies, None if valid is None else valid[None], engine)[0]
    known = torch.ones_like(mask) if valid is None else valid  # what has no data is black, and of no entropy
    right = (labels[0] == label)[label < k]
    told = f", {100 * float(right.float().mean()):.1f} % right" if right.numel() else ""
    seen = "x".join(map(str, refiner.base.input_size(*there)[::-1]))
    yield f"base: {seen}{told}", overlay(image, labels[0], data.classes) * known
    yield f"entropy, 0 to {entropy_limit(k):.2f} nats", heat(entropies[0] * known, entropy_limit(k))
    yield f"sites: {100 * float(mask.float().mean()):.1f} %", sites_picture(image, mask)


def _on_white(picture: Tensor, height: int, width: int) -> Tensor:
    """The picture in the middle of a white one of that size [px]."""
    result = torch.full((3, height, width), 255, dtype=torch.uint8)
    top, left = (height - picture.shape[1]) // 2, (width - picture.shape[2]) // 2
    result[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return result
