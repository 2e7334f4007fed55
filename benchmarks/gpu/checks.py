"""Checks that run before anything is timed: kernels at full size against float64 and the torch engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.device import DTYPES, precision
from benchmarks.gpu.layers import Layer, distinct, layers, stencil_of, table_arguments
from benchmarks.gpu.records import Check
from benchmarks.gpu.run import Run, UncertaintyCase, input_sets, network_of, relative_rms
from benchmarks.gpu.unet import Packed, Replayed, capacities_of
from sparserefine.engines.choose import get_engine
from sparserefine.engines.reference.geometry import build_plan
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import sample, uncertainty
from sparserefine.sparse import Engine, PaddedPlan, PaddedSites, Plan, Sites, Stencil, conv
from sparserefine.stages.extractor import ExtractorConfig

ROWS = 2000  # output rows of each convolution that are recomputed in float64
BOUNDS = {"float16": 2e-3, "bfloat16": 1e-2, "tf32": 2e-3, "float32": 1e-5}
"""Largest relative rms error of one convolution."""
NETWORK_BOUNDS = {"float16": 2e-2, "bfloat16": 1e-1, "tf32": 1e-2, "float32": 1e-4}
"""Largest relative rms error of a whole network."""
TIE, ENTROPY_BOUND = 1e-5, 1e-4  # largest margin of labels that may differ; largest error of entropies [nats]


def checks(run: Run) -> list[Check]:
    """Runs all checks and prints those that fail."""
    found: list[Check] = []
    seed = 0 if run.device.rehearsal else torch.seed()
    torch.manual_seed(seed)
    print(f"checks: inputs of seed {seed}", flush=True)
    for name, group in _groups(run):
        try:
            new = list(group)
            run.device.wait()
        except Exception as error:  # a kernel that does not compile or run counts as wrong
            new = [Check(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", None, 0.0, False)]
        found += new
        run.results.add("checks", new)
        bad = [check for check in new if not check.ok]
        print(f"checks: {name}: {len(new)}, {len(bad)} wrong", flush=True)
        for check in bad:
            print(f"  WRONG {check.name}: error {check.error}, bound {check.bound:g}", flush=True)
    return found


def compared(name: str, error: float, bound: float) -> Check:
    """A check that passes if ``error`` is at most ``bound``; NaN never passes."""
    return Check(name, error if math.isfinite(error) else None, bound, error <= bound)


def _groups(run: Run) -> Iterator[tuple[str, Iterator[Check]]]:
    options = run.options
    for case in options.cases:
        yield f"uncertainty, {case}", _uncertainty(case, run.device.device)
    if not options.masks:
        return
    for preset, config in options.presets.items():
        for batch in sorted({1, *options.batches}):
            yield f"{preset}, batch {batch}: tables", _tables(run, preset, config, batch)
        for dtype in options.dtypes:
            yield f"{preset}, {dtype}: convolutions", _convolutions(run, preset, config, dtype)
            yield f"{preset}, {dtype}: network", _networks(run, preset, config, dtype)


# ---- plans


def _tables(run: Run, preset: str, config: ExtractorConfig, batch: int) -> Iterator[Check]:
    """Plain and padded plans equal the reference in every entry."""
    device = run.device.device
    mask = input_sets(run.first_mask()[1], batch, device, 1)[0].mask
    spec, engine = network_of(config, torch.device("cpu")).spec, get_engine("triton")
    expected = build_plan(Sites.from_mask(mask), spec)
    counts = [len(level.sites) for level in expected.levels]
    capacities = capacities_of([counts])
    padded = engine.padded_plan(mask, spec, capacities)  # type: ignore[attr-defined]
    for name, actual in (("plan", engine.plan(mask, spec)), ("padded plan", padded)):
        for depth, wrong in enumerate(_differences(actual, expected)):
            yield compared(f"{preset}, batch {batch}, {name}, level {depth}: entries that differ", wrong, 0)
    yield compared(f"{preset}, batch {batch}, padded plan: counts", float(padded.totals.tolist() != counts), 0)


def _differences(actual: Plan | PaddedPlan, expected: Plan) -> Iterator[float]:
    counts = [len(level.sites) for level in expected.levels]
    for depth, (ours, theirs) in enumerate(zip(actual.levels, expected.levels, strict=True)):
        n = counts[depth]
        sites = ours.sites.rows if isinstance(ours.sites, PaddedSites) else ours.sites
        wrong = _num_different(sites.coords[:n], theirs.sites.coords)
        wrong += _num_different(_clamped(ours.around.table, n, n), theirs.around.table)
        if theirs.down is not None:
            assert ours.down is not None
            coarser = counts[depth + 1]
            wrong += _num_different(_clamped(ours.down.table, coarser, n), theirs.down.table)
            wrong += _num_different(_clamped(ours.down.reverse, n, coarser), theirs.down.reverse)
        yield wrong


def _clamped(table: Tensor, rows: int, inputs: int) -> Tensor:
    """The rows in use, with every "no neighbour" entry set to ``inputs``."""
    return table[:rows].clamp(max=inputs)


def _num_different(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return float((actual != expected).sum())


# ---- convolutions


def _convolutions(run: Run, preset: str, config: ExtractorConfig, dtype: str) -> Iterator[Check]:
    engine, device = get_engine("triton"), run.device.device
    network = network_of(config, torch.device("cpu"))
    mask = input_sets(run.first_mask()[1], 1, device, 1)[0].mask
    tables = engine.plan(mask, network.spec)
    with precision(dtype):
        for layer in distinct(layers(network, [len(level.sites) for level in tables.levels])):
            stencil = stencil_of(layer, tables)
            if not stencil.num_inputs or not stencil.num_outputs:
                continue
            name = f"{preset}, {dtype}, {layer.kind} {layer.depth}, {layer.c_in} -> {layer.c_out}"
            yield compared(f"{name}: values", _value_error(layer, stencil, dtype), BOUNDS[dtype])
            if layer.kind != "own":
                errors, same = _gradient_errors(layer, stencil, dtype)
                for what, error in errors.items():
                    yield compared(f"{name}: gradient of {what}", error, BOUNDS[dtype])
                yield compared(f"{name}: gradients of two runs, bits that differ", 1.0 - same, 0)


def _operands(layer: Layer, stencil: Stencil, dtype: str) -> tuple[Tensor, Tensor]:
    device, kind = stencil.table.device, DTYPES[dtype]
    x = torch.randn(layer.rows_in, layer.c_in, device=device).to(kind)
    weight = torch.randn(layer.kernel, layer.c_in, layer.c_out, device=device) / math.sqrt(layer.kernel * layer.c_in)
    return x, weight.to(kind)


def _value_error(layer: Layer, stencil: Stencil, dtype: str) -> float:
    """Error of the kernel with residual, bias and activation: random rows against float64. Outputs start as NaN."""
    from sparserefine.engines.triton import convolution
    from sparserefine.sparse.epilogue import Activation, Epilogue

    x, weight = _operands(layer, stencil, dtype)
    device, n, c = x.device, layer.rows_out, layer.c_out
    residual = torch.randn(n, c, device=device).to(x.dtype)
    bias, scale, shift = torch.randn(3, c, device=device).unbind()
    raw = torch.full((n, c), torch.nan, dtype=torch.float32 if layer.float_out else x.dtype, device=device)
    active = torch.full((n, c), torch.nan, dtype=x.dtype, device=device)
    epilogue = Epilogue(residual, bias, raw, (Activation(active, scale, shift),))
    convolution.convolve(x, convolution.laid_out(weight), epilogue, n, **table_arguments(layer, stencil))  # type: ignore[arg-type]
    if not bool(raw.isfinite().all() & active.isfinite().all()):
        return math.nan
    rows = torch.randint(n, (min(ROWS, n),), device=device)
    table = rows[:, None] if layer.kind == "own" else stencil.table[rows]
    expected = _rows_of(x, weight, table) + residual[rows].double() + bias.double()
    activated = (expected * scale.double() + shift.double()).clamp(min=0)
    return max(relative_rms(raw[rows], expected), relative_rms(active[rows], activated))


def _rows_of(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Some output rows by the definition, ``float64 [rows, C_out]``."""
    known = table < len(x)
    read = x[table.long().clamp(max=len(x) - 1)].double() * known[..., None]
    return torch.einsum("ntc,tcd->nd", read, weight.double())


def _gradient_errors(layer: Layer, stencil: Stencil, dtype: str) -> tuple[dict[str, float], bool]:
    """Errors of both gradients against float64, computed from the table; and whether two runs are bit-identical."""
    x, weight = (operand.requires_grad_() for operand in _operands(layer, stencil, dtype))
    grad = torch.randn(layer.rows_out, layer.c_out, device=x.device).to(x.dtype)
    first, second = (torch.autograd.grad(conv(x, weight, stencil), (x, weight), grad) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact, back = x.detach().double(), grad.double()
    grad_x = exact.new_zeros(len(x) + 1, layer.c_in)  # the last row collects missing neighbours
    grad_weight = []
    for t in range(stencil.taps):
        source = stencil.table[:, t].long().clamp(max=len(x))
        grad_x.index_add_(0, source, back @ weight[t].detach().double().t())
        known = (source < len(x))[:, None]
        grad_weight.append((exact[source.clamp(max=len(x) - 1)] * known).t() @ back)
    return {
        "features": relative_rms(first[0], grad_x[:-1]),
        "weight": relative_rms(first[1], torch.stack(grad_weight)),
    }, same


# ---- networks


def _networks(run: Run, preset: str, config: ExtractorConfig, dtype: str) -> Iterator[Check]:
    device, name = run.device, f"{preset}, {dtype}"
    for batch in sorted({1, *run.options.batches}):
        sets = input_sets(run.first_mask()[1], batch, device.device, 2)
        expected = _reference(config, sets[0].mask, sets[0].features)
        with precision(dtype):
            packed = Packed(config, sets, dtype)
            replayed = Replayed(config, sets, dtype, device)
            logits = packed(0)
            what = f"{name}, batch {batch}"
            yield compared(f"{what}: network", relative_rms(logits, expected), NETWORK_BOUNDS[dtype])
            yield _same(f"{what}: two runs", lambda packed=packed: packed(0), logits)  # type: ignore[misc]
            for i in (1, 0):  # the graph was recorded with set 0, so replay other inputs first
                # Capacity can change how sums are split, so the graph is compared at its own capacity.
                expected = replayed.eager(i)[: len(packed.sets[i].features)]
                yield _same(f"{what}: graph, set {i}", lambda replayed=replayed, i=i: replayed(i), expected)  # type: ignore[misc]
        del packed, replayed


def _same(name: str, compute: Callable[[], Tensor], expected: Tensor) -> Check:
    actual = compute()[: len(expected)]
    return compared(f"{name}, logits that differ", float((actual != expected).sum()), 0)


def _reference(config: ExtractorConfig, mask: Tensor, features: Tensor) -> Tensor:
    """Logits of the torch engine in full float32."""
    network = network_of(config, mask.device)
    with precision("float32"), torch.no_grad():
        logits: Tensor = network(features, get_engine("torch").plan(mask, network.spec))
    return logits


# ---- uncertainty


@torch.inference_mode()
def _uncertainty(case: UncertaintyCase, device: torch.device) -> Iterator[Check]:
    engine: Engine = get_engine("triton")
    for batch in (1, 2):
        logits = 4 * torch.randn(batch, case.classes, *case.coarse, device=device)
        coarse = Coarse(logits, case.full)
        expected, exact = uncertainty(coarse)
        labels, entropy = engine.uncertainty(coarse)
        name = f"uncertainty, {case}, batch {batch}"
        yield compared(f"{name}: entropy, largest difference", float((entropy - exact).abs().max()), ENTROPY_BOUND)
        places = (labels != expected).nonzero().int()
        margin = 0.0
        if len(places):
            at = tuple(places.long().unbind(1))
            values = sample(coarse, places)
            ours, theirs = (values.gather(1, chosen[at].long()[:, None]) for chosen in (labels, expected))
            margin = float((ours - theirs).abs().max())
        yield compared(f"{name}: labels, largest margin between those that differ", margin, TIE)
