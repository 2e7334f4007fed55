"""Teacher: the frozen model at full resolution, whose predictions are the targets of training."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.files.text import first_line
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.resize import resize
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.loading import load_base
from sparserefine.machine.exhausted import out_of_memory
from sparserefine.sparse import Engine
from sparserefine.training.teacher_config import ALIGNED, TeacherConfig

Span = tuple[int, int]
"""First and end."""
_STRIDES = (1, 2, 4, 8, 16, 32)
"""Pixels of the input for each cell of the output."""


class Teacher:
    """The model that :class:`TeacherConfig` names.

    Args:
        config: which model, its input, and its windows.
        base: configuration of the refiner's base.
        classes: of the data.
        device: where it runs.
        engine: of a teacher ``refiner:<folder>``.

    Attributes:
        model: the model as a base.
    """

    def __init__(
        self, config: TeacherConfig, base: BaseConfig, classes: Classes, device: torch.device, *, engine: str = "auto"
    ) -> None:
        self.config, self._device = config, device
        self.model = load_base(config.base_config(base), classes, engine=engine).to(device)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of everything that changes its predictions."""
        c = self.config
        return self.model.identity + (f":windows {c.window}, overlap {c.overlap}" if c.window else "")

    @torch.no_grad()
    def predict(self, image: Tensor) -> SoftLabels:
        """The prediction of a whole image, ``[C, H, W]``, uint8, or floating point in 0..1; on the CPU.

        Raises:
            ValueError: as :meth:`FrozenBase.forward` does, or its output does not fit its windows.
            MemoryError: it does not fit into memory.
        """
        try:
            if not self.config.window:
                return self._compact(self.model, image[None])
            return self._in_windows(image[None])
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            seen = "{} x {}".format(*self.model.input_size(*image.shape[1:]))
            cure = f"less than {self.config.window}" if self.config.window else "1024, for instance"
            raise MemoryError(
                f"teacher {self.model.label}: an input of {seen} pixels does not fit into memory; let it see windows: "
                f"teacher.window {cure} ({first_line(error)})"
            ) from error

    def _compact(self, model: FrozenBase, image: Tensor) -> SoftLabels:
        return SoftLabels.of(model(image.to(self._device))[0], model.outputs).to(torch.device("cpu"))

    def _in_windows(self, image: Tensor) -> SoftLabels:
        """One window after the other; of each, the part up to the middle of its overlaps."""
        size = self.model.input_size(*image.shape[2:])
        if size != tuple(image.shape[2:]):
            white = 255 if image.dtype == torch.uint8 else 1
            image = resize(image, size).div_(white).clamp_(0, 1)
        model = self._at_full_size
        rows, columns = (_windows(length, self.config.window, self.config.overlap) for length in size)
        strips = []
        for row, kept_rows in rows:
            parts = []
            for column, kept_columns in columns:
                part = self._compact(model, image[..., slice(*row), slice(*column)])
                parts.append(self._cut(self._cut(part, 0, row, kept_rows), 1, column, kept_columns))
            strips.append(_joined(parts, 1))
        return _joined(strips, 0)

    @cached_property
    def _at_full_size(self) -> FrozenBase:
        """The same model, for images that have the size of its input already."""
        config = replace(self.model.config, ratio=1.0, size=None)
        return FrozenBase(self.model.model, self.model.num_classes, config, classes=self.model.classes).to(self._device)

    def _cut(self, part: SoftLabels, axis: int, window: Span, kept: Span) -> SoftLabels:
        """The cells of a window's prediction that lie in ``kept``, which is part of ``window`` [px of the input]."""
        if window == kept:
            return part
        cells, length = part.whole[axis], window[1] - window[0]
        stride = next((s for s in _STRIDES if length // s <= cells <= -(-length // s)), None)
        if stride is None:
            raise ValueError(
                f"teacher {self.model.label}: a window of {length} pixels became {cells} cells, expected one for each "
                f"{', '.join(map(str, _STRIDES))} pixels; it cannot be used with teacher.window"
            )
        first = (kept[0] - window[0]) // stride
        there = slice(first, cells if kept[1] == window[1] else (kept[1] - window[0]) // stride)
        values, classes = (x.narrow(axis + 1, there.start, there.stop - first) for x in (part.values, part.classes))
        whole = (there.stop - first, part.whole[1]) if axis == 0 else (part.whole[0], there.stop - first)
        return replace(part, values=values, classes=classes, whole=whole)


def teacher_labels(soft: SoftLabels, size: tuple[int, int], engine: Engine) -> Tensor:
    """The teacher's most probable class of each pixel of an image, ``[H, W]``.

    Args:
        soft: the prediction for the whole image, on the device of the engine.
        size: H and W of the image [px].
        engine: interpolates a prediction of another size.
    """
    if soft.whole == size:
        return soft.labels()
    return engine.uncertainty(Coarse(soft.logits()[None], size))[0][0]


def _windows(length: int, window: int, overlap: int) -> list[tuple[Span, Span]]:
    """The windows along one side of an input, and the part of each that counts [px].

    All but the last are ``window`` long; it is up to 31 pixels longer, so that it begins at a multiple of 32.
    """
    if length <= window:
        return [((0, length), (0, length))]
    last = (length - window) // ALIGNED * ALIGNED
    starts = [*range(0, last, window - overlap), last]
    spans = [(start, length if start == last else start + window) for start in starts]
    # Where two windows overlap, the middle is the border.
    cuts = [(after[0] + before[1]) // (2 * ALIGNED) * ALIGNED for before, after in pairwise(spans)]
    return list(zip(spans, zip([0, *cuts], [*cuts, length], strict=True), strict=True))


def _joined(parts: list[SoftLabels], axis: int) -> SoftLabels:
    """Neighbouring parts side by side: along columns for ``axis`` 1."""
    values, classes = (torch.cat(list(x), axis + 1) for x in zip(*((p.values, p.classes) for p in parts), strict=True))
    return replace(parts[0], values=values, classes=classes, whole=(values.shape[1], values.shape[2]))
