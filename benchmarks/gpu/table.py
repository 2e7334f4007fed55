"""Markdown tables of a results file, as shown in docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

PEERS = ("torch", "spconv", "spconv-triton", "dense")


def tables(content: dict[str, Any]) -> str:
    """All tables that there are records for."""
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    unet = content["unet"]
    parts = [
        machine,
        _checks(content["checks"]),
        _ceilings(content["ceilings"]),
        _targets(unet, content["uncertainty"]),
        _unet(unet),
        _stages(unet),
        _peers(unet),
        _uncertainty(content["uncertainty"]),
        _training(content["training"]),
        _models(content["models"]),
        _tilings(content["tilings"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(title: str, header: str, rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """One Markdown table; ``header`` has the columns' names between bars. The first ``words`` columns are text."""
    if not rows:
        return ""
    names = [name.strip() for name in header.split("|")]
    rule = ["---" if i < words else "---:" for i in range(len(names))]
    lines = [f"| {' | '.join(cells)} |" for cells in (names, rule, *rows)]
    return "\n".join([f"**{title}**", "", *lines])


def _checks(records: Sequence[Row]) -> str:
    if not records:
        return ""
    wrong = [record["name"] for record in records if not record["ok"]]
    return f"Checks: {len(records)}, {len(wrong)} wrong" + "".join(f"\n- WRONG: {name}" for name in wrong)


def _ceilings(records: Sequence[Row]) -> str:
    rows = [(r["name"], f"{r['rate']:.4g} {r['unit']}") for r in records]
    return _table("Measured ceilings", "what | rate", rows)


# ---- targets


def _targets(unet: Sequence[Row], uncertainty: Sequence[Row]) -> str:
    """The project's targets: one image of 1024x2048, 10 % density, float16."""
    chosen = [
        r
        for r in unet
        if r["size"] == "1024x2048"
        and r["batch"] == 1
        and r["dtype"] == "float16"
        and (r["engine"] == "dense" or 0.09 <= r["density"] <= 0.11)
    ]
    if not chosen and not uncertainty:
        return ""
    graph = {preset: _worst(chosen, engine="triton", preset=preset, mode="graph") for preset in ("paper", "slim16")}
    labels = _worst(
        [r for r in uncertainty if r["case"] == "19 classes, 256x512 -> 1024x2048"],
        engine="triton",
        dtype="float32",
        mode="eager",
    )
    gain = _gain(chosen)
    rows = [
        _target("preset paper, graph", graph["paper"], 4.0, "ms"),
        _target("preset slim16, graph", graph["slim16"], 1.0, "ms"),
        _target("uncertainty of 19 classes", labels, 0.15, "ms"),
        _target("preset paper, times as fast as spconv-triton", _lowest_ratio(chosen, "spconv-triton"), 1.5, "x"),
        _target("preset paper, times as fast as the dense U-Net, over the ratio of operations", gain, 2.0, "x"),
    ]
    return _table(
        "Targets: one image of 1024x2048, density 10 %, float16; the worst of several masks", _TARGET_HEADER, rows
    )


_TARGET_HEADER = "what | target | measured | met"


def _target(what: str, value: float | None, target: float, unit: str) -> tuple[str, ...]:
    wanted = f"{'<=' if unit == 'ms' else '>='} {target:g} {unit}"
    if value is None:
        return what, wanted, "-", "-"
    met = value <= target if unit == "ms" else value >= target
    return what, wanted, f"{value:.3g} {unit}", "yes" if met else "no"


def _worst(records: Sequence[Row], **fields: Any) -> float | None:
    found = [r["ms"] for r in records if all(r[key] == value for key, value in fields.items())]
    return max(found, default=None)


def _lowest_ratio(chosen: Sequence[Row], engine: str) -> float | None:
    found = []
    for ours in chosen:
        if (ours["engine"], ours["preset"], ours["mode"]) == ("triton", "paper", "graph"):
            ratio = _ratio(chosen, ours, engine)
            if ratio is not None:
                found.append(ratio)
    return min(found, default=None)


def _gain(chosen: Sequence[Row]) -> float | None:
    """Speed-up over the dense network divided by the ratio of their operations, preset ``paper``."""
    found = []
    for ours in chosen:
        if (ours["engine"], ours["preset"], ours["mode"]) == ("triton", "paper", "graph"):
            dense = _peer(chosen, ours, "dense")
            if dense is not None:
                found.append(dense["ms"] / ours["ms"] / (dense["gmacs"] / ours["gmacs"]))
    return min(found, default=None)


def _peer(records: Sequence[Row], ours: Row, engine: str) -> Row | None:
    """The fastest record of that engine on the same case."""
    same = [
        r
        for r in records
        if r["engine"] == engine
        and all(r[key] == ours[key] for key in ("preset", "size", "batch", "dtype"))
        and (engine == "dense" or r["mask"] == ours["mask"])
    ]
    return min(same, key=lambda r: r["ms"], default=None)


def _ratio(records: Sequence[Row], ours: Row, engine: str) -> float | None:
    peer = _peer(records, ours, engine)
    return None if peer is None else peer["ms"] / ours["ms"]


# ---- the U-Net


def _unet(records: Sequence[Row]) -> str:
    """Engine ``triton``: one row for each case, with its two modes and the other engines."""
    own = [r for r in records if r["engine"] == "triton"]
    cases = dict.fromkeys(_case(r) for r in own)
    rows = []
    for case in cases:
        modes = {r["mode"]: r for r in own if _case(r) == case}
        best = modes.get("graph") or modes["eager"]
        rows.append(
            (
                *(best["preset"], best["mask"], str(best["batch"]), best["dtype"]),
                *(_ms(modes.get(mode), "ms") for mode in ("graph", "eager")),
                *(_ms(_peer(records, best, engine), "ms") for engine in PEERS),
                *(_times(_ratio(records, best, engine)) for engine in PEERS),
                *(_ms(best, "floor_ms"), _bound(best), _times(best["ms"] / best["floor_ms"])),
                f"{best['gmacs']:.0f}",
                f"{best['peak_mb']:.0f}",
            )
        )
    header = (
        "preset | mask | batch | dtype | graph ms | eager ms | torch ms | spconv ms | spconv-triton ms | dense ms "
        "| vs torch | vs spconv | vs spconv-triton | vs dense | floor ms | bound by | over floor | GMACs | peak MB"
    )
    return _table("Sparse U-Net, mask and features to logits", header, rows, 4)


def _case(record: Row) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("preset", "mask", "size", "batch", "dtype"))


def _stages(records: Sequence[Row]) -> str:
    rows = [
        (
            *(r["engine"], r["preset"], r["mask"], str(r["batch"]), r["dtype"]),
            *(_ms(r, "plan_ms"), _ms(r, "forward_ms"), _ms(r, "ms")),
            f"{r['low_ms']:.3g}..{r['high_ms']:.3g}",
        )
        for r in records
        if r["plan_ms"] is not None
    ]
    header = "engine | preset | mask | batch | dtype | plan ms | forward ms | total ms | 10th..90th percentile"
    return _table("Eager: plan and forward separately", header, rows, 5)


def _peers(records: Sequence[Row]) -> str:
    rows = [
        (
            *(r["engine"], r["mode"], r["preset"], r["mask"], str(r["batch"]), r["dtype"], _ms(r, "ms")),
            *(_ms(r, "floor_ms"), _bound(r), f"{r['peak_mb']:.0f}"),
            "-" if r["difference"] is None else f"{r['difference']:.1e}",
        )
        for r in records
        if r["engine"] != "triton"
    ]
    header = (
        "engine | mode | preset | mask | batch | dtype | ms | floor ms | bound by | peak MB "
        "| rms difference from triton"
    )
    return _table("Other engines", header, rows, 6)


# ---- the others


def _uncertainty(records: Sequence[Row]) -> str:
    plain = {(r["case"], r["dtype"]): r["ms"] for r in records if r["engine"] == "plain"}
    rows = []
    for r in records:
        peer = plain.get((r["case"], r["dtype"]))
        rows.append(
            (
                *(r["case"], r["dtype"], f"{r['engine']}, {r['mode']}", _ms(r, "ms")),
                _times(None if peer is None or r["engine"] == "plain" else peer / r["ms"]),
                *(_ms(r, "floor_ms"), _times(r["ms"] / r["floor_ms"]), f"{r['peak_mb']:.0f}"),
            )
        )
    header = "case | logits | engine | ms | vs plain torch | floor ms (bytes) | over floor | peak MB"
    return _table("Labels and entropy", header, rows, 3)


def _training(records: Sequence[Row]) -> str:
    times = {(r["preset"], r["mask"], r["dtype"], r["engine"]): r["ms"] for r in records}
    rows = []
    for r in records:
        peer = times.get((r["preset"], r["mask"], r["dtype"], "torch"))
        rows.append(
            (
                *(r["preset"], r["mask"], r["dtype"], r["engine"], _ms(r, "ms")),
                _times(None if peer is None or r["engine"] == "torch" else peer / r["ms"]),
                *(_ms(r, "floor_ms"), _times(r["ms"] / r["floor_ms"]), f"{r['peak_mb']:.0f}"),
            )
        )
    header = "preset | mask | dtype | engine | ms | vs torch | floor ms | over floor | peak MB"
    return _table("Training step: forward and backward", header, rows, 4)


def _models(records: Sequence[Row]) -> str:
    rows = [
        (
            *(r["model"], r["coarse_size"], r["preset"], r["mask"], f"{100 * r['density']:.0f} %"),
            *(f"{r[key]:.1f}" for key in ("dense_ms", "coarse_ms", "refine_ms")),
            f"{r['ratio']:.2f}x",
            f"{r['dense_peak_mb']:.0f}",
            f"{max(r['coarse_peak_mb'], r['refine_peak_mb']):.0f}",
        )
        for r in records
    ]
    header = (
        "model | coarse | preset | mask | density | dense ms | coarse ms | refine ms | dense / (coarse + refine) "
        "| dense peak MB | ours, peak MB"
    )
    return _table("The whole method, " + (records[0]["precision"] if records else ""), header, rows, 4)


def _tilings(records: Sequence[Row]) -> str:
    rows = [
        (
            *(r["preset"], r["dtype"], f"{r['kind']} {r['depth']}", f"{r['c_in']} -> {r['c_out']}", str(r["rows"])),
            *(str(r["layers"]), r["own"], f"{1e3 * r['own_ms']:.1f}", r["best"], f"{1e3 * r['best_ms']:.1f}"),
            f"{1e3 * r['floor_ms']:.1f}",
        )
        for r in records
    ]
    header = (
        "preset | dtype | stencil | channels | rows | layers | own tiling | own us | best tiling | best us | floor us"
    )
    return _table("Single convolutions", header, rows, 4)


def _ms(record: Row | None, key: str) -> str:
    value = None if record is None else record[key]
    return "-" if value is None else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"


def _bound(record: Row) -> str:
    return "operations" if record["operations_ms"] >= record["bytes_ms"] else "bytes"
