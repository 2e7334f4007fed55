"""Checks of a training run: is there something to learn, and are losses and weights finite?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparserefine.files.tensors import check_finite
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE
from sparserefine.refiner import SparseRefiner
from sparserefine.training.items import WholeImage, WholeImages

_log = logging.getLogger(__name__)
READ_EVERY = 50
"""On a GPU, losses are read after so many optimiser steps: reading one makes the host wait."""


class DivergedError(ValueError):
    """A loss, a gradient or a weight became NaN or infinite."""


@dataclass(frozen=True)
class Seen:
    """A value of a training step that must be finite.

    Attributes:
        what: ``loss`` or ``gradient norm``.
        value: the value, a scalar on any device.
        names: the samples it was computed from.
        step: the optimiser step, counted from 1.
        lr: learning rate of that step.
    """

    what: str
    value: Tensor
    names: Sequence[str]
    step: int
    lr: float


class FiniteWatch:
    """Collects values of training steps and stops the run at the first that is NaN or infinite."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    def add(self, seen: Seen) -> None:
        """Takes a value; checks it at once on the CPU, and every :data:`READ_EVERY` steps elsewhere."""
        self._seen.append(seen)
        if seen.value.device.type == "cpu" or seen.step >= self._seen[0].step + READ_EVERY:
            self.check()

    def check(self) -> None:
        """Raises ``DivergedError`` for the first collected value that is not finite; forgets the others."""
        seen, self._seen = self._seen, []
        values = torch.stack([item.value.float() for item in seen]).tolist() if seen else []
        for item, value in zip(seen, values, strict=True):
            if not math.isfinite(value):
                names = ", ".join(dict.fromkeys(map(printable, item.names)))
                raise DivergedError(
                    f"step {item.step}: the {item.what} of images {names} is {value} at learning rate {item.lr:.3g}; "
                    "checkpoints and best/ have weights from before. Check labels and coarse logits of these images, "
                    "or start a new run in another --out with a smaller training.lr or training.clip, or with "
                    "training.precision 32-true"
                )


def check_finite_weights(refiner: SparseRefiner, step: int) -> None:
    """Raises ``DivergedError`` if a weight or a statistic of extractor or ensembler is NaN or infinite."""
    try:
        check_finite(refiner.trained_state(), f"step {step}")
    except ValueError as error:
        raise DivergedError(
            f"{error}; weights and statistics of this step are not stored. Start a new run in another --out with a "
            "smaller training.lr or training.clip, or with training.precision 32-true"
        ) from error


def warn_if_vain(refiner: SparseRefiner, train: WholeImages, val: WholeImages, device: torch.device) -> None:
    """Warns if the training split has nothing to learn from, or the validation split nothing to score.

    Reads images until one has it, so usually one of each split.
    """
    taught = train.teacher is not None
    if not any(_sites_with_target(refiner, train[index], device) for index in range(len(train))):
        _log.warning(
            "training split: no pixel is %s, so nothing can be learnt; lower selector.threshold = %g (entropy in "
            "nats), or check data.train%s",
            "selected" if taught else "both selected and labelled",
            refiner.selector.threshold,
            "" if taught else " and its labels",
        )
    if not val.data.labelled:
        return
    two = refiner.base.num_classes == 2
    labels = (val.data.read(index)[1] for index in range(len(val)))
    if not any(bool((label == 1 if two else label != IGNORE).any()) for label in labels):
        _log.warning(
            "validation split: no pixel is labelled%s, so no refiner can be chosen as the best; check data.val and its "
            "labels",
            f" as class 1, {printable(refiner.classes.names[1])}" if two else "",
        )


def _sites_with_target(refiner: SparseRefiner, item: WholeImage, device: torch.device) -> bool:
    """Whether a pixel of the image is selected and has a label, or is taught by a teacher."""
    engine = refiner.engine.on(device)
    coarse = refiner.coarse_of(item.logits[None].to(device), (item.label.shape[0], item.label.shape[1]))
    _, entropies = engine.uncertainty(coarse)
    valid = None if item.valid_batch is None else item.valid_batch.to(device)
    mask = refiner.selector.mask(entropies, valid, engine)[0].cpu()
    return bool((mask if item.teacher is not None else mask & (item.label != IGNORE)).any())
