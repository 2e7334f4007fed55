"""The result of an assessment: what refinement can win, at which price, and whether that is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparserefine.files.text import printable
from sparserefine.studies.scoring import cell

KEEP = 0.95
"""Share of the largest gain that the recommended threshold keeps."""
MOST_TIME = 0.8
"""Refinement that takes a larger share of the dense model's time saves too little to be worth a training."""
LITTLE = {"labels": 0.002, "dense": 0.005}
"""Smaller gains are nothing that a few images show: of the score on labels, and of the agreement with dense."""

Truth = Literal["labels", "dense"]
Score = Literal["dice", "miou"]
Verdict = Literal["worth it", "no gain", "confident errors", "too slow"]
_TITLES = {"dice": "Dice", "miou": "mIoU"}


@dataclass(frozen=True)
class Cost:
    """Score and cost of a whole prediction.

    Attributes:
        score: the main score over all images.
        ms: median time [ms].
        gmacs: mean multiply-accumulates [1e9]; ``None`` if they cannot be counted.
        peak_mb: largest peak memory [1e6 bytes].
    """

    score: float
    ms: float
    gmacs: float | None
    peak_mb: float


@dataclass(frozen=True)
class Rung:
    """What refinement at one threshold can win, and its price.

    Attributes:
        threshold: [nats].
        density: share of the pixels that are sites, mean over images.
        score: coarse with the dense model's labels at the sites.
        share: (score - coarse) / (dense - coarse); ``None`` if dense is not better than coarse.
        oracle: coarse with the truth at the sites; ``None`` without labels.
        ms: median time of the refined prediction [ms], from runs of an untrained refiner at two or three thresholds.
        gmacs: its multiply-accumulates [1e9], likewise; ``None`` if those of the base cannot be counted.
    """

    threshold: float
    density: float
    score: float
    share: float | None
    oracle: float | None
    ms: float
    gmacs: float | None


@dataclass(frozen=True)
class Assessment:
    """The result of :func:`sparserefine.studies.assess.assess`.

    Attributes:
        images: names of the images looked at.
        seconds: how long that took.
        scored_on: ``labels``; or ``dense``: agreement with the dense model's labels, whose own score is then 1.
        score: the main score: ``dice`` of class 1 for two classes, ``miou`` for more.
        coarse: the base alone.
        dense: the dense model.
        dense_better: number of images on which dense scores higher than coarse; ``None`` without labels.
        rungs: by threshold, the lowest first.
        verdict: ``worth it``; or not, for ``no gain``: dense is not better than coarse; ``confident errors``: it is
            better, but not where the base is unsure; ``too slow``: refinement would take as long as dense.
        threshold: the recommended one [nats]; ``None`` unless it is worth it.
        reason: the verdict in words, and what to do next.
    """

    images: tuple[str, ...]
    seconds: float
    scored_on: Truth
    score: Score
    coarse: Cost
    dense: Cost
    dense_better: int | None
    rungs: tuple[Rung, ...]
    verdict: Verdict
    threshold: float | None
    reason: str

    def table(self) -> str:
        """Scores, prices and verdict as text."""
        title, count = _TITLES[self.score], len(self.images)
        how = "on the labels" if self.scored_on == "labels" else "by agreement with the dense model, as if it were true"
        lines = [
            f"{count} image{'s' * (count != 1)} in {self.seconds:.0f} s ({', '.join(map(printable, self.images))}), "
            f"scored {how}",
            "",
            f"{'':9} {title:>7} {'ms':>7} {'GMACs':>8} {'peak MB':>8}",
        ]
        for name, c in (("coarse", self.coarse), ("dense", self.dense)):
            lines.append(f"{name:9} {c.score:7.4f} {c.ms:7.0f} {cell(c.gmacs, 8, 1)} {c.peak_mb:8.0f}")
        if self.dense_better is not None:
            lines.append(f"dense is better than coarse on {self.dense_better} of {count}")
        known = self.scored_on == "labels"
        lines += [
            "",
            "if refinement answered like the dense model where the base is unsure (entropy above the threshold):",
            f"threshold density {title:>7} {'of gap':>7}{'  oracle' if known else ''} {'ms':>7} {'of dense':>8} "
            f"{'GMACs':>8} {'of dense':>8}",
        ]
        for r in self.rungs:
            share = f"{'-':>7}" if r.share is None else f"{r.share:7.0%}"
            oracle = f" {cell(r.oracle, 7, 4)}" if known else ""
            work = None if r.gmacs is None or not self.dense.gmacs else r.gmacs / self.dense.gmacs
            lines.append(
                f"{r.threshold:9.3g} {r.density:7.1%} {r.score:7.4f} {share}{oracle} "
                f"{r.ms:7.0f} {r.ms / self.dense.ms:8.2f} {cell(r.gmacs, 8, 1)} {cell(work, 8, 2)}"
                f"{'  <- start here' if r.threshold == self.threshold else ''}"
            )
        if known:
            lines.append("oracle: the truth in place of the dense model's labels; no refiner of any kind scores more")
        return "\n".join([*lines, "", self.reason])


def judge(
    rungs: Sequence[Rung], coarse: Cost, dense: Cost, scored_on: Truth, score: Score
) -> tuple[Verdict, float | None, str]:
    """Verdict, recommended threshold, and the reason in words.

    A dense model that is not better than coarse is nothing to learn from. Else, of the thresholds that take at most
    :data:`MOST_TIME` of the dense model's time, it is the highest, and so the cheapest, that keeps :data:`KEEP` of the
    largest gain of any. If none does, it is the one with the largest gain, if that is half of it at least.
    """
    title, little = _TITLES[score], LITTLE[scored_on]
    gain = {r.threshold: r.score - coarse.score for r in rungs}
    most = max(gain.values())
    if dense.score - coarse.score < little:
        return "no gain", None, _no_gain(rungs, coarse, dense, scored_on, title)
    if most < little:
        return (
            "confident errors",
            None,
            f"Verdict: not worth it. The dense model is better ({title} {dense.score:.4f}, coarse {coarse.score:.4f}), "
            f"but not where the base is unsure: even at threshold {rungs[0].threshold:g} its labels there give only "
            f"{rungs[0].score:.4f}. The base is too sure of its errors.\n"
            "Next: a larger base.ratio, or a base that was trained with label smoothing, is sure of less.",
        )
    affordable = [r for r in rungs if r.ms <= MOST_TIME * dense.ms]
    keeping = [r for r in affordable if gain[r.threshold] >= KEEP * most]
    best = keeping[-1] if keeping else max(affordable, key=lambda r: gain[r.threshold], default=None)
    if best is None or gain[best.threshold] < most / 2:
        needed = [r for r in rungs if gain[r.threshold] >= KEEP * most][-1]
        return (
            "too slow",
            None,
            f"Verdict: not worth it, refinement would take as long as the dense model: {needed.ms / dense.ms:.2f} of "
            f"its time at threshold {needed.threshold:g}, which it takes to keep {KEEP:.0%} of what can be won (the "
            f"base alone takes {coarse.ms / dense.ms:.2f}).\n"
            "Next: a smaller base.ratio, a smaller extractor (preset: slim), or simply the dense model.",
        )
    part = gain[best.threshold] / most
    operations = f" and {best.gmacs / dense.gmacs:.2f} of its operations" if best.gmacs and dense.gmacs else ""
    rule = f"the highest threshold that keeps {KEEP:.0%} of the largest gain within {MOST_TIME} of the dense time"
    if not keeping:
        rule = f"it keeps {part:.0%} of the largest gain; more takes over {MOST_TIME} of the dense time"
    lifted, check = title, ""
    if scored_on == "dense":
        lifted, check = f"the agreement ({title})", "look at the dense model's labels first, for nothing here knows "
        check += "whether they are right; then "
    return (
        "worth it",
        best.threshold,
        f"Verdict: worth it. A refiner that learns all that the dense model knows at {best.density:.1%} of the pixels "
        f"lifts {lifted} from {coarse.score:.4f} to {best.score:.4f} (dense {dense.score:.4f}), in "
        f"{best.ms / dense.ms:.2f} of the dense time{operations}.\n"
        f"Next: {check}train with selector.threshold: {best.threshold:g} ({rule}).",
    )


def _no_gain(rungs: Sequence[Rung], coarse: Cost, dense: Cost, scored_on: Truth, title: str) -> str:
    """The verdict where the dense model is not better than coarse, in words."""
    if scored_on == "dense":
        return (
            f"Verdict: not worth it, coarse and dense give the same labels ({title} of their agreement "
            f"{coarse.score:.4f}).\nNext: use the base as it is, or try a smaller base.ratio, which costs less."
        )
    best = max(rungs, key=lambda r: r.score)
    there = ""
    if best.score - coarse.score >= LITTLE[scored_on]:
        there = f" Only at the pixels above {best.threshold:g} nats are its labels better ({best.score:.4f})."
    return (
        f"Verdict: not worth it with this dense model, it is not better than coarse ({title} {dense.score:.4f}, coarse "
        f"{coarse.score:.4f}).{there} A refiner that learns from it gains nothing.\n"
        "Next: a model that was trained on small images often fails on large ones. If you have one that was trained at "
        "full resolution, name it: --dense NAME. A refiner can also learn from labels alone; how far towards the "
        "oracle, only training tells."
    )
