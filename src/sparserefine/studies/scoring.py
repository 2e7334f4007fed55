"""What studies share: scores and costs of the predictions that are compared, times, and the recovered share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.files.results import finite
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import first_largest, label_dtype
from sparserefine.images.upsampling import Upsampling
from sparserefine.machine.memory import PeakMemory
from sparserefine.machine.timing import now_ms
from sparserefine.scores.bootstrap import interval, resampled
from sparserefine.scores.boundary import boundary_bands
from sparserefine.scores.confusion import class_counts, dice_of, iou_of
from sparserefine.scores.counts import Counts
from sparserefine.sparse import Engine
from sparserefine.training.teacher import Teacher, teacher_labels

SMALLEST_GAIN = 0.0005
"""A share of a smaller gain is no figure: the score of a single image changes more from one seed to the next."""

Bands = dict[int, Tensor]
"""Boundary bands by class, see :func:`sparserefine.scores.boundary.boundary_bands`."""


@dataclass
class Costs:
    """Costs of one kind of prediction, accumulated over images."""

    ms: list[float] = field(default_factory=list)
    macs: list[int | None] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def add(self, ms: float, macs: int | None, peak_mb: float) -> None:
        """Adds the cost of one image; ``macs`` is ``None`` if they cannot be counted."""
        self.ms.append(ms)
        self.macs.append(macs)
        self.peak_mb.append(peak_mb)

    @property
    def median_ms(self) -> float:
        """Median time [ms]."""
        return statistics.median(self.ms)

    @property
    def mean_gmacs(self) -> float | None:
        """Mean multiply-accumulates [1e9]; ``None`` if they cannot be counted."""
        counted = [m for m in self.macs if m is not None]
        return sum(counted) / len(counted) / 1e9 if counted else None

    @property
    def largest_mb(self) -> float:
        """Largest peak memory [1e6 bytes]."""
        return max(self.peak_mb)


@dataclass
class Row:
    """Scores and costs of one kind of prediction, accumulated over images.

    Attributes:
        everywhere: counts of all pixels.
        at_sites: counts of the sites.
        costs: time, operations and memory.
        images: for each image :func:`sparserefine.scores.confusion.class_counts`.
    """

    everywhere: Counts
    at_sites: Counts
    costs: Costs = field(default_factory=Costs)
    images: list[Tensor] = field(default_factory=list)

    @classmethod
    def zero(cls, num_classes: int) -> Row:
        """A row of no image, for K = ``num_classes``."""
        return cls(Counts.zero(num_classes), Counts.zero(num_classes))

    def score(self, labels: Tensor, truth: Tensor, bands: tuple[Bands, Bands], sites: Tensor) -> None:
        """Adds one image, all tensors on the CPU.

        Args:
            labels: the prediction, ``[H, W]``.
            truth: ``[H, W]``.
            bands: boundary bands of both.
            sites: ``bool [H, W]``.
        """
        k = len(self.everywhere.matrix)
        image = Counts.of(labels, truth, k, bands=bands)
        self.images.append(class_counts(image.matrix))
        self.everywhere += image
        self.at_sites += Counts.of(labels, truth, k, bands=bands, where=sites)

    def summary(self, classes: Classes) -> dict[str, Any]:
        """Figures for tables and JSON, ``None`` for a class that never occurs.

        ``dice``, ``iou`` and ``boundary_iou`` are of class 1 of two classes, else means over the classes that occur;
        ``miou`` is the mean IoU over all classes that occur, ``accuracy`` the share of pixels that are right,
        ``class_iou`` IoU by class name, ``at_sites`` the same of the sites alone. Over images: the median ``ms`` [ms],
        mean ``gmacs`` [1e9] and largest ``peak_mb`` [1e6 bytes], for predictions that are run by themselves.
        """
        figures = {**_figures(self.everywhere, classes), "at_sites": _figures(self.at_sites, classes)}
        if self.costs.ms:
            c = self.costs
            figures |= {"ms": c.median_ms, "gmacs": c.mean_gmacs, "peak_mb": c.largest_mb}
        result: dict[str, Any] = finite(figures)
        return result


def _figures(counts: Counts, classes: Classes) -> dict[str, Any]:
    """The scores by name."""
    return {
        "dice": counts.dice(),
        "iou": counts.iou(),
        "boundary_iou": counts.boundary_iou(),
        "miou": counts.mean_iou(),
        "accuracy": counts.accuracy(),
        "class_iou": dict(zip(classes.names, counts.class_iou(), strict=True)),
    }


@dataclass
class Selected:
    """How many of some pixels were selected as sites, over images."""

    pixels: int = 0
    selected: int = 0

    def add(self, pixels: Tensor, sites: Tensor) -> None:
        """Adds one image: the pixels and the sites, ``bool [H, W]`` both."""
        self.pixels += int(pixels.sum())
        self.selected += int((pixels & sites).sum())

    def share(self) -> float:
        """Share of the pixels that were selected; 0 if there are none."""
        return self.selected / max(1, self.pixels)


class Scoreboard:
    """Scores of predictions on the labels and, if ``dense`` is among them, on the dense model's labels.

    Args:
        names: the predictions; ``coarse`` is one of them.
        num_classes: K.
        boundary_px: width of the band of boundary IoU [px]; ``None``: 2 % of the diagonal.

    Attributes:
        rows: scored on the labels.
        agreement: scored on the labels of ``dense``. The oracle has none: it knows the labels.
        wrong: where coarse differs from the labels.
        different: where coarse differs from dense.
    """

    def __init__(self, names: Sequence[str], num_classes: int, boundary_px: int | None) -> None:
        self._k, self._px = num_classes, boundary_px
        self.rows = {name: Row.zero(num_classes) for name in names}
        agreeing = [name for name in names if name != "oracle"] if "dense" in names else []
        self.agreement = {name: Row.zero(num_classes) for name in agreeing}
        self.wrong, self.different = Selected(), Selected()

    def add(self, maps: Mapping[str, Tensor], truth: Tensor, sites: Tensor, valid: Tensor | None = None) -> None:
        """Adds one image, all tensors on the CPU.

        Args:
            maps: label maps ``[H, W]`` by name.
            truth: ``[H, W]``, ignored where there is no data. If all of it is, the image has no labels, and all pixels
                with data count in the agreement.
            sites: ``bool [H, W]``.
            valid: ``bool [H, W]``, false where there is no data; ``None``: there is data everywhere.
        """
        counted = truth != IGNORE
        labelled = bool(counted.any())
        if not labelled:
            counted = torch.ones_like(counted) if valid is None else valid
        bands = {name: boundary_bands(labels, counted, self._k, self._px) for name, labels in maps.items()}
        if labelled:
            self.wrong.add((maps["coarse"] != truth) & counted, sites)
            true_bands = boundary_bands(truth, counted, self._k, self._px)
            for name, row in self.rows.items():
                row.score(maps[name], truth, (bands[name], true_bands), sites)
        if self.agreement and bool(counted.any()):
            dense = torch.where(counted, maps["dense"].to(truth.dtype), IGNORE)
            self.different.add((maps["coarse"] != dense) & counted, sites)
            for name, row in self.agreement.items():
                row.score(maps[name], dense, (bands[name], bands["dense"]), sites)

    @property
    def labelled(self) -> bool:
        """Whether any pixel has a label."""
        return bool(self.rows["coarse"].everywhere.matrix.any())

    def summaries(self, classes: Classes) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Figures of all rows, see :meth:`Row.summary`, with recovered shares if there is a dense model.

        ``interval`` is the 95 % bootstrap interval of the main score over images, ``above_coarse`` and ``above_dense``
        those of the difference to these rows (:mod:`sparserefine.scores.bootstrap`).
        """
        rows = {name: row for name, row in self.rows.items() if name != "oracle" or self.labelled}
        found = [{name: row.summary(classes) for name, row in part.items()} for part in (rows, self.agreement)]
        for part in found if self.agreement else ():
            add_recovered(part, self._k)
        for summaries, scored in zip(found, (rows, self.agreement), strict=True):
            self._add_intervals(summaries, scored)
        return found[0], found[1]

    def _add_intervals(self, summaries: dict[str, dict[str, Any]], rows: Mapping[str, Row]) -> None:
        """Adds to each row how far its main score would move with other images, by itself and against other rows."""
        draws = {name: resampled(_main_score_of_counts, row.images) for name, row in rows.items()}
        for name, values in draws.items():
            summaries[name]["interval"] = interval(values)
            for other in ("coarse", "dense"):
                if other in draws and name not in (other, "oracle"):
                    summaries[name][f"above_{other}"] = interval(values - draws[other])


def main_score(num_classes: int) -> Literal["dice", "miou"]:
    """The score that recovered shares are of: Dice of class 1 for two classes, mIoU for more."""
    return "dice" if num_classes == 2 else "miou"


def main_score_of(matrix: Tensor) -> float:
    """The main score of a confusion matrix ``[K, K]``; NaN if no class occurs."""
    return float(_main_score_of_counts(class_counts(matrix)))


def _main_score_of_counts(counts: Tensor) -> Tensor:
    """The same of :func:`sparserefine.scores.confusion.class_counts`, ``[..., 3, K] -> [...]``."""
    return dice_of(counts)[..., 1] if counts.shape[-1] == 2 else iou_of(counts).nanmean(-1)


def recovered(score: float | None, coarse: float | None, bound: float | None) -> float | None:
    """The recovered share, (score - coarse) / (bound - coarse).

    ``None`` if there is nothing to recover: a score is missing, or ``bound`` is not better than coarse by
    :data:`SMALLEST_GAIN` at least.

    >>> recovered(0.75, 0.5, 1.0)
    0.5
    >>> recovered(0.75, 0.5, 0.5001) is None
    True
    """
    if score is None or coarse is None or bound is None or bound - coarse < SMALLEST_GAIN:
        return None
    return (score - coarse) / (bound - coarse)


BOUNDS = {"recovered": "dense", "recovered_at_sites": "dense_at_sites"}
"""The recovered shares of a row, and the row that bounds each."""


def add_recovered(rows: Mapping[str, dict[str, Any]], num_classes: int) -> None:
    """Adds to each row its shares of :data:`BOUNDS`, but not to the oracle, which no model bounds."""
    main = main_score(num_classes)
    for row in (row for name, row in rows.items() if name != "oracle"):
        row |= {key: recovered(row[main], rows["coarse"][main], rows[bound][main]) for key, bound in BOUNDS.items()}


def why_undefined(coarse: float | None, bound: float | None, bound_name: str) -> str:
    """Why there is no share of coarse -> bound."""
    if coarse is None or bound is None:
        return f"coarse or {bound_name} has no score"
    return f"{bound_name} scores {bound:.4f}, coarse {coarse:.4f}, and a share needs a gain of {SMALLEST_GAIN} at least"


class Stopwatch:
    """Times the kinds of prediction that are compared.

    On a GPU each kind runs once, untimed, before its first image. That run compiles kernels and loads libraries, which
    takes half a second or more and is not part of a prediction.

    Args:
        device: where predictions run.
        repeats: runs on each image; the time is their median.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats
        self._cold = device.type == "cuda"
        self._warm: set[str] = set()

    def time(self, kind: str, run: Callable[[], Any]) -> tuple[Any, float, float]:
        """Result, median time [ms] and peak memory [1e6 bytes] of ``run``, a prediction of one image.

        Args:
            kind: which of the compared predictions this is.
            run: predicts the image.
        """
        if self._cold and kind not in self._warm:
            run()
            self._warm.add(kind)
        times = []
        with PeakMemory(self._device) as memory:
            for _ in range(self._repeats):
                result = None  # else the last run's result would count towards this run's memory
                start = now_ms(self._device)
                result = run()
                times.append(now_ms(self._device) - start)
        return result, statistics.median(times), memory.megabytes


def dense_labels(engine: Engine, logits: Tensor, size: tuple[int, int], outputs: Literal["logits", "scores"]) -> Tensor:
    """Labels ``[B, H, W]`` of an unrefined prediction, by the fastest code available, so that comparisons are fair.

    On engine ``cpu`` that is its fused pass, although it computes entropies too; otherwise interpolation and argmax.

    Args:
        engine: the engine of the refiner it is compared with, on the device of ``logits``.
        logits: ``[B, K, h, w]``.
        size: H and W [px].
        outputs: ``logits`` or ``scores``, see :class:`sparserefine.BaseConfig`.
    """
    on_cpu = logits.device.type == "cpu"
    if on_cpu and engine.name.startswith("cpu"):
        return engine.uncertainty(Coarse(logits, size, Upsampling("bilinear", outputs)))[0]
    if tuple(logits.shape[2:]) != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    if not on_cpu:
        return logits.argmax(1).to(label_dtype(logits.shape[1]))
    labels = torch.empty(len(logits), *size, dtype=label_dtype(logits.shape[1]))
    for image, image_labels in zip(logits, labels, strict=True):
        first_largest(image, image_labels)
    return labels


Dense = FrozenBase | Teacher
"""A dense model to compare with: a base, or a teacher that sees windows where the whole image needs too much memory."""


def model_of(dense: Dense) -> FrozenBase:
    """The model itself."""
    return dense.model if isinstance(dense, Teacher) else dense


def dense_prediction(dense: Dense, image: Tensor, engine: Engine) -> Tensor:
    """Labels ``[1, H, W]`` of one image ``[1, C, H, W]``, uint8, or floating point in 0..1.

    Args:
        dense: the model.
        image: on the device of the model.
        engine: the engine of the refiner it is compared with.
    """
    size = (image.shape[2], image.shape[3])
    if isinstance(dense, Teacher):
        return teacher_labels(dense.predict(image[0]).to(image.device), size, engine)[None]
    return dense_labels(engine, dense(image), size, dense.outputs)


def cell(value: float | None, width: int, digits: int) -> str:
    """A number of a table, right-aligned; ``-`` for ``None``."""
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
