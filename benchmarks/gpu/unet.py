"""Times the sparse U-Net from mask and features to logits: engine ``triton``, eager and as a graph, and others."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.common import Job, Worker, WorkerError
from benchmarks.gpu.dense_unet import DenseUNet
from benchmarks.gpu.device import DTYPES, Device, Spread, peak_mb, precision, timed
from benchmarks.gpu.layers import Floor, floor_of, layers
from benchmarks.gpu.records import UNetRecord
from benchmarks.gpu.run import SETS, Inputs, Run, cases_of, input_sets, network_of, relative_rms
from benchmarks.sparse_unet import CHANNELS, CLASSES
from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Plan, SparseUNet
from sparserefine.sparse.plan import PlanSpec, coarser_size
from sparserefine.stages.extractor import ExtractorConfig

HEADROOM = 1.25  # capacity of a graph relative to the sites of its inputs
PEER_DTYPES = {
    "torch": ("float16", "float32"),
    "spconv": ("float16", "tf32"),
    "spconv-triton": ("float16", "tf32"),
    "dense": ("float16",),
}
LIBRARIES = {"spconv": "spconv", "spconv-triton": "spconv_triton"}
"""Module of each library that runs in its own process."""


class Network(Protocol):
    """One engine with its inputs: ``network(i)`` makes the plan and the logits of set i."""

    def __call__(self, number: int) -> Tensor:
        """``[N, K]``; N may be larger than the number of sites."""


class Packed:
    """Engine ``triton`` with packed weights, run eagerly."""

    def __init__(self, config: ExtractorConfig, sets: Sequence[Inputs], dtype: str) -> None:
        self.engine, self.sets = get_engine("triton"), sets
        self.network = network_of(config, sets[0].mask.device)
        # As in the refiner, normalisation stays float32 in half precision.
        half = DTYPES[dtype] != torch.float32
        autocast = torch.autocast(sets[0].mask.device.type, DTYPES[dtype]) if half else nullcontext()
        with autocast:
            packed = self.engine.prepare(self.network)
        assert packed is not None
        self.forward = packed

    def plan(self, number: int) -> Plan:
        """The plan of set ``number``."""
        return self.engine.plan(self.sets[number].mask, self.network.spec)

    def __call__(self, number: int) -> Tensor:
        """Logits."""
        with torch.inference_mode():
            return self.forward(self.sets[number].features, self.plan(number))


class Replayed:
    """Engine ``triton`` as one CUDA graph; each call copies its inputs into the graph's."""

    def __init__(self, config: ExtractorConfig, sets: Sequence[Inputs], dtype: str, device: Device) -> None:
        eager = Packed(config, sets, dtype)
        self._forward, self._engine, self._spec, self._sets = eager.forward, eager.engine, eager.network.spec, sets
        counts = [[len(level.sites) for level in eager.plan(i).levels] for i in range(len(sets))]
        self._capacities = capacities_of(counts)
        self._mask = sets[0].mask.clone()
        self._features = torch.zeros(self._capacities[0], CHANNELS, device=device.device)
        self._load(0)
        with torch.no_grad():  # not inference mode, after which no other graph could be recorded
            self._replay = device.record(self._step)

    def _load(self, number: int) -> None:
        chosen = self._sets[number]
        self._mask.copy_(chosen.mask)
        self._features[: len(chosen.features)].copy_(chosen.features)

    def _step(self) -> None:
        self._plan = self._engine.padded_plan(self._mask, self._spec, self._capacities)  # type: ignore[attr-defined]
        self._logits = self._forward(self._features, self._plan)

    def __call__(self, number: int) -> Tensor:
        """Logits, overwritten by the next call; rows past the number of sites are undefined."""
        with torch.inference_mode():
            self._load(number)
            self._replay()
            return self._logits

    def eager(self, number: int) -> Tensor:
        """The same computation without the graph, in other memory."""
        with torch.inference_mode():
            plan = self._engine.padded_plan(self._sets[number].mask, self._spec, self._capacities)  # type: ignore[attr-defined]
            features = torch.zeros_like(self._features)
            features[: len(self._sets[number].features)] = self._sets[number].features
            return self._forward(features, plan)

    def check_capacity(self) -> None:
        """Raises RuntimeError if the last input had more sites than the graph's capacity."""
        if any(n > capacity for n, capacity in zip(self._plan.totals.tolist(), self._capacities, strict=True)):
            raise RuntimeError(f"more sites than the graph's capacities, {self._capacities}; raise HEADROOM")


def capacities_of(counts: Sequence[Sequence[int]]) -> list[int]:
    """Capacity of each level: the most sites of any set, times ``HEADROOM``."""
    return [int(HEADROOM * max(level)) + 1 for level in zip(*counts, strict=True)]


class Modules:
    """Engine ``torch``: runs the network's own modules."""

    def __init__(self, config: ExtractorConfig, sets: Sequence[Inputs], dtype: str) -> None:
        self._engine, self._sets, self._dtype = get_engine("torch"), sets, DTYPES[dtype]
        self._network = copy.deepcopy(network_of(config, sets[0].mask.device)).to(self._dtype)

    def plan(self, number: int) -> Plan:
        """The plan of set ``number``."""
        return self._engine.plan(self._sets[number].mask, self._network.spec)

    def forward(self, features: Tensor, plan: Plan) -> Tensor:
        """Logits."""
        logits: Tensor = self._network(features.to(self._dtype), plan)
        return logits

    def __call__(self, number: int) -> Tensor:
        """Logits."""
        with torch.inference_mode():
            return self.forward(self._sets[number].features, self.plan(number))


class Dense:
    """The same layers on all pixels, channels last."""

    def __init__(
        self, config: ExtractorConfig, size: tuple[int, int], batch: int, dtype: str, device: torch.device
    ) -> None:
        network = DenseUNet(CHANNELS, CLASSES, config.planes, config.blocks, config.down)
        network.load_weights(network_of(config, torch.device("cpu")).state_dict())
        network = network.to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: Callable[[Tensor], Tensor] = network.eval()
        self._images = [
            torch.randn(batch, CHANNELS, *size, device=device)
            .to(DTYPES[dtype])
            .contiguous(memory_format=torch.channels_last)
            for _ in range(SETS)
        ]

    def compile(self) -> None:
        """Compiles the network for its inputs' shapes with torch.compile."""
        self.network = torch.compile(self.network, dynamic=False)

    def __call__(self, number: int) -> Tensor:
        """Logits ``[B, K, H, W]``."""
        with torch.inference_mode():
            return self.network(self._images[number])


def dense_counts(size: tuple[int, int], batch: int, spec: PlanSpec) -> list[int]:
    """Number of pixels at each level, full size first."""
    found = []
    height, width = size
    for _ in range(spec.levels):
        found.append(batch * height * width)
        height, width = coarser_size(height, spec.down), coarser_size(width, spec.down)
    return found


@dataclass(frozen=True)
class _Case:
    """One case, the same for all engines: inputs, and the fields of a record that do not depend on the engine."""

    preset: str
    config: ExtractorConfig
    mask: str
    size: tuple[int, int]
    batch: int
    dtype: str
    sets: list[Inputs]
    counts: list[int]
    network: SparseUNet
    floor: Floor

    def __str__(self) -> str:
        return f"{self.preset}, {self.mask}, batch {self.batch}, {self.dtype}"

    def record(
        self,
        engine: str,
        mode: str,
        spread: Spread,
        peak: float,
        difference: float | None,
        plan_ms: float | None = None,
        forward_ms: float | None = None,
    ) -> UNetRecord:
        """A record of one engine."""
        return UNetRecord(
            engine,
            self.preset,
            self.mask,
            f"{self.size[0]}x{self.size[1]}",
            self.batch,
            self.dtype,
            mode,
            self.counts[0],
            self.counts[0] / (self.batch * self.size[0] * self.size[1]),
            spread.ms,
            spread.low_ms,
            spread.high_ms,
            spread.repetitions,
            plan_ms,
            forward_ms,
            peak,
            self.network.macs_of(self.counts) / 1e9,
            self.floor.operations_ms,
            self.floor.bytes_ms,
            self.floor.ms,
            difference,
        )


def unet(run: Run) -> None:
    """Times every case, each followed by the other engines on its inputs; the dense network once for each shape."""
    seen: set[tuple[str, int, str, tuple[int, int]]] = set()
    libraries = [] if run.device.rehearsal else [peer for peer in LIBRARIES if _works(run, peer)]
    for dtype, batch, mask, preset in cases_of(run.options):
        what = f"U-Net {preset}, {mask}, batch {batch}, {dtype}"

        def measure(dtype: str = dtype, batch: int = batch, mask: str = mask, preset: str = preset) -> None:
            case = _case(run, preset, mask, batch, dtype)
            expected = _triton(run, case)
            if dtype in PEER_DTYPES["torch"]:
                run.attempt(f"torch, {case}", lambda: _torch(run, case, expected), peer=True)
            for peer in (name for name in libraries if dtype in PEER_DTYPES[name]):
                run.attempt(f"{peer}, {case}", lambda peer=peer: _spconv(run, peer, case, expected), peer=True)  # type: ignore[misc]

        run.attempt(what, measure)
        size = (run.options.masks[mask].shape[0], run.options.masks[mask].shape[1])
        if dtype in PEER_DTYPES["dense"] and (preset, batch, dtype, size) not in seen:
            seen.add((preset, batch, dtype, size))
            _dense(run, preset, size, batch, dtype)


def _case(run: Run, preset: str, mask: str, batch: int, dtype: str) -> _Case:
    config, image = run.options.presets[preset], run.options.masks[mask]
    torch.manual_seed(0)
    sets = input_sets(image, batch, run.device.device)
    network = network_of(config, torch.device("cpu"))
    counts = [len(level.sites) for level in get_engine("triton").plan(sets[0].mask, network.spec).levels]
    floor = floor_of(layers(network, counts), dtype, run.ceilings())
    size = (image.shape[0], image.shape[1])
    return _Case(preset, config, mask, size, batch, dtype, sets, counts, network, floor)


def _show(run: Run, record: UNetRecord) -> None:
    run.results.add("unet", [record])
    print(
        f"{record.engine} {record.mode}, {record.preset}, {record.mask}, batch {record.batch}, {record.dtype}: "
        f"{record.ms:.3f} ms ({record.low_ms:.3f}..{record.high_ms:.3f}), floor {record.floor_ms:.3f}",
        flush=True,
    )


def _triton(run: Run, case: _Case) -> Tensor:
    """Times engine ``triton``, eager and as a graph; returns the logits of the first set."""
    with precision(case.dtype):
        packed = Packed(case.config, case.sets, case.dtype)
        expected = packed(0).clone()
        _show(run, _eager(run.device, case, "triton", packed, None))
        del packed
        made: list[Replayed] = []
        peak = peak_mb(run.device, lambda: made.append(Replayed(case.config, case.sets, case.dtype, run.device)))
        replayed = made[0]
        difference = relative_rms(replayed(0)[: len(expected)], expected)
        spread = timed(run.device, replayed, SETS)
        replayed.check_capacity()
        _show(run, case.record("triton", "graph", spread, peak, difference))
    return expected


def _eager(device: Device, case: _Case, name: str, engine: Packed | Modules, expected: Tensor | None) -> UNetRecord:
    difference = None if expected is None else relative_rms(engine(0), expected)
    spread = timed(device, engine, SETS)
    peak = peak_mb(device, lambda: engine(0))
    with torch.inference_mode():
        plan_ms = timed(device, engine.plan, SETS).ms
        plans = [engine.plan(i) for i in range(SETS)]
        forward_ms = timed(device, lambda i: engine.forward(case.sets[i].features, plans[i]), SETS).ms
    return case.record(name, "eager", spread, peak, difference, plan_ms, forward_ms)


def _torch(run: Run, case: _Case, expected: Tensor) -> None:
    with precision(case.dtype):
        engine = Modules(case.config, case.sets, case.dtype)
        _show(run, _eager(run.device, case, "torch", engine, expected))


def _works(run: Run, peer: str) -> bool:
    """Whether a library works here. Asked once, as starting an interpreter for each case takes long."""
    job = Job("benchmarks.spconv_worker:SpconvGpu", {"library": LIBRARIES[peer]}, str(run.options.spconv_python))
    try:
        Worker(job, 1).close()
    except WorkerError as error:
        run.leave_out(f"{peer}: {error}")
        return False
    return True


def _spconv(run: Run, peer: str, case: _Case, expected: Tensor) -> None:
    """Times spconv or spconv-triton in its own process, which reads inputs and weights from files."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, weights, output = (Path(folder) / name for name in ("inputs.pt", "weights.pt", "output.pt"))
        torch.save([(one.mask.cpu(), one.features.cpu()) for one in case.sets], inputs)
        torch.save(case.network.state_dict(), weights)
        setup: dict[str, Any] = {
            "library": LIBRARIES[peer],
            "inputs": str(inputs),
            "weights": str(weights),
            "channels": CHANNELS,
            "classes": CLASSES,
            "planes": list(case.config.planes),
            "blocks": case.config.blocks,
            "down": case.config.down,
            "dtype": case.dtype,
        }
        job = Job("benchmarks.spconv_worker:SpconvGpuTask", setup, str(run.options.spconv_python))
        worker = Worker(job, 1)
        try:
            worker.ask("start")
            laps = worker.ask("round")["laps"]
            worker.ask("save", path=str(output))
            peak = worker.ask("details")["details"]["gpu_peak_mb"]
        finally:
            worker.close()
        logits = torch.load(output, weights_only=True).to(expected)
    _show(run, case.record(peer, "eager", Spread.of(laps), peak, relative_rms(logits, expected)))


def _dense(run: Run, preset: str, size: tuple[int, int], batch: int, dtype: str) -> None:
    """Times the dense network, eager; also compiled, but only for the first batch size, as compiling takes long."""
    device, config = run.device, run.options.presets[preset]
    network = network_of(config, torch.device("cpu"))
    counts = dense_counts(size, batch, network.spec)
    floor = floor_of(layers(network, counts), dtype, run.ceilings(), tables=False)
    case = _Case(preset, config, "all", size, batch, dtype, [], counts, network, floor)

    def measure(compiled: bool) -> None:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with precision(dtype):
                dense = Dense(config, size, batch, dtype, device.device)
                if compiled:
                    dense.compile()
                spread = timed(device, dense, SETS)
                mode = "compiled" if compiled else "eager"
                _show(run, case.record("dense", mode, spread, peak_mb(device, lambda: dense(0)), None))
        finally:
            torch.backends.cudnn.benchmark = before

    run.attempt(f"dense, {case}", lambda: measure(False), peer=True)
    if batch == run.options.batches[0] and not device.rehearsal:
        run.attempt(f"dense, compiled, {case}", lambda: measure(True), peer=True)
