"""Tables, JSON and charts of ``sparserefine benchmark``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any

from sparserefine.files.regular import given_path
from sparserefine.files.results import write_results
from sparserefine.files.text import printable
from sparserefine.files.whole import sweep, written_whole
from sparserefine.studies.benchmark.records import Record, Report

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_TYPICAL_DENSITY = 0.1  # the summary reports the density nearest to this
_SAME_DENSITY = 0.02  # relative; masks that differ by less are one point: a slope between them would be noise
_DENSE, _COARSE = "#8d99a6", "#a9cbe8"
_PRESET_COLOURS = ("#d1603d", "#3f7f5f", "#7c5aa6", "#c49a1f", "#4c5b8c")


@dataclass(frozen=True)
class BreakEven:
    """The density above which the dense model is faster.

    Attributes:
        density: share of the pixels, 0..1; 0: dense is always faster; ``None``: never, even if all pixels are sites.
        extrapolated: whether it lies outside the measured densities.
    """

    density: float | None
    extrapolated: bool

    def __str__(self) -> str:
        mark = "*" if self.extrapolated else ""
        if self.density is None:
            return f"never{mark}"
        if self.density == 0:
            return f"0 %: always slower{mark}"
        return f"{'~' if mark else ''}{100 * self.density:.0f} %{mark}"


def break_even(dense_ms: float, points: Sequence[tuple[float, float]]) -> BreakEven | None:
    """The density at which coarse + refinement takes as long as the dense model.

    Interpolates linearly between the measured points; outside them, uses the least-squares line through all points.

    Args:
        dense_ms: time of the dense model [ms].
        points: pairs of density 0..1 and time of coarse + refinement [ms]. Points of nearly equal density are averaged.

    Returns:
        The break-even density; ``None`` if there are fewer than two densities.

    >>> str(break_even(300, [(0.1, 100), (0.2, 200), (0.3, 400)]))
    '25 %'
    >>> str(break_even(500, [(0.1, 100), (0.2, 200)]))
    '~50 %*'
    """
    line = _averaged(points)
    if len(line) < 2:
        return None
    slope, start = linear_regression(*zip(*points, strict=True))
    (first_density, _), (last_density, last_ms) = line[0], line[-1]
    if last_ms <= dense_ms:
        if last_ms == dense_ms or last_density >= 1:
            return BreakEven(last_density if last_ms == dense_ms else None, False)
        reached = max(last_density, (dense_ms - start) / slope) if slope > 0 else 2.0
        return BreakEven(reached if reached <= 1 else None, True)
    for (density, ms), (next_density, next_ms) in reversed(list(pairwise(line))):
        if ms <= dense_ms < next_ms:
            return BreakEven(density + (next_density - density) * (dense_ms - ms) / (next_ms - ms), False)
    reached = (dense_ms - start) / slope if slope > 0 else 0.0
    return BreakEven(min(max(0.0, reached), first_density), first_density > 0)


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points sorted by density; points of nearly the same density are replaced by their mean."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] - groups[-1][0][0] <= _SAME_DENSITY * point[0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(sum(d for d, _ in group) / len(group), sum(ms for _, ms in group) / len(group)) for group in groups]


def break_even_of(records: Sequence[Record]) -> BreakEven | None:
    """The break-even density of one base, runtime and preset."""
    return break_even(records[0].dense_ms, [(r.density, r.coarse_ms + r.refine_ms) for r in records])


def header(report: Report) -> str:
    """Machine, size, precision, device, engine and rounds of a report."""
    settings = report.settings
    lines = [report.machine]
    if report.records:
        first = report.records[0]
        threads = f"{first.threads} thread{'' if first.threads == 1 else 's'}"
        lines.append(
            f"{first.size}, {_precision(first)}, device {first.device}, {threads}, {_engine(first)}, "
            f"median of {settings.rounds} round{'' if settings.rounds == 1 else 's'}"
        )
    return "\n".join(lines)


def model_table(records: Sequence[Record]) -> str:
    """All results of one base: a table for each runtime."""
    blocks = []
    for block in _by_run(records):
        first = block[0]
        what = f"{printable(first.model)}, {first.runtime}, {first.classes} classes"
        title = f"{what}: {first.coarse_size} instead of {first.size}"
        rows: list[Sequence[str]] = [
            ("", "density", "ms", "with coarse", "ratio", "GMACs", "peak MB", "packed MB"),
            *(
                (name, "", _ms(ms), "", "", _number(gmacs), _number(peak_mb), "")
                for name, ms, gmacs, peak_mb in (
                    ("dense", first.dense_ms, first.dense_gmacs, first.dense_peak_mb),
                    ("coarse", first.coarse_ms, first.coarse_gmacs, first.coarse_peak_mb),
                )
            ),
        ]
        rows += [
            (
                r.preset + ("" if r.mask == "synthetic" else f", {printable(r.mask)}"),
                f"{r.density:.1%}",
                _ms(r.refine_ms),
                _ms(r.coarse_ms + r.refine_ms),
                f"{r.ratio:.2f}x",
                _number(r.refine_gmacs),
                _number(r.refine_peak_mb),
                _number(r.packed_mb),
            )
            for r in block
        ]
        lines = [title, *_aligned(rows, words=1)]
        for same in _by_preset(block):
            stages = ", ".join(f"{name} {_ms(ms)}" for name, ms in typical(same).stages_ms.items())
            lines.append(f"{same[0].preset} at {typical(same).density:.0%}, ms by stage: {stages}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def summary(report: Report) -> str:
    """A line for each base and runtime; refinement at the measured density nearest to 10 %."""
    if not report.records:
        return "\n".join(["nothing was measured", *map(printable, report.left_out)])
    presets = report.settings.presets
    head = ["model", "runtime", "coarse size", "dense ms", "coarse ms"]
    for preset in presets:
        head += [f"{preset} ms", "ratio", "break-even"]
    rows: list[Sequence[str]] = [(*head, "peak MB dense", "coarse", "refine", "packed MB")]
    starred = False
    for block in _by_run(report.records):
        first = block[0]
        row = [printable(first.model), first.runtime, first.coarse_size, _ms(first.dense_ms), _ms(first.coarse_ms)]
        chosen = [typical(same) for same in _by_preset(block)]
        for same, record in zip(_by_preset(block), chosen, strict=True):
            even = break_even_of(same)
            starred |= even is not None and even.extrapolated
            row += [_ms(record.refine_ms), f"{record.ratio:.2f}x", "-" if even is None else str(even)]
        refine_peak = max(record.refine_peak_mb for record in chosen)
        packed = max((r.packed_mb for r in chosen if r.packed_mb is not None), default=None)
        rows.append((*row, *map(_number, (first.dense_peak_mb, first.coarse_peak_mb, refine_peak, packed))))
    densities = sorted({f"{typical(same).density:.0%}" for run in _by_run(report.records) for same in _by_preset(run)})
    lines = [
        f"refinement at a density of {', '.join(densities)}; ratio = dense / (coarse + refinement)",
        *_aligned(rows, words=3),
    ]
    lines.append("break-even: the density above which dense is faster" + ("; * extrapolated" if starred else ""))
    lines.append(
        "peak MB: in addition to the loaded networks and to packed MB (the engine's copy of the extractor's weights)"
        + ("; refine and packed: the largest over the presets" if len(presets) > 1 else "")
    )
    return "\n".join([*lines, *map(printable, report.left_out)])


def typical(records: Sequence[Record]) -> Record:
    """The record whose density is nearest to 10 %."""
    return min(records, key=lambda r: abs(r.density - _TYPICAL_DENSITY))


def check_outputs(json_file: str | Path | None, plot_file: str | Path | None) -> None:
    """Checks before a long run that its results can be written.

    Raises:
        ValueError: a name is empty, the folder does not exist, the name is a folder's, or the plot's suffix is unknown.
        ImportError: matplotlib is not installed.
    """
    for what, file in (("--json", json_file), ("--plot", plot_file)):
        if file is None:
            continue
        path = given_path(file, what)
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{printable(file)}: its folder does not exist; make it first")
        if path.is_dir():
            raise ValueError(f"{printable(file)} is a folder, expected the name of a file")
        sweep(path.parent)
    if plot_file is not None:
        if Path(plot_file).suffix.lower() not in PLOT_SUFFIXES:
            raise ValueError(f"{printable(plot_file)}: expected a name that ends with {', '.join(PLOT_SUFFIXES)}")
        _figure_class()


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Writes the records as a JSON list; the old file stays until the new one is complete."""
    write_results(path, [asdict(record) for record in records])


def plot(report: Report, path: str | Path) -> None:
    """Draws a bar chart of dense and of coarse + refinement by preset and density; one panel for each base and runtime.

    Args:
        report: the results, at least one record.
        path: a .png, .svg or .pdf file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no records.
    """
    if not report.records:
        raise ValueError(f"{path}: nothing was measured, so there is nothing to draw")
    runs = _by_run(report.records)
    runtimes = len({run[0].runtime for run in runs})
    columns = runtimes if runtimes > 1 else min(3, len(runs))
    places = _places(runs, columns)
    lines = 1 + max(row for row, _ in places)
    bars = 1 + max(len(run) for run in runs)
    width, height = max(6.4, 4.3 * columns), 1.25 + lines * (0.85 + 0.23 * (bars + 0.5 * len(report.settings.presets)))
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    colours = {preset: _PRESET_COLOURS[i % len(_PRESET_COLOURS)] for i, preset in enumerate(report.settings.presets)}
    shown: dict[str, Any] = {}
    for run, place in zip(runs, places, strict=True):
        ax = axes[place]
        ax.set_visible(True)
        # Runtimes of one base share a row and an axis, so that they can be compared by eye.
        row = [other for other, (line, _) in zip(runs, places, strict=True) if line == place[0]]
        longest = max(map(_longest, row if runtimes > 1 else [run]))
        shown |= _draw_run(ax, run, colours, longest)
        if place[1] == 0 or not axes[place[0], place[1] - 1].get_visible():
            ax.set_ylabel("density", fontsize=8, color="#555555")
    figure.legend(
        shown.values(), shown.keys(), loc="outside upper center", ncols=min(len(shown), 5), frameon=False, fontsize=9
    )
    figure.supxlabel(_caption(report, width), fontsize=7.5, color="#555555")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lower().removeprefix("."), dpi=150)


def _places(runs: Sequence[Sequence[Record]], columns: int) -> list[tuple[int, int]]:
    """Row and column of each panel: in reading order for one runtime; for several, a row for each base."""
    runtimes = list(dict.fromkeys(run[0].runtime for run in runs))
    if len(runtimes) == 1:
        return [divmod(i, columns) for i in range(len(runs))]
    bases = list(dict.fromkeys((run[0].model, run[0].coarse_size) for run in runs))
    return [(bases.index((run[0].model, run[0].coarse_size)), runtimes.index(run[0].runtime)) for run in runs]


def _longest(run: Sequence[Record]) -> float:
    return max(run[0].dense_ms, *(r.coarse_ms + r.refine_ms for r in run))


def _draw_run(ax: Any, run: Sequence[Record], colours: dict[str, str], longest: float) -> dict[str, Any]:
    """Draws one panel; returns the legend's entries."""
    first = run[0]
    unit, scale = ("s", 1e-3) if longest >= 2000 else ("ms", 1.0)
    shown = {"dense": ax.barh(0, scale * first.dense_ms, color=_DENSE, height=0.78)}
    ticks, names, y = [0.0], ["dense"], 0.5
    for same in _by_preset(run):
        for r in same:
            y += 1
            total = r.coarse_ms + r.refine_ms
            shown["coarse"] = ax.barh(y, scale * r.coarse_ms, color=_COARSE, height=0.78)
            bar = ax.barh(y, scale * r.refine_ms, left=scale * r.coarse_ms, color=colours[r.preset], height=0.78)
            shown[f"refinement, {r.preset}"] = bar
            ax.annotate(
                f"{r.ratio:.2f}×" if r.ratio < 10 else f"{r.ratio:.0f}×",  # noqa: RUF001 (times)
                (scale * total, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#222222",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
            ticks.append(y)
            names.append(f"{r.density:.0%}" if _has_own_density(r, same) else printable(r.mask))
        y += 0.5
    ax.axvline(scale * first.dense_ms, color=_DENSE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    ax.set_yticks(ticks, names, fontsize=8)
    ax.set_ylim(y + 0.1, -0.6)
    ax.set_xlim(0, 1.16 * scale * longest)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8, color="#999999")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#999999")
    ax.set_xlabel(unit, fontsize=8, color="#555555", loc="right", labelpad=1)
    ax.set_title(
        f"{_short(printable(first.model))} ({first.runtime}), coarse {first.coarse_size}", fontsize=9.5, loc="left"
    )
    return shown


def _has_own_density(record: Record, others: Sequence[Record]) -> bool:
    """Whether no other record has the same density, rounded as it is printed."""
    return sum(f"{record.density:.0%}" == f"{other.density:.0%}" for other in others) == 1


def _caption(report: Report, width: float) -> str:
    import textwrap

    first = report.records[0]
    threads = f"{first.threads} thread{'' if first.threads == 1 else 's'}"
    text = (
        f"End to end to labels of {first.size}; numbers: dense / (coarse + refinement). "
        f"{report.machine}, {threads}, {_precision(first)}, {_engine(first)}"
    )
    return "\n".join(textwrap.wrap(text, int(15 * width)))


def _short(name: str, longest: int = 28) -> str:
    """Shortens a long name; of a file's name, the end says most."""
    return name if len(name) <= longest else f"...{name[-longest + 3 :]}"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib, which is not installed; `pip install 'sparserefine[plot]'`"
        ) from error
    return Figure  # without pyplot: it changes no global state and needs no window system


def _by_run(records: Sequence[Record]) -> list[list[Record]]:
    """Records grouped by base, coarse size and runtime."""
    return [list(group) for _, group in groupby(records, key=lambda r: (r.model, r.coarse_size, r.runtime))]


def _by_preset(records: Sequence[Record]) -> list[list[Record]]:
    return [list(group) for _, group in groupby(records, key=lambda r: r.preset)]


def _engine(record: Record) -> str:
    return f"engine {record.engine}{'' if record.mode == 'eager' else f' ({record.mode})'}"


def _precision(record: Record) -> str:
    same = record.precision == "float32" or record.device.startswith("cuda")
    return record.precision if same else f"base {record.precision}, refiner float32"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float | None) -> str:
    """A cell; ``-`` where there is no value."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Lines of aligned columns: the first ``words`` columns left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < words else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
