"""``sparserefine assess``: whether refinement is worth it for a base, before any training.

The dense model stands for what a refiner can learn. Its labels, put at the pixels that a threshold selects, give the
score that a refiner would have if it knew there all that the dense model knows: what can be won. An untrained refiner
takes as long as a trained one: the price.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparserefine.data.readers.dataset import Example
from sparserefine.files.text import first_line, printable
from sparserefine.images.classes import IGNORE
from sparserefine.images.upsampling import entropy_limit
from sparserefine.machine.exhausted import out_of_memory
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.confusion import binned_confusion
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector
from sparserefine.studies.assessment import Assessment, Cost, Rung, Truth, judge
from sparserefine.studies.scoring import (
    Costs,
    Dense,
    Stopwatch,
    dense_prediction,
    main_score,
    main_score_of,
    model_of,
    recovered,
)

MOST_IMAGES = 10
MINUTES = 2.0
_RUNGS, _LOWEST, _HIGHEST = 8, 0.005, 0.9
"""The ladder of thresholds: how many, the lowest [nats], and the highest as a share of ln K."""
_DENSEST = 0.35
"""Refinement is not run at higher densities: there it takes about as long as a dense model."""


def ladder(num_classes: int, own: float | None = None) -> tuple[float, ...]:
    """Thresholds to look at [nats], from almost 0 to almost ln K, and the configuration's own.

    >>> ladder(2)
    (0.005, 0.01, 0.02, 0.04, 0.079, 0.16, 0.31, 0.62)
    """
    steps = np.geomspace(_LOWEST, _HIGHEST * entropy_limit(num_classes), _RUNGS)
    return tuple(sorted({*(float(f"{step:.2g}") for step in steps), *(() if own is None else (own,))}))


@torch.no_grad()
def assess(
    refiner: SparseRefiner,
    images: Iterable[tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, Tensor | None]],
    dense: Dense,
    *,
    minutes: float = MINUTES,
    progress: Callable[[str], None] | None = None,
) -> Assessment:
    """Predicts what refinement of a base can win, and at which price, before any training.

    Looks at one image at least, and at no further one that would probably end after ``minutes``.

    Args:
        refiner: an untrained one, of the shape to be trained, on the device to run on. Its budget is not applied.
        images: name, image ``[C, H, W]`` and label ``[H, W]`` (255 ignored; everywhere, if there are no labels); a
            fourth item, ``bool [H, W]``, is false where the image has no data: nothing is refined or scored there.
        dense: the model to learn from, usually the base at full resolution.
        minutes: time for all of it.
        progress: called with a line of text when a step begins that may take long.

    Raises:
        ValueError: there is no image; the dense model does not fit into memory; or neither prediction nor truth have a
            class to score.
    """
    tell = progress or (lambda line: None)
    refiner.eval()
    selector = refiner.selector
    look = _Look(refiner, dense, ladder(refiner.base.num_classes, selector.threshold), tell)
    names: list[str] = []
    start, last = time.monotonic(), 0.0
    try:
        for name, *item in images:
            example = Example(*item)
            image = example.image
            began = time.monotonic()
            if names and began - start + last > 60 * minutes:
                break
            tell(f"{printable(name)}, {image.shape[1]} x {image.shape[2]} pixels")
            look.at(example, deadline=start + 60 * minutes)
            names.append(name)
            last = time.monotonic() - began
    finally:
        refiner.selector = selector
    if not names:
        raise ValueError("no image to assess; check the split and the data folder")
    return look.result(tuple(names), time.monotonic() - start)


@dataclass
class _Look:
    """Accumulates over images what :func:`assess` sees.

    Matrices are by bin of entropy: bin i holds the pixels above i of the thresholds. So one pass serves all of them.
    """

    refiner: SparseRefiner
    dense: Dense
    thresholds: tuple[float, ...]
    tell: Callable[[str], None]
    scored_on: Truth | None = None
    costs: dict[str, Costs] = field(default_factory=lambda: {"coarse": Costs(), "dense": Costs()})
    better: int = 0
    matrices: dict[str, Tensor] = field(default_factory=dict)
    densities: list[list[float]] = field(default_factory=list)
    ms: list[list[float]] = field(default_factory=list)
    macs: list[list[float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = next(self.refiner.parameters()).device
        self.engine = self.refiner.engine.on(self.device)
        self.watch = Stopwatch(self.device, 1)

    def at(self, example: Example, *, deadline: float) -> None:
        """Adds an image."""
        image, truth = example.image.to(self.device), example.label.to(self.device)
        valid = None if example.valid is None else example.valid.to(self.device)
        batch, size = image[None], (image.shape[1], image.shape[2])
        logits, base_ms, labels, entropies = self._coarse(batch, size)
        dense = self._dense(batch, size)
        bins = torch.bucketize(entropies, torch.tensor(self.thresholds, device=self.device))
        known = bins.flatten() if valid is None else bins[valid]
        counts = torch.bincount(known, minlength=len(self.thresholds) + 1).cpu()
        above = counts.flip(0).cumsum(0).flip(0)[1:]
        self.densities.append((above / bins.numel()).tolist())
        self._score(labels, dense, truth, valid, bins)
        self._price(batch, logits, valid, base_ms, deadline)

    def _coarse(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, float, Tensor, Tensor]:
        """The base's logits and their time [ms], coarse labels and entropies ``[H, W]``."""
        base, first = self.refiner.base, not self.costs["coarse"].ms
        if first or base.config.runtime is not None:  # what only the first run (of a size) does is no part of its time
            base(x)
        logits, base_ms, peak = self.watch.time("base", lambda: base(x))
        (labels, entropies), ms, more = self.watch.time(
            "labels", lambda: self.engine.uncertainty(self.refiner.coarse_of(logits, size))
        )
        self.costs["coarse"].add(base_ms + ms, base.macs(*size), max(peak, more))
        return logits, base_ms, labels[0], entropies[0]

    def _dense(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The dense model's labels ``[H, W]``."""
        model = model_of(self.dense)
        height, width = model.input_size(*size)
        self.tell(f"  dense model, input of {height} x {width} pixels")
        with _fitting(
            f"the dense model {model.label} with an input of {height} x {width} pixels",
            "let it see windows (--teacher.window 1024) or a smaller input (--dense_ratio 0.5), or name another one "
            "(--dense NAME)",
            self.device,
        ):
            if model.config.runtime is not None:  # it compiles for each new size
                dense_prediction(self.dense, x, self.engine)
            labels, ms, peak = self.watch.time("dense", lambda: dense_prediction(self.dense, x, self.engine))
        self.costs["dense"].add(ms, model.macs(*size), peak)
        found: Tensor = labels[0]
        return found

    def _score(self, coarse: Tensor, dense: Tensor, truth: Tensor, valid: Tensor | None, bins: Tensor) -> None:
        """Adds the confusion matrices of label maps ``[H, W]``."""
        if self.scored_on is None:
            self.scored_on = "labels" if bool((truth != IGNORE).any()) else "dense"
        truth = truth if self.scored_on == "labels" else dense
        if valid is not None:
            truth = torch.where(valid, truth, IGNORE)
        k, count = self.refiner.base.num_classes, len(self.thresholds) + 1
        maps = {"coarse": coarse, "dense": dense, "truth": truth}
        new = {name: binned_confusion(x, truth, bins, k, count).cpu() for name, x in maps.items()}
        self.better += main_score_of(new["dense"].sum(0)) > main_score_of(new["coarse"].sum(0))
        self.matrices = {name: x + self.matrices.get(name, 0) for name, x in new.items()}

    def _price(self, x: Tensor, logits: Tensor, valid: Tensor | None, base_ms: float, deadline: float) -> None:
        """Runs the refiner at two or three thresholds; adds time and operations at all of them."""
        points: list[tuple[float, float, float]] = []
        densities, there = self.densities[-1], None if valid is None else valid[None]

        def refined() -> tuple[Refinement, Tensor]:
            result = self.refiner.refine(x, logits, valid=there)
            return result, result.labels()

        for index in _to_run(densities):
            if len(points) >= 2 and time.monotonic() > deadline:
                break
            what = f"refinement of {densities[index]:.1%} of the pixels"
            self.tell(f"  {what}")
            self.refiner.selector = Selector(self.thresholds[index])
            try:
                with _fitting(what, "take a smaller extractor", self.device):
                    if not self.ms and not points:  # packs weights, loads kernels
                        refined()
                    (result, _), ms, _ = self.watch.time("refined", refined)
            except DoesNotFitError:
                if not points:
                    raise
                break  # what is known of lower densities is enough
            macs = sum(m for stage, m in result.macs.items() if stage != "base" and m is not None)
            points.append((densities[index], ms, macs))
        base_macs = self.refiner.base.macs(x.shape[2], x.shape[3])
        at, ms_at, macs_at = (np.array(values) for values in zip(*sorted(points), strict=True))
        self.ms.append([base_ms + _between(at, ms_at, d) for d in densities])
        self.macs.append([None if base_macs is None else base_macs + _between(at, macs_at, d) for d in densities])

    def result(self, names: tuple[str, ...], seconds: float) -> Assessment:
        """What was seen, and the verdict."""
        assert self.scored_on is not None  # there was an image
        scores = {name: main_score_of(x.sum(0)) for name, x in self.matrices.items()}
        if any(map(math.isnan, scores.values())):
            raise ValueError(
                f"nothing to score in {', '.join(map(printable, names))}: class 1, {self.refiner.classes.names[1]!r}, "
                "occurs in no label and in no prediction; take other images (--split, --most_images)"
            )
        coarse, dense = (
            Cost(scores[name], costs.median_ms, costs.mean_gmacs, costs.largest_mb)
            for name, costs in self.costs.items()
        )
        rungs = []
        for i, threshold in enumerate(self.thresholds):
            score, oracle = (
                main_score_of(self.matrices["coarse"][: i + 1].sum(0) + self.matrices[name][i + 1 :].sum(0))
                for name in ("dense", "truth")
            )
            macs = [image[i] for image in self.macs]
            counted = [m for m in macs if m is not None]
            rungs.append(
                Rung(
                    threshold,
                    statistics.fmean(image[i] for image in self.densities),
                    score,
                    recovered(score, coarse.score, dense.score),
                    oracle if self.scored_on == "labels" else None,
                    statistics.median(image[i] for image in self.ms),
                    statistics.fmean(counted) / 1e9 if counted else None,
                )
            )
        score_name = main_score(self.refiner.base.num_classes)
        judged = judge(tuple(rungs), coarse, dense, self.scored_on, score_name)
        better = self.better if self.scored_on == "labels" else None
        return Assessment(names, seconds, self.scored_on, score_name, coarse, dense, better, tuple(rungs), *judged)


class DoesNotFitError(ValueError):
    """A prediction needs more memory than there is."""


@contextmanager
def _fitting(what: str, cure: str, device: torch.device) -> Iterator[None]:
    """Turns the error of a block that does not fit into memory into a :class:`DoesNotFitError` with the cure."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise DoesNotFitError(
            f"{what} does not fit into the memory of {device} ({first_line(error)}); {cure}"
        ) from error


def _to_run(densities: Sequence[float]) -> list[int]:
    """The thresholds at which refinement is run, cheap ones first.

    These are the highest, the lowest that is not too dense, and one between them.
    """
    last = len(densities) - 1
    first = next((i for i, density in enumerate(densities) if density <= _DENSEST), last)
    middle = min(range(first, last + 1), key=lambda i: abs(densities[i] - densities[first] / 2))
    return sorted({first, middle, last}, reverse=True)


def _between(at: NDArray[np.float64], values: NDArray[np.float64], density: float) -> float:
    """Value at a density, from values measured at others, in order: linear between them, and proportional above."""
    if density > at[-1] > 0:
        return float(values[-1] * density / at[-1])
    return float(np.interp(density, at, np.maximum.accumulate(values)))
