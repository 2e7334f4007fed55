"""``sparserefine evaluate``: what the coarse, sparse, refined, oracle and dense predictions are worth, and cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import first_largest, label_dtype
from sparserefine.images.upsampling import Upsampling
from sparserefine.machine.memory import PeakMemory
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.boundary import band_overlap, boundary_bands
from sparserefine.scores.confusion import accuracy, confusion, dice, foreground, iou
from sparserefine.sparse import Engine
from sparserefine.stages.refinement import Refinement


@dataclass
class Scores:
    """Confusion and boundary counts of some pixels, accumulated over images."""

    matrix: Tensor
    boundary: Tensor

    @classmethod
    def of(cls, classes: int) -> Scores:
        """Nothing counted yet."""
        return cls(torch.zeros(classes, classes, dtype=torch.int64), torch.zeros(2, classes, dtype=torch.int64))

    def figures(self, classes: Classes) -> dict[str, Any]:
        """The scores by name; dataset-wide."""
        per_class = iou(self.matrix)
        return {
            "dice": foreground(dice(self.matrix)),
            "iou": foreground(per_class),
            "boundary_iou": foreground(self.boundary[0].double() / self.boundary[1].double()),
            "miou": float(per_class.nanmean()),
            "accuracy": accuracy(self.matrix),
            "class_iou": dict(zip(classes.names, per_class.tolist(), strict=True)),
        }


@dataclass
class Row:
    """Scores and costs of one way of predicting, accumulated over images."""

    everywhere: Scores
    at_sites: Scores
    ms: list[float] = field(default_factory=list)
    macs: list[int | None] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def score(
        self, labels: Tensor, truth: Tensor, bands: dict[int, Tensor], sites: Tensor, boundary_px: int | None
    ) -> None:
        """Adds one image: ``labels`` and ``truth`` ``[H, W]``, the truth's ``bands``, ``sites`` ``bool [H, W]``."""
        k = len(self.everywhere.matrix)
        self.everywhere.matrix += confusion(labels, truth, k)
        self.at_sites.matrix += confusion(labels[sites], truth[sites], k)
        predicted = boundary_bands(labels, truth != IGNORE, k, boundary_px)
        self.everywhere.boundary += band_overlap(predicted, bands, k)
        self.at_sites.boundary += band_overlap(predicted, bands, k, where=sites)

    def cost(self, ms: float, macs: int | None, peak_mb: float) -> None:
        """Adds one image's cost."""
        self.ms.append(ms)
        self.macs.append(macs)
        self.peak_mb.append(peak_mb)

    def summary(self, classes: Classes) -> dict[str, Any]:
        """The figures, for tables and JSON; ``ms`` and ``gmacs`` are of one image (median, mean)."""
        figures = {**self.everywhere.figures(classes), "at_sites": self.at_sites.figures(classes)}
        if self.ms:
            counted = [m for m in self.macs if m is not None]
            figures["ms"] = statistics.median(self.ms)
            figures["gmacs"] = sum(counted) / len(counted) / 1e9 if counted else None
            figures["peak_mb"] = max(self.peak_mb)
        return {key: _without_nan(value) for key, value in figures.items()}


def _without_nan(value: Any) -> Any:
    """NaN (a class that never occurs) is ``null`` in JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value


@dataclass(frozen=True)
class Evaluation:
    """The result: ``rows`` by way of predicting, and figures of the selection.

    Attributes:
        rows: ``coarse``, ``sparse`` (alone at the sites), ``refined``, ``oracle`` (truth at the sites), ``dense``.
        images: how many.
        density: mean over images.
        errors_selected: share of all pixels that the coarse labels get wrong that were sites.
        stages_ms: median of each stage of the refined prediction [ms].
        selector: threshold [nats] and budget.
    """

    rows: dict[str, dict[str, Any]]
    images: int
    density: float
    errors_selected: float
    stages_ms: dict[str, float]
    selector: dict[str, Any]

    def table(self) -> str:
        """The rows as text."""
        header = " ".join(f"{title:>6}" for title in ("Dice", "IoU", "B-IoU", "mIoU", "acc"))
        lines = [f"{'':8}  {header} {'ms':>7} {'GMACs':>7} {'peak MB':>8}"]
        for name, row in self.rows.items():
            costs = f"{_cell(row.get('ms'), 7, 0)} {_cell(row.get('gmacs'), 7, 1)} {_cell(row.get('peak_mb'), 8, 0)}"
            lines.append(f"{name:8}  {_scores(row)} {costs}")
        lines.append("at the sites only")
        lines += [f"{name:8}  {_scores(row['at_sites'])}" for name, row in self.rows.items()]
        classes = self.rows["coarse"]["class_iou"]
        if len(classes) > 2:
            lines.append(f"{'IoU by class':16} " + " ".join(f"{name:>8}" for name in self.rows))
            for c in classes:
                lines.append(f"{c:16} " + " ".join(_cell(row["class_iou"][c], 8, 4) for row in self.rows.values()))
        stages = ", ".join(f"{name} {ms:.0f}" for name, ms in self.stages_ms.items())
        lines += [
            f"{self.images} images, density {self.density:.1%}, errors selected {self.errors_selected:.1%}",
            f"refined, ms by stage: {stages}",
        ]
        return "\n".join(lines)


def _scores(figures: dict[str, Any]) -> str:
    return " ".join(_cell(figures[key], 6, 4) for key in ("dice", "iou", "boundary_iou", "miou", "accuracy"))


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


@torch.no_grad()
def evaluate(
    refiner: SparseRefiner,
    images: Iterable[tuple[Tensor, Tensor]],
    *,
    dense: FrozenBase | None = None,
    boundary_px: int | None = None,
    repeats: int = 1,
    seen: Callable[[Refinement, dict[str, Tensor]], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Scores a refiner on labelled images, dataset-wide, and times it end to end.

    The oracle answers the selected sites with the truth: what the selection could give at best. Times are of this
    process on its device: coarse is base + labels, refined all stages + labels, dense the other model + labels.

    Args:
        refiner: with its base, on its device.
        images: image ``uint8 [3, H, W]`` and label ``[H, W]`` (255 ignored).
        dense: another model to compare with, usually the base's architecture at full resolution.
        boundary_px: width of the band of boundary IoU [px]; ``None``: 2 % of the diagonal.
        repeats: runs of each prediction of each image; times are medians.
        seen: called with each refinement and the label maps ``[H, W]`` by row name, for pictures.
        progress: called at the start of each stage of each image with its name.
    """
    tell = progress or (lambda stage: None)
    device = next(refiner.parameters()).device
    k = refiner.base.num_classes
    names = ("coarse", "sparse", "refined", "oracle", *(("dense",) if dense else ()))
    rows = {name: Row(Scores.of(k), Scores.of(k)) for name in names}
    densities: list[float] = []
    stages: dict[str, list[float]] = {}
    wrong = selected = count = 0
    for image, label in images:
        count += 1
        batch, truth = image[None].to(device), label.to(device)
        height, width = truth.shape
        size = (height, width)
        labels: dict[str, Tensor] = {}

        def coarse_labels(x: Tensor = batch, size: tuple[int, int] = size) -> Tensor:
            return refiner.engine.on(x.device).uncertainty(refiner.coarse_of(refiner.base(x), size))[0]

        def refined(x: Tensor = batch) -> tuple[Refinement, Tensor]:
            result = refiner(x)
            return result, result.labels()

        for base in (refiner.base, *([dense] if dense else ())):
            if base.config.runtime is not None:  # compiles for each new size, which is no part of predicting
                base(batch)
        tell("coarse prediction")
        labels["coarse"], ms, peak = _timed(coarse_labels, device, repeats)
        base_macs = refiner.base.macs(*size)
        rows["coarse"].cost(ms, base_macs, peak)
        tell("refined prediction")
        (result, labels["refined"]), ms, peak = _timed(refined, device, repeats)
        macs = list(result.macs.values())
        rows["refined"].cost(ms, None if None in macs else sum(m for m in macs if m is not None), peak)
        if dense is not None:

            def predicted(x: Tensor = batch, size: tuple[int, int] = size, model: FrozenBase = dense) -> Tensor:
                return dense_labels(refiner.engine, model(x), size, model.outputs)

            tell("dense prediction")
            labels["dense"], ms, peak = _timed(predicted, device, repeats)
            rows["dense"].cost(ms, dense.macs(*size), peak)

        tell("scores")
        sites = result.sites.flat
        site_truth = truth.flatten()[sites]
        coarse_at_sites = result.coarse_labels.flatten()[sites]
        labels["sparse"] = result.with_sites(result.sparse_logits.argmax(1))
        answered = torch.where(site_truth == IGNORE, coarse_at_sites.long(), site_truth.long())
        labels["oracle"] = result.with_sites(answered)
        maps = {name: labels[name][0] for name in rows}
        site_mask, truth_cpu = result.sites.mask()[0].cpu(), truth.cpu()
        bands = boundary_bands(truth_cpu, truth_cpu != IGNORE, k, boundary_px)
        for name, row in rows.items():
            row.score(maps[name].cpu(), truth_cpu, bands, site_mask, boundary_px)

        errors = (maps["coarse"] != truth) & (truth != IGNORE)
        wrong += int(errors.sum())
        selected += int(errors.flatten()[sites].sum())
        densities.append(result.density)
        for stage, duration in result.timings_ms.items():
            stages.setdefault(stage, []).append(duration)
        if seen:
            seen(result, maps)
    if not count:
        raise ValueError("no image to evaluate")
    return Evaluation(
        {name: row.summary(refiner.classes) for name, row in rows.items()},
        count,
        statistics.fmean(densities),
        selected / max(1, wrong),
        {stage: statistics.median(times) for stage, times in stages.items()},
        {"threshold": refiner.selector.threshold, "budget": refiner.selector.budget},
    )


def _timed(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float, float]:
    """Result, median milliseconds and peak megabytes of ``run``."""
    times = []
    with PeakMemory(device) as memory:
        for _ in range(repeats):
            result = None  # the last run's result would count as this run's memory
            start = time.perf_counter()
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    return result, statistics.median(times), memory.megabytes


def dense_labels(engine: Engine, logits: Tensor, size: tuple[int, int], outputs: Literal["logits", "scores"]) -> Tensor:
    """Labels ``[B, H, W]`` of a prediction that is not refined, by the quickest code there is.

    That is the CPU engine's single pass, though it gives entropies too; else interpolation and argmax.

    Args:
        engine: of the refiner that it is compared with.
        logits: ``[B, K, h, w]``.
        size: H and W.
        outputs: what ``logits`` are, ``logits`` or ``scores``.
    """
    on_cpu = logits.device.type == "cpu"
    if on_cpu and engine.on(logits.device).name.startswith("cpu"):
        return engine.on(logits.device).uncertainty(Coarse(logits, size, Upsampling("bilinear", outputs)))[0]
    if tuple(logits.shape[2:]) != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    if not on_cpu:
        return logits.argmax(1).to(label_dtype(logits.shape[1]))
    labels = torch.empty(len(logits), *size, dtype=label_dtype(logits.shape[1]))
    for image, image_labels in zip(logits, labels, strict=True):
        first_largest(image, image_labels)
    return labels
