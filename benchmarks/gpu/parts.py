"""Times ceilings, uncertainty, training steps, and the whole method with its base models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu.device import DTYPES, ITEM_BYTES, Spread, peak_mb, precision, timed, timed_in_graph
from benchmarks.gpu.layers import floor_of, layers
from benchmarks.gpu.records import Ceiling, TrainingRecord, UncertaintyRecord
from benchmarks.gpu.run import SETS, Inputs, Run, UncertaintyCase, input_sets, network_of
from benchmarks.uncertainty import plain
from sparserefine.engines.choose import get_engine
from sparserefine.images.coarse import Coarse

MOST_SETS = 16  # of logits and results: together larger than the cache


def ceilings(run: Run) -> None:
    """Measures the rates that lower bounds are computed from: a copy, and products of large matrices in every dtype."""
    run.attempt("ceiling copy", lambda: _copy_rate(run))
    for dtype in DTYPES:
        run.attempt(f"ceiling {dtype}", lambda dtype=dtype: _product_rate(run, dtype))  # type: ignore[misc]


def _copy_rate(run: Run) -> None:
    elements = run.options.copy_bytes // 4
    source = torch.randn(elements, device=run.device.device)
    target = torch.empty_like(source)
    spread = timed(run.device, lambda i: target.copy_(source), 1)
    _ceiling(run, "copy", 2 * run.options.copy_bytes / spread.ms * 1e-6, "GB/s", spread)


def _product_rate(run: Run, dtype: str) -> None:
    side = run.options.side
    with precision(dtype) as kind:
        a, b = (torch.randn(side, side, device=run.device.device).to(kind) for _ in range(2))
        product = torch.empty_like(a)
        spread = timed(run.device, lambda i: torch.mm(a, b, out=product), 1)
    _ceiling(run, dtype, 2 * side**3 / spread.ms * 1e-9, "TFLOP/s", spread)


def _ceiling(run: Run, name: str, rate: float, unit: str, spread: Spread) -> None:
    run.results.add(
        "ceilings",
        [Ceiling(name, rate, unit, spread.ms, spread.low_ms, spread.high_ms, spread.repetitions)],
    )
    print(f"ceiling {name}: {rate:.4g} {unit}", flush=True)


# ---- uncertainty


def uncertainty(run: Run) -> None:
    """Times labels and entropy: engine ``triton`` against ordinary torch code."""
    engine = get_engine("triton")
    engines: dict[str, Callable[[Coarse], object]] = {
        "triton": engine.uncertainty,
        "plain": lambda coarse: plain(coarse.logits, coarse.size),
    }
    for case in run.options.cases:
        for dtype in (name for name in ("float32", "float16") if name in run.options.dtypes):
            for name, compute in engines.items():

                def measure(
                    case: UncertaintyCase = case,
                    dtype: str = dtype,
                    name: str = name,
                    compute: Callable[[Coarse], object] = compute,
                ) -> None:
                    _uncertainty(run, case, dtype, name, compute)

                run.attempt(f"uncertainty, {case}, {dtype}, {name}", measure, peer=name == "plain")


def _uncertainty(run: Run, case: UncertaintyCase, dtype: str, name: str, compute: Callable[[Coarse], object]) -> None:
    read = case.classes * case.coarse[0] * case.coarse[1] * ITEM_BYTES[dtype]
    moved = read + 5 * case.full[0] * case.full[1]
    sets = min(MOST_SETS, max(SETS, -(-2 * run.device.cache_bytes // read)))
    inputs = [
        Coarse((4 * torch.randn(1, case.classes, *case.coarse, device=run.device.device)).to(DTYPES[dtype]), case.full)
        for _ in range(sets)
    ]
    kept: list[object] = [None] * (sets if name == "triton" else 1)  # so that each run writes to other memory

    def once(i: int) -> None:
        kept[i % len(kept)] = compute(inputs[i])

    with torch.no_grad():
        spreads = {"eager": timed(run.device, once, sets)}
        kept[:] = [None] * len(kept)
        peak = peak_mb(run.device, lambda: once(0))
        if name == "triton":
            spreads["graph"] = timed_in_graph(run.device, once, sets)
    floor = moved / run.ceilings()["copy"] * 1e-6
    for mode, spread in spreads.items():
        times = (spread.ms, spread.low_ms, spread.high_ms, spread.repetitions)
        run.results.add("uncertainty", [UncertaintyRecord(name, str(case), dtype, mode, *times, peak, floor)])
        print(f"uncertainty, {case}, {dtype}, {name}, {mode}: {spread.ms:.4f} ms, floor {floor:.4f}", flush=True)


# ---- training


def training(run: Run) -> None:
    """Times forward and backward on the first mask, with engines ``triton`` and ``torch``."""
    for preset in run.options.presets:
        for dtype in (name for name in ("bfloat16", "tf32", "float32") if name in run.options.dtypes):
            for engine in ("triton", "torch"):
                run.attempt(
                    f"training, {preset}, {dtype}, {engine}",
                    lambda preset=preset, dtype=dtype, engine=engine: _training(run, preset, dtype, engine),  # type: ignore[misc]
                    peer=engine == "torch",
                )


def _training(run: Run, preset: str, dtype: str, name: str) -> None:
    device, (mask_name, mask) = run.device.device, run.first_mask()
    torch.manual_seed(0)
    sets = input_sets(mask, 1, device)
    network = network_of(run.options.presets[preset], device).train()
    engine = get_engine(name)
    plans = [engine.plan(one.mask, network.spec) for one in sets]
    half = DTYPES[dtype] != torch.float32

    def step(i: int) -> None:
        chosen: Inputs = sets[i]
        with torch.autocast(device.type, DTYPES[dtype]) if half else nullcontext():
            logits = network(chosen.features, plans[i])
        logits.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    with precision(dtype):
        spread = timed(run.device, step, SETS)
        peak = peak_mb(run.device, lambda: step(0))
    counts = [len(level.sites) for level in plans[0].levels]
    floor = floor_of(layers(network, counts), dtype, run.ceilings(), passes=3).ms
    record = TrainingRecord(
        *(name, preset, mask_name, dtype, "eager", counts[0]),
        *(spread.ms, spread.low_ms, spread.high_ms, spread.repetitions, peak, floor),
    )
    run.results.add("training", [record])
    print(f"training, {preset}, {dtype}, {name}: {spread.ms:.2f} ms, floor {floor:.2f}", flush=True)


# ---- the whole method


def models(run: Run) -> None:
    """Runs ``sparserefine benchmark`` in float16, separately for each base: a failure does not stop the others."""
    for name in run.options.models:
        run.attempt(f"model {name}", lambda name=name: _model(run, name), peer=True)  # type: ignore[misc]


def _model(run: Run, name: str) -> None:
    from sparserefine.studies.benchmark.measure import benchmark
    from sparserefine.studies.benchmark.records import BaseEntry, Settings

    sizes = {tuple(mask.shape) for mask in run.options.masks.values()}
    if len(sizes) > 1:
        raise ValueError(f"masks have {len(sizes)} different sizes, expected one; pass other --masks")
    choice: dict[str, Any] = {"size": sizes.pop()} if sizes else {}
    settings = Settings(
        bases=(BaseEntry(name),),
        presets=tuple(run.options.presets),
        masks=tuple(map(str, run.options.mask_files)),
        precision="float16",
        device=str(run.device.device),
        engine="triton",
        rounds=10,
        graph=True,
        **choice,
    )
    report = benchmark(settings, tell=lambda line: print(line, flush=True))
    run.results.add("models", report.records)
    for line in report.left_out:
        run.leave_out(line)
    for record in report.records:
        print(
            f"{record.model}, {record.preset}, {record.mask}: dense {record.dense_ms:.1f} ms, coarse + refine "
            f"{record.coarse_ms + record.refine_ms:.1f} ms",
            flush=True,
        )
