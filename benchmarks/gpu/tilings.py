"""Finds the fastest tiling for each convolution of a preset, to tune the engine's fixed table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.device import DTYPES, precision, timed_in_graph
from benchmarks.gpu.layers import Layer, distinct, floor_of, layers, stencil_of, table_arguments
from benchmarks.gpu.records import TilingRecord
from benchmarks.gpu.run import SETS, Run, input_sets, network_of
from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Plan

if TYPE_CHECKING:
    from sparserefine.engines.triton.convolution import Tiling

_BLOCKS = ((32, 128), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
"""Rows and columns of a block."""
_FEW_PROGRAMS, _MANY_PROGRAMS = 264, 1000
"""With at most ``_FEW_PROGRAMS`` (two for each multiprocessor of an H100), splitting the sums is tried too, as long as
there are at most ``_MANY_PROGRAMS``."""
_SHARES = (2, 3, 4, 6, 8)
_SHARED_TERMS = 1024
"""Least number of terms (taps times channels) of a sum that is split."""


def tilings(run: Run) -> None:
    """Times every distinct convolution of every preset on the first mask, in every dtype."""
    if not run.options.masks:
        return
    for preset, config in run.options.presets.items():
        network = network_of(config, torch.device("cpu"))
        mask = input_sets(run.first_mask()[1], 1, run.device.device, 1)[0].mask
        tables = get_engine("triton").plan(mask, network.spec)
        found = layers(network, [len(level.sites) for level in tables.levels])
        alike = Counter((one.kind, one.depth, one.c_in, one.c_out) for one in found)
        for dtype in run.options.dtypes:
            for layer in distinct(found):
                count = alike[layer.kind, layer.depth, layer.c_in, layer.c_out]
                what = f"tilings, {preset}, {dtype}, {layer.kind} {layer.depth}, {layer.c_in} -> {layer.c_out}"
                run.attempt(
                    what,
                    lambda preset=preset, dtype=dtype, layer=layer, count=count, tables=tables: _measure(  # type: ignore[misc]
                        run, preset, dtype, layer, count, tables
                    ),
                )


def candidates(layer: Layer, dtype: str) -> list[Tiling]:
    """Tilings that may be fast, no wider than the channels. The list is short: each takes a second to compile."""
    from sparserefine.engines.triton.convolution import Tiling

    def fitting(count: int, most: int) -> int:
        return min(most, max(16, 1 << (count - 1).bit_length()))

    depth = fitting(layer.c_in, 64 if DTYPES[dtype].itemsize == 2 else 32)
    found: dict[Tiling, None] = {}
    for rows, columns in _BLOCKS:
        columns = fitting(layer.c_out, columns)
        area = rows * columns
        if dtype == "float32" and area > 64 * 128:
            continue  # without tensor cores a thread holds its part of the sums twice
        for warps in (4, 8) if area == 128 * 128 else (8,) if area > 128 * 128 else (4,):
            for ahead in (2, 3):
                found[Tiling(rows, columns, depth, warps, ahead)] = None
                programs = -(-layer.rows_out // rows) * -(-layer.c_out // columns)
                if (
                    layer.kind in ("around", "down")
                    and programs <= _FEW_PROGRAMS
                    and layer.kernel * layer.c_in >= _SHARED_TERMS
                ):
                    for shares in (n for n in _SHARES if programs * n <= _MANY_PROGRAMS):
                        found[Tiling(rows, columns, depth, warps, ahead, shares)] = None
    return list(found)


def _measure(run: Run, preset: str, dtype: str, layer: Layer, count: int, tables: Plan) -> None:
    from sparserefine.engines.triton import convolution

    device, kind = run.device.device, DTYPES[dtype]
    stencil = stencil_of(layer, tables)
    weight = torch.randn(layer.kernel, layer.c_in, layer.c_out, device=device).to(kind)
    x = [torch.randn(layer.rows_in, layer.c_in, device=device).to(kind) for _ in range(SETS)]
    raw = [torch.empty(layer.rows_out, layer.c_out, dtype=kind, device=device) for _ in range(SETS)]
    with precision(dtype):
        ready = convolution.laid_out(weight)
        taps = layer.kernel if layer.kind in ("around", "down") else 0
        own = convolution.tiling(layer.rows_out, layer.c_in, layer.c_out, kind, convolution.precision_of(kind), taps)

        def once(i: int) -> None:
            epilogue = convolution.Epilogue(raw=raw[i])
            convolution.convolve(x[i], ready, epilogue, layer.rows_out, **table_arguments(layer, stencil))  # type: ignore[arg-type]

        choices = [own, *(one for one in candidates(layer, dtype) if one != own)]
        times: dict[str, float] = {}
        for choice in choices[:2] if run.device.rehearsal else choices:
            try:
                with _chosen(choice):
                    times[_name(choice)] = timed_in_graph(run.device, once, SETS).ms
            except Exception as error:  # it needs more shared memory or registers than there are
                if choice == own:
                    raise
                print(f"  {_name(choice)}: {type(error).__name__}", flush=True)
    best = min(times, key=lambda name: times[name])
    floor = floor_of([layer], dtype, run.ceilings())
    record = TilingRecord(
        *(preset, layer.kind, layer.depth, layer.rows_out, layer.c_in, layer.c_out, layer.kernel, dtype, count),
        *(_name(own), times[_name(own)], best, times[best], floor.ms, times),
    )
    run.results.add("tilings", [record])
    print(
        f"{preset}, {dtype}, {layer.kind} {layer.depth}: {layer.rows_out} rows, {layer.c_in} -> {layer.c_out}, "
        f"{count} layers: own {record.own} {record.own_ms:.4f} ms, best {best} {record.best_ms:.4f}, "
        f"floor {record.floor_ms:.4f}",
        flush=True,
    )


@contextmanager
def _chosen(choice: Tiling) -> Iterator[None]:
    """Context in which convolutions use this tiling instead of the table's."""
    from sparserefine.engines.triton import convolution

    def always(*_: Any) -> Tiling:
        return choice

    before = convolution.tiling
    convolution.tiling = always  # type: ignore[assignment]
    try:
        yield
    finally:
        convolution.tiling = before


def _name(tiling: Tiling) -> str:
    """Rows x columns x depth, warps, blocks loaded ahead, and into how many shares sums are split."""
    shares = f" s{tiling.shares}" if tiling.shares > 1 else ""
    return f"{tiling.rows}x{tiling.columns}x{tiling.depth} w{tiling.warps} a{tiling.ahead}{shares}"
