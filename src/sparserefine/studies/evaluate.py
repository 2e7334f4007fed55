"""``sparserefine evaluate``: scores and costs of the coarse, sparse, refined, oracle and dense predictions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.files.results import finite
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import first_largest, label_dtype
from sparserefine.images.upsampling import Upsampling
from sparserefine.machine.memory import PeakMemory
from sparserefine.machine.timing import now_ms
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.boundary import boundary_bands
from sparserefine.scores.counts import Counts
from sparserefine.sparse import Engine
from sparserefine.stages.refinement import Refinement


@dataclass
class Row:
    """Scores and costs of one kind of prediction, accumulated over images."""

    everywhere: Counts
    at_sites: Counts
    ms: list[float] = field(default_factory=list)
    macs: list[int | None] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def score(
        self, labels: Tensor, truth: Tensor, bands: dict[int, Tensor], sites: Tensor, boundary_px: int | None
    ) -> None:
        """Adds one image.

        Args:
            labels: the prediction, ``[H, W]``.
            truth: ``[H, W]``.
            bands: the truth's boundary bands, see :func:`sparserefine.scores.boundary.boundary_bands`.
            sites: ``bool [H, W]``.
            boundary_px: width of the bands [px].
        """
        k = len(self.everywhere.matrix)
        both = boundary_bands(labels, truth != IGNORE, k, boundary_px), bands
        self.everywhere += Counts.of(labels, truth, k, bands=both)
        self.at_sites += Counts.of(labels, truth, k, bands=both, where=sites)

    def cost(self, ms: float, macs: int | None, peak_mb: float) -> None:
        """Adds the cost of one image; ``macs`` is ``None`` if they cannot be counted."""
        self.ms.append(ms)
        self.macs.append(macs)
        self.peak_mb.append(peak_mb)

    def summary(self, classes: Classes) -> dict[str, Any]:
        """Figures for tables and JSON, ``None`` for a class that never occurs.

        Over images: the median ``ms``, mean ``gmacs`` and largest ``peak_mb``.
        """
        figures = {**_figures(self.everywhere, classes), "at_sites": _figures(self.at_sites, classes)}
        if self.ms:
            counted = [m for m in self.macs if m is not None]
            figures["ms"] = statistics.median(self.ms)
            figures["gmacs"] = sum(counted) / len(counted) / 1e9 if counted else None
            figures["peak_mb"] = max(self.peak_mb)
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


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        rows: for each prediction its scores and costs, see :meth:`Row.summary`. ``coarse``: the base alone; ``sparse``:
            the sparse network alone at the sites; ``refined``; ``oracle``: the truth at the sites; ``dense``.
        images: number of images.
        density: share of the pixels that are sites, mean over images.
        errors_selected: share of the coarse labels' wrong pixels that were selected as sites.
        stages_ms: median time of each stage of the refined prediction [ms].
        selector: threshold [nats] and budget.
    """

    rows: dict[str, dict[str, Any]]
    images: int
    density: float
    errors_selected: float
    stages_ms: dict[str, float]
    selector: dict[str, Any]

    def table(self) -> str:
        """The rows as an aligned text table."""
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
                lines.append(
                    f"{printable(c):16} " + " ".join(_cell(row["class_iou"][c], 8, 4) for row in self.rows.values())
                )
        stages = ", ".join(f"{name} {ms:.0f}" for name, ms in self.stages_ms.items())
        lines += [
            f"{self.images} images, density {self.density:.1%}, coarse errors selected {self.errors_selected:.1%}",
            f"refined prediction, ms by stage: {stages}",
        ]
        return "\n".join(lines)


def _scores(figures: dict[str, Any]) -> str:
    return " ".join(_cell(figures[key], 6, 4) for key in ("dice", "iou", "boundary_iou", "miou", "accuracy"))


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


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
    """Scores a refiner on labelled images and times it end to end. Scores are over all images together.

    The oracle has the truth at the selected sites: the best score that this selection allows. Times include making the
    labels: coarse is base and labels, refined is all stages and labels, dense is the dense model and labels.

    Args:
        refiner: with its base, on the device to run on.
        images: image ``uint8 [3, H, W]`` and label ``[H, W]`` (255 ignored).
        dense: dense model to compare with, usually the base's architecture at full resolution.
        boundary_px: width of the band of boundary IoU [px]; ``None``: 2 % of the diagonal.
        repeats: timed runs of each prediction of each image; their median is reported. On a GPU each prediction also
            runs once, untimed, before the first image.
        seen: called after each image with the refinement and the label maps ``[H, W]`` by row name; for pictures.
        progress: called with the name of each step when it begins.

    Raises:
        ValueError: there are no images, or no pixel of them has a label to score by.
    """
    report_step = progress or (lambda stage: None)
    device = next(refiner.parameters()).device
    watch = Stopwatch(device, repeats)
    engine, k = refiner.engine.on(device), refiner.base.num_classes
    names = ("coarse", "sparse", "refined", "oracle", *(("dense",) if dense else ()))
    rows = {name: Row(Counts.zero(k), Counts.zero(k)) for name in names}
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
            return engine.uncertainty(refiner.coarse_of(refiner.base(x), size))[0]

        def refined(x: Tensor = batch) -> tuple[Refinement, Tensor]:
            result = refiner(x)
            return result, result.labels()

        for base in (refiner.base, *([dense] if dense else ())):
            if base.config.runtime is not None:  # it compiles for each new size, which is not to be timed
                base(batch)
        report_step("coarse prediction")
        labels["coarse"], ms, peak = watch.time("coarse", coarse_labels)
        base_macs = refiner.base.macs(*size)
        rows["coarse"].cost(ms, base_macs, peak)
        report_step("refined prediction")
        (result, labels["refined"]), ms, peak = watch.time("refined", refined)
        macs = list(result.macs.values())
        rows["refined"].cost(ms, None if None in macs else sum(m for m in macs if m is not None), peak)
        if dense is not None:

            def predicted(x: Tensor = batch, size: tuple[int, int] = size, model: FrozenBase = dense) -> Tensor:
                return dense_labels(engine, model(x), size, model.outputs)

            report_step("dense prediction")
            labels["dense"], ms, peak = watch.time("dense", predicted)
            rows["dense"].cost(ms, dense.macs(*size), peak)

        report_step("scores")
        sites = result.sites.flat
        site_truth = truth.flatten()[sites]
        coarse_at_sites = result.coarse_labels.flatten()[sites]
        labels["sparse"] = result.with_sites(result.sparse_logits.argmax(1))
        true_at_sites = torch.where(site_truth == IGNORE, coarse_at_sites.long(), site_truth.long())
        labels["oracle"] = result.with_sites(true_at_sites)
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
        raise ValueError("no image to evaluate; check the split and the data folder")
    if not rows["coarse"].everywhere.matrix.any():
        raise ValueError(
            f"nothing to score: every pixel of the {count} label images is ignored ({IGNORE}); check the labels and "
            "the configuration's ignored values"
        )
    return Evaluation(
        {name: row.summary(refiner.classes) for name, row in rows.items()},
        count,
        statistics.fmean(densities),
        selected / max(1, wrong),
        {stage: statistics.median(times) for stage, times in stages.items()},
        {"threshold": refiner.selector.threshold, "budget": refiner.selector.budget},
    )


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
