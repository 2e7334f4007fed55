"""SoftLabels: class probabilities of an image in a few bytes a pixel, and what they are at the pixels of a crop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Axis, Window

_SMALLEST = 2.0**-24
"""Above 0 in float16: what is stored as probability 0 may have been as large as half of it."""
_LARGEST = 65504.0
"""In float16."""
_LEAST = 1e-10
"""Scores are clipped there before their logarithm is taken."""


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The two most probable classes of each cell of a prediction. All other classes share the rest evenly.

    Of two classes, the log-odds say everything. Of more, the second probability and the rest are stored: they are small
    where the first is close to 1, and small numbers are precise.

    Attributes:
        values: ``float16 [1, h, w]``, the log-odds of class 1, for two classes; ``float16 [2, h, w]`` for more: the
            second largest probability, and the sum of all but the two largest.
        classes: ``[2, h, w]``: the most probable class and the second, uint8, or int16 above 255 classes;
            ``uint8 [0, h, w]`` for two classes.
        num_classes: K.
        whole: height and width of the whole prediction.
        start: row and column of the whole prediction at which this part of it begins.
    """

    values: Tensor
    classes: Tensor
    num_classes: int
    whole: tuple[int, int]
    start: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, outputs: Tensor, kind: Literal["logits", "scores"]) -> SoftLabels:
        """From a model's outputs ``[K, h, w]``, logits or scores, on their device."""
        k, (height, width) = len(outputs), outputs.shape[1:]
        x = outputs.float()
        if k == 2:
            first, second = x if kind == "logits" else x.clamp_min(_LEAST).log()
            odds = (second - first).clamp(-_LARGEST, _LARGEST).half()[None]
            return cls(odds, torch.empty(0, height, width, dtype=torch.uint8, device=x.device), k, (height, width))
        if kind == "logits":
            p = x.softmax(0)
        else:
            p = x.clamp_min(_LEAST) / x.clamp_min(_LEAST).sum(0)
        largest = []
        for _ in range(2):
            value, index = p.max(0, keepdim=True)
            largest.append((value, index))
            p = p.scatter(0, index, 0.0)
        values = torch.cat([largest[1][0], p.sum(0, keepdim=True)]).half()
        classes = torch.cat([index for _, index in largest]).to(label_dtype(k))
        return cls(values, classes, k, (height, width))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.values.nbytes + self.classes.nbytes

    def to(self, device: torch.device) -> SoftLabels:
        """The same on another device."""
        # Towards the CPU it would return before the values are there.
        ahead = device.type == "cuda"
        values, classes = (x.to(device, non_blocking=ahead) for x in (self.values, self.classes))
        return replace(self, values=values, classes=classes)

    def seen_by(
        self, window: Window, size: tuple[int, int], mirrored: tuple[bool, bool] = (False, False)
    ) -> SoftLabels:
        """The part that a crop needs, on the CPU; reads nothing else of this whole prediction.

        Args:
            window: the part of the image that the crop shows; of the mirrored image if the crop is mirrored.
            size: H and W of the crop [px].
            mirrored: whether the crop is upside down, and whether left and right are swapped.
        """
        values, classes, start = self.values, self.classes, [0, 0]
        for axis in (0, 1):
            cells = self.whole[axis]
            taps = Axis(size[axis], cells, float(window.full[axis]), float(window.offset[axis])).taps()
            first, end = int(taps.low[0]), int(taps.high[-1]) + 1
            there = slice(cells - end, cells - first) if mirrored[axis] else slice(first, end)
            dim = axis + 1
            values, classes = (x[(slice(None),) * dim + (there,)] for x in (values, classes))
            start[axis] = first
        dims = tuple(axis + 1 for axis in (0, 1) if mirrored[axis])
        # By NumPy: torch would use all its threads for it, in each of a loader's threads.
        values, classes = (torch.from_numpy(np.flip(x.numpy(), dims).copy()) for x in (values, classes))
        return replace(self, values=values, classes=classes, start=(start[0], start[1]))

    def at(self, rows: Tensor, columns: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
        """Logits of N pixels of a crop, ``float32 [N, K]``, interpolated as coarse logits are.

        Args:
            rows: of the pixels, integers ``[N]``.
            columns: of the pixels, integers ``[N]``.
            window: the part of the image that the crop shows.
            size: H and W of the crop [px].
        """
        y, x = (
            Axis(size[axis], self.whole[axis], float(window.full[axis]), float(window.offset[axis])).taps(rows.device)
            for axis in (0, 1)
        )
        top, bottom = ((of[rows] - self.start[0]) * self.values.shape[2] for of in (y.low, y.high))
        left, right = (of[columns] - self.start[1] for of in (x.low, x.high))
        across, down = x.weight[columns][:, None], y.weight[rows][:, None]
        upper, lower = (torch.lerp(self._cells(row + left), self._cells(row + right), across) for row in (top, bottom))
        return torch.lerp(upper, lower, down)

    def logits(self) -> Tensor:
        """Logits of all cells of this part, ``float32 [K, h, w]``."""
        height, width = self.values.shape[1:]
        every = torch.arange(height * width, device=self.values.device)
        return self._cells(every).t().reshape(self.num_classes, height, width)

    def labels(self) -> Tensor:
        """The most probable class of each cell, ``[h, w]``: uint8, or int16 above 255 classes."""
        return self.classes[0] if self.num_classes > 2 else (self.values[0] > 0).to(torch.uint8)

    def _cells(self, index: Tensor) -> Tensor:
        """Logits ``float32 [N, K]`` of cells, by their row-major position in this part."""
        values = self.values.flatten(1)[:, index].float()
        if self.num_classes == 2:
            return torch.cat([torch.zeros_like(values), values]).t()
        second, rest = values
        others = (rest.clamp_min(_SMALLEST) / (self.num_classes - 2)).log()
        two = torch.stack([1 - second - rest, second], 1).clamp_min(_SMALLEST).log()
        classes = self.classes.flatten(1)[:, index].long().t()
        return torch.scatter(others[:, None].repeat(1, self.num_classes), 1, classes, two)
