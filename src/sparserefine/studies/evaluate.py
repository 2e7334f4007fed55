"""``sparserefine evaluate``: scores and costs of the coarse, sparse, refined, oracle and dense predictions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Example
from sparserefine.files.text import printable
from sparserefine.images.classes import IGNORE
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.refinement import Refinement
from sparserefine.studies.scoring import (
    BOUNDS,
    Dense,
    Scoreboard,
    Stopwatch,
    cell,
    dense_prediction,
    main_score,
    model_of,
    why_undefined,
)

_WIDE = 14
"""Of a row's name in a table."""


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    The main score is Dice of class 1 for two classes, mIoU for more. With a dense model each row has two shares of it,
    ``None`` where there is nothing to recover: ``recovered``, (row - coarse) / (dense - coarse), and
    ``recovered_at_sites``, (row - coarse) / (dense_at_sites - coarse). ``interval`` says how far the main score would
    move with other images, ``above_coarse`` and ``above_dense`` the same of the difference to these rows: the ends of
    95 % bootstrap intervals, ``None`` for fewer than three images.

    Attributes:
        rows: for each prediction its scores on the labels and its costs, see :meth:`Row.summary`. ``coarse``: the base
            alone; ``sparse``: the sparse network alone at the sites; ``refined``; ``oracle``: the truth at the sites;
            ``dense_at_sites``: the dense model's labels at the sites; ``dense``. Without labels there is no oracle and
            all scores are ``None``.
        agreement: the same predictions, scored with the dense model's labels as the truth; ``None`` without a dense
            model. Pixels that the labels ignore do not count.
        images: number of images.
        density: share of the pixels that are sites, mean over images.
        errors_selected: share of the coarse labels' wrong pixels that were selected as sites; ``None`` without labels.
        differences_selected: the same of the pixels where coarse and dense labels differ; ``None`` without dense.
        stages_ms: median time of each stage of the refined prediction [ms].
        selector: threshold [nats] and budget.
    """

    rows: dict[str, dict[str, Any]]
    agreement: dict[str, dict[str, Any]] | None
    images: int
    density: float
    errors_selected: float | None
    differences_selected: float | None
    stages_ms: dict[str, float]
    selector: dict[str, Any]

    def table(self) -> str:
        """The rows as an aligned text table."""
        labelled = self.errors_selected is not None
        first = self.rows if labelled else {name: row | (self.agreement or {})[name] for name, row in self.rows.items()}
        header = " ".join(f"{title:>6}" for title in _SCORES.values())
        shares = "".join(f" {title:>{_SHARE}}" for title in _TITLES.values()) if self.agreement else ""
        lines = [] if labelled else [f"no labels: {_AGREEMENT}"]
        lines += [f"{'':{_WIDE}}  {header}{shares} {'ms':>7} {'GMACs':>7} {'peak MB':>8}"]
        for name, row in first.items():
            costs = f"{cell(row.get('ms'), 7, 0)} {cell(row.get('gmacs'), 7, 1)} {cell(row.get('peak_mb'), 8, 0)}"
            lines.append(f"{_line(name, row):{_WIDE + 2 + len(header) + len(shares)}} {costs}")
        if labelled and self.agreement:
            lines += [_AGREEMENT, *(_line(name, row) for name, row in self.agreement.items())]
        lines += ["at the sites only", *(_line(name, row["at_sites"]) for name, row in first.items())]
        classes = first["coarse"]["class_iou"]
        if len(classes) > 2:
            lines.append(f"{'IoU by class':16} " + " ".join(f"{_shown(name):>{_WIDE}}" for name in first))
            for c in classes:
                cells = " ".join(cell(row["class_iou"][c], _WIDE, 4) for row in first.values())
                lines.append(f"{printable(c):16} {cells}")
        if self.agreement:
            score = _SCORES[main_score(len(classes))]
            lines += [
                f"recovered: share of coarse -> dense in {score}; at sites: of coarse -> dense at sites, all that the "
                "dense model gives there",
                *_undefined("" if labelled else "agreement: ", first),
                *(_undefined("agreement: ", self.agreement) if labelled else ()),
            ]
        lines += _intervals(first, _SCORES[main_score(len(classes))])
        selected = [f"{self.images} image{'s' * (self.images != 1)}, density {self.density:.1%}"]
        if self.errors_selected is not None:
            selected.append(f"coarse errors selected {self.errors_selected:.1%}")
        if self.differences_selected is not None:
            selected.append(f"differences of coarse and dense selected {self.differences_selected:.1%}")
        stages = ", ".join(f"{name} {ms:.0f}" for name, ms in self.stages_ms.items())
        return "\n".join([*lines, ", ".join(selected), f"refined prediction, ms by stage: {stages}"])


_SCORES = {"dice": "Dice", "iou": "IoU", "boundary_iou": "B-IoU", "miou": "mIoU", "accuracy": "acc"}
_SHARE = 9
_TITLES = {"recovered": "recovered", "recovered_at_sites": "at sites"}
_AGREEMENT = "agreement with the dense model: its labels stand for the truth"


def _shown(name: str) -> str:
    return name.replace("_", " ")


def _line(name: str, figures: dict[str, Any]) -> str:
    """Scores of a row, and its recovered shares if it has them."""
    scores = [cell(figures[key], 6, 4) for key in _SCORES]
    shares = [cell(figures[key], _SHARE, 2) for key in _TITLES if key in figures]
    return f"{_shown(name):{_WIDE}}  {' '.join([*scores, *shares])}"


def _intervals(rows: dict[str, dict[str, Any]], score: str) -> Iterator[str]:
    """A line on how far the refined score would move with other images, if that is known."""
    refined = rows["refined"]
    if refined["interval"] is None:
        return
    low, high = refined["interval"]
    parts = [f"{low:.4f} to {high:.4f}"]
    for other in ("coarse", "dense"):
        if refined.get(f"above_{other}") is not None:
            low, high = refined[f"above_{other}"]
            parts.append(f"{low:+.4f} to {high:+.4f} above {other}")
    yield f"refined {score}, 95% of draws of these images with repeats: {', '.join(parts)}"


def _undefined(where: str, rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each recovered share that is undefined, with the reason."""
    main = main_score(len(rows["coarse"]["class_iou"]))
    for key, bound in BOUNDS.items():
        if rows["coarse"][key] is None:
            reason = why_undefined(rows["coarse"][main], rows[bound][main], _shown(bound))
            yield f"{where}no share {_TITLES[key]!r}: {reason}"


@torch.no_grad()
def evaluate(
    refiner: SparseRefiner,
    images: Iterable[tuple[Tensor, Tensor] | Example],
    *,
    dense: Dense | None = None,
    boundary_px: int | None = None,
    repeats: int = 1,
    seen: Callable[[Refinement, dict[str, Tensor]], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Scores a refiner on images and times it end to end. Scores are over all images together.

    The oracle has the truth at the selected sites: the best score that this selection allows. With a dense model, all
    are also scored by their agreement with its labels; this needs no labels. Times include making the labels: coarse is
    base and labels, refined is all stages and labels, dense is the dense model and labels.

    Args:
        refiner: with its base, on the device to run on.
        images: image ``[C, H, W]`` and label ``[H, W]`` (255 ignored; everywhere, if the image has no label); a third
            item, ``bool [H, W]``, is false where the image has no data: nothing is refined or scored there.
        dense: dense model to compare with, usually the base's architecture at full resolution.
        boundary_px: width of the band of boundary IoU [px]; ``None``: 2 % of the diagonal.
        repeats: timed runs of each prediction of each image; their median is reported. On a GPU each prediction also
            runs once, untimed, before the first image.
        seen: called after each image with the refinement and the label maps ``[H, W]`` by row name; for pictures.
        progress: called with the name of each step when it begins.

    Raises:
        ValueError: there are no images, or neither a label of any pixel nor a dense model to score by.
    """
    report_step = progress or (lambda stage: None)
    device = next(refiner.parameters()).device
    watch = Stopwatch(device, repeats)
    engine, k = refiner.engine.on(device), refiner.base.num_classes
    names = ("coarse", "sparse", "refined", "oracle", *(("dense_at_sites", "dense") if dense else ()))
    board = Scoreboard(names, k, boundary_px)
    densities: list[float] = []
    stages: dict[str, list[float]] = {}
    count = 0
    for item in images:
        image, label, valid = Example(*item)
        count += 1
        batch, truth = image[None].to(device), label.to(device)
        there = None if valid is None else valid[None].to(device)
        if there is not None:
            truth = torch.where(there[0], truth, IGNORE)
        height, width = truth.shape
        size = (height, width)
        labels: dict[str, Tensor] = {}

        def coarse_labels(x: Tensor = batch, size: tuple[int, int] = size) -> Tensor:
            return engine.uncertainty(refiner.coarse_of(refiner.base(x), size))[0]

        def refined(x: Tensor = batch, there: Tensor | None = there) -> tuple[Refinement, Tensor]:
            result = refiner(x, there)
            return result, result.labels()

        # A runtime compiles for each new size, which is not to be timed.
        if refiner.base.config.runtime is not None:
            refiner.base(batch)
        if dense is not None and model_of(dense).config.runtime is not None:
            dense_prediction(dense, batch, engine)
        report_step("coarse prediction")
        labels["coarse"], ms, peak = watch.time("coarse", coarse_labels)
        base_macs = refiner.base.macs(*size)
        board.rows["coarse"].costs.add(ms, base_macs, peak)
        report_step("refined prediction")
        (result, labels["refined"]), ms, peak = watch.time("refined", refined)
        macs = list(result.macs.values())
        board.rows["refined"].costs.add(ms, None if None in macs else sum(m for m in macs if m is not None), peak)
        if dense is not None:

            def predicted(x: Tensor = batch, dense: Dense = dense) -> Tensor:
                return dense_prediction(dense, x, engine)

            report_step("dense prediction")
            labels["dense"], ms, peak = watch.time("dense", predicted)
            board.rows["dense"].costs.add(ms, model_of(dense).macs(*size), peak)

        report_step("scores")
        sites = result.sites.flat
        site_truth = truth.flatten()[sites]
        coarse_at_sites = result.coarse_labels.flatten()[sites]
        labels["sparse"] = result.with_sites(result.sparse_logits.argmax(1))
        true_at_sites = torch.where(site_truth == IGNORE, coarse_at_sites.long(), site_truth.long())
        labels["oracle"] = result.with_sites(true_at_sites)
        if dense is not None:
            labels["dense_at_sites"] = result.with_sites(labels["dense"].flatten()[sites])
        maps = {name: labels[name][0] for name in names}
        on_cpu = {name: x.cpu() for name, x in maps.items()}
        board.add(on_cpu, truth.cpu(), result.sites.mask()[0].cpu(), None if valid is None else valid.cpu())
        densities.append(result.density)
        for stage, duration in result.timings_ms.items():
            stages.setdefault(stage, []).append(duration)
        if seen:
            seen(result, maps)
    if not count:
        raise ValueError("no image to evaluate; check the split and the data folder")
    if not board.labelled and dense is None:
        raise ValueError(
            f"nothing to score: every pixel of the {count} label images is ignored ({IGNORE}); check the labels and "
            "the configuration's ignored values, or name a dense model to agree with (--dense NAME)"
        )
    rows, agreement = board.summaries(refiner.classes)
    return Evaluation(
        rows,
        agreement or None,
        count,
        statistics.fmean(densities),
        board.wrong.share() if board.labelled else None,
        board.different.share() if dense else None,
        {stage: statistics.median(times) for stage, times in stages.items()},
        {"threshold": refiner.selector.threshold, "budget": refiner.selector.budget},
    )
