"""``sparserefine benchmark``: what refinement costs and saves for a model, measured end to end.

For each base and each runtime three things are timed in turn:

- dense: the base on the whole image, normalisation included, and labels;
- coarse: the base on the downsized image, antialiased resize and normalisation included;
- refine: every stage after the base, from its coarse logits to labels.

Random weights do, for time does not depend on them. What they select does not resemble anything, though, so the sites
are given: by mask files, by :func:`synthetic_mask`, or both. The selector works all the same, see :class:`GivenSites`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.util
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.onnx import OnnxModel
from sparserefine.bases.loaded import LoadedModel, tensor_of
from sparserefine.bases.runtimes import NEEDS
from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.machine.device import device_named, on_gpu_in
from sparserefine.machine.memory import PeakMemory
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Engine, calibrating
from sparserefine.stages.extractor import PRESETS
from sparserefine.stages.refinement import Refinement
from sparserefine.studies.benchmark.inputs import RANDOM_MODELS, GivenSites, random_model, read_mask, synthetic_mask
from sparserefine.studies.benchmark.records import DENSITIES, BaseEntry, Record, Report, Settings, size_text
from sparserefine.studies.evaluate import dense_labels


@torch.no_grad()
def benchmark(
    settings: Settings,
    *,
    seen: Callable[[Report], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Measures every base with every runtime, one after the other.

    In each round dense, coarse and every refinement have their turn, so that a disturbance of the machine hits a round
    of all of them and not all rounds of one. One run of each before the rounds is not timed, nor is another one in
    which memory is watched.

    Peak memory of dense and coarse is what they need beyond the loaded base; what a runtime keeps for itself (its own
    weights, its pool) counts. Peak memory of refine is what its stages need beyond the loaded networks and the
    extractor's packed weights, which are reported apart; memory that an engine keeps for features counts.

    A GPU computes the base's convolutions in full float32, as the refiner's, not in TF32. Another precision is that of
    both there (the refiner's by autocast), on the CPU the base's alone.

    Dense labels are made by the quickest code there is here: the CPU engine's single pass (which also gives entropies
    and is faster all the same), otherwise interpolation and argmax.

    Args:
        settings: what is measured.
        seen: called after each base with all that was measured so far.
        tell: called with a line whenever something begins that may take long, or is left out.

    Raises:
        ValueError: before anything is measured: unknown names, masks of another size, a base that cannot be loaded, a
            runtime other than torch on a GPU.
        ImportError: a package is missing; the message says which.
    """
    tell = tell or (lambda line: None)
    device = device_named(settings.device)
    engine = get_engine(settings.engine).on(device)
    others = [runtime for runtime in settings.runtimes if runtime != "torch"]
    if others and device.type != "cpu":
        raise ValueError(f"{', '.join(others)} run on the CPU, the device is {device}; choose --device cpu")
    if settings.graph and engine.name != "triton":
        raise ValueError(f"a CUDA graph needs a GPU and engine 'triton', this is {engine.name!r} on {device}")
    _check_packages(settings)
    masks = _masks(settings)
    for entry in settings.bases:
        if entry.name not in RANDOM_MODELS:
            _load(entry, settings)  # what cannot be loaded should say so now, not after an hour
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        report = Report(settings, machine(device, engine))
        for runtime in others:
            tell(f"{runtime}: loading")
            _load_runtime(runtime)
        for entry in settings.bases:
            records, left_out = _Base(entry, settings, masks, device, engine, report.machine, tell).measure()
            report = Report(settings, report.machine, (*report.records, *records), (*report.left_out, *left_out))
            gc.collect()  # the next base may need all the memory
            if seen:
                seen(report)
        return report
    finally:
        threads, torch.backends.cudnn.allow_tf32 = before
        torch.set_num_threads(threads)


def machine(device: torch.device, engine: Engine) -> str:
    """Processor, the widest instructions torch uses on it, torch's version, the GPU."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    parts = [name, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    if isinstance(engine, CpuEngine):
        parts.append(f"kernels {engine.kernels.library.name}")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Mask:
    """Sites to refine: where they come from, and the map that :class:`GivenSites` reads."""

    name: str
    entropy: Tensor
    sites: int


def _masks(settings: Settings) -> list[_Mask]:
    densities = settings.densities
    if densities is None:
        densities = () if settings.masks else DENSITIES
    masks = [(Path(path).stem, read_mask(path, settings.size)) for path in settings.masks]
    masks += [("synthetic", synthetic_mask(settings.size, density)) for density in densities]
    return [_Mask(name, mask[None].float(), int(mask.sum())) for name, mask in masks]


def _check_packages(settings: Settings) -> None:
    wanted = {r: (NEEDS[r], r) for r in settings.runtimes if r in NEEDS}
    for name in (b.name for b in settings.bases):
        if name.startswith("segformer_"):
            wanted[name] = ("transformers",), "hf"
        elif name.startswith("mask2former_"):
            wanted[name] = ("transformers", "scipy"), "hf"
    for what, (packages, extra) in wanted.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            cure = f"`pip install 'sparserefine[{extra}]'` brings it"
            raise ImportError(f"{what} needs {' and '.join(missing)}, not installed here; {cure}")


def _load(entry: BaseEntry, settings: Settings) -> LoadedModel:
    if entry.name in RANDOM_MODELS:
        return random_model(entry.name, settings.classes)
    from sparserefine.bases.load import load_model

    try:
        return load_model(entry.name, settings.classes)
    except ValueError as error:
        if ":" in entry.name:
            raise
        raise ValueError(f"{error}; with random weights: {', '.join(RANDOM_MODELS)}") from error


def _load_runtime(name: Any) -> None:
    """Runs next to nothing: what the libraries keep from their first model on is not to count as that model's."""
    with suppress(Exception):  # what does not work here is told of the bases that it cannot run
        tiny = LoadedModel(nn.Conv2d(3, 2, 1), 2)
        FrozenBase(tiny, config=BaseConfig(ratio=1.0, runtime=name))(torch.zeros(1, 3, 8, 8))


class _Clock:
    """Something that is run again and again, and what is known of it."""

    def __init__(self, run: Callable[[], dict[str, float]]) -> None:
        self._run = run
        self.rounds: list[dict[str, float]] = []
        self.peak_mb = 0.0

    def watch_memory(
        self, device: torch.device, *, keeps: bool = False, clear: Callable[[], None] | None = None
    ) -> None:
        """One run that does not count, and one for the memory.

        Args:
            device: where it runs.
            keeps: what the first run leaves behind counts.
            clear: frees what the first run left behind, so that the second one needs it anew.
        """
        _trim()
        process = psutil.Process()
        before = process.memory_info().rss
        self._run()
        if clear:
            clear()
        _trim()
        kept = max(0, process.memory_info().rss - before) / 1e6 if keeps and device.type == "cpu" else 0.0
        with PeakMemory(device) as memory:
            self._run()
        self.peak_mb = memory.megabytes + kept

    def round(self) -> None:
        """One that counts."""
        self.rounds.append(self._run())

    def median(self, key: str = "ms") -> float:
        """Median over the rounds [ms]."""
        return median(one[key] for one in self.rounds)


class _Base:
    """All that is measured of one base."""

    def __init__(
        self,
        entry: BaseEntry,
        settings: Settings,
        masks: Sequence[_Mask],
        device: torch.device,
        engine: Engine,
        machine: str,
        tell: Callable[[str], None],
    ) -> None:
        self._entry, self._settings, self._masks = entry, settings, masks
        self._device, self._engine, self._machine, self._tell = device, engine, machine, tell
        self._coarse_size = settings.coarse_size(entry)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (1, 3, *settings.size), generator=generator, dtype=torch.uint8)
        self._image = pixels.to(device)

    def measure(self) -> tuple[list[Record], list[str]]:
        """Records, and a line for each runtime that is left out."""
        records: list[Record] = []
        left_out: list[str] = []
        name = self._entry.name
        try:
            self._tell(f"{name}: loading")
            self._prepare()
        except Exception as error:  # whatever a foreign model does, the others are to be measured
            left_out.append(f"{name} is left out: {_one_line(error)}")
            self._tell(left_out[-1])
            return records, left_out
        for runtime in self._runtimes():
            try:
                records += self._with_runtime(runtime)
            except Exception as error:
                left_out.append(f"{name} with runtime {runtime} is left out: {_one_line(error)}")
                self._tell(left_out[-1])
            gc.collect()  # what exporters and runtimes leave in cycles
        return records, left_out

    def _prepare(self) -> None:
        settings = self._settings
        loaded = self._loaded = _load(self._entry, settings)
        if isinstance(loaded.model, nn.Module):
            loaded.model.eval().to(self._device)
        self._classes = loaded.num_classes or self._count_classes()
        coarse = self._frozen(BaseConfig(self._entry.name, size=self._coarse_size))
        dense = self._frozen(BaseConfig(self._entry.name, size=settings.size))
        # Counted before parameters change their type: the counter feeds float32.
        self._macs = {"dense": dense.macs(*settings.size), "coarse": coarse.macs(*settings.size)}
        if isinstance(loaded.model, nn.Module):
            loaded.model.to(getattr(torch, settings.precision))
        elif settings.precision != "float32":
            raise ValueError(f"precision {settings.precision} needs a torch module, this is {type(loaded.model)}")
        self._refiners: dict[str, SparseRefiner] = {}
        for plan in settings.plans:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                refiner = SparseRefiner(coarse, extractor=PRESETS[plan], engine=settings.engine)
            self._refiners[plan] = refiner.eval().to(self._device)

    def _count_classes(self) -> int:
        """K of a model that does not tell, by what it returns."""
        x = torch.zeros(1, 3, *self._coarse_size, device=self._device)
        return tensor_of(self._loaded.model(x), self._entry.name).shape[1]

    def _frozen(self, config: BaseConfig) -> FrozenBase:
        loaded = self._loaded
        if isinstance(loaded.model, OnnxModel):  # with a session of its own, so that each size shows what it needs
            loaded = replace(loaded, model=copy.deepcopy(loaded.model))
        return FrozenBase(loaded, self._classes, config)

    def _runtimes(self) -> list[str]:
        """What runs this base: ``torch`` stands for the model as it is, which need not be a torch module."""
        model = self._loaded.model
        if isinstance(model, nn.Module):
            return list(self._settings.runtimes)
        as_it_is = "onnxruntime" if isinstance(model, OnnxModel) else "own"
        return list(dict.fromkeys(as_it_is if name == "torch" else name for name in self._settings.runtimes))

    def _with_runtime(self, runtime: str) -> list[Record]:
        settings, device, image = self._settings, self._device, self._image
        # An ONNX file needs nobody else to run it by ONNX Runtime.
        itself = runtime in ("torch", "own") or (runtime == "onnxruntime" and isinstance(self._loaded.model, OnnxModel))
        chosen: Any = None if itself else runtime
        name = self._entry.name
        dense_base = self._frozen(BaseConfig(name, size=settings.size, runtime=chosen))
        coarse_base = self._frozen(BaseConfig(name, size=self._coarse_size, runtime=chosen))
        logits: list[Tensor] = []

        def dense() -> dict[str, float]:
            start = self._now()
            dense_labels(self._engine, dense_base(image), settings.size, dense_base.outputs)
            return {"ms": self._now() - start}

        def coarse() -> dict[str, float]:
            start = self._now()
            logits[:] = [coarse_base(image)]
            return {"ms": self._now() - start}

        def refine(refiner: SparseRefiner, selector: GivenSites) -> dict[str, float]:
            refiner.selector = selector
            start = self._now()
            with on_gpu_in(settings.precision, device):
                refinement = refiner.refine(image, logits[0])
            middle = self._now()
            refinement.labels()
            end = self._now()
            return {**refinement.timings_ms, "labels": end - middle, "ms": end - start, "macs": _macs(refinement)}

        clocks = {"dense": _Clock(dense), "coarse": _Clock(coarse)}
        for which, clock in clocks.items():
            self._tell(f"{name}, {runtime}: {which}, untimed run and memory")
            clock.watch_memory(device, keeps=runtime != "torch")
        refined: dict[tuple[str, int], _Clock] = {}
        packed_mb: dict[str, float | None] = {}
        for plan, refiner in self._refiners.items():
            self._tell(f"{name}, {runtime}: refinement with {plan}, untimed run and memory")
            if self._engine.name == "cpu-int8":
                self._calibrate(refiner, logits[0])
            packed = refiner.engine.on(device).prepare(refiner.extractor)
            packed_mb[plan] = getattr(packed, "megabytes", None)
            for number, mask in enumerate(self._masks):
                selector = GivenSites(threshold=0.5, entropy=mask.entropy.to(device))
                if settings.graph:
                    refined[plan, number] = self._recorded(refiner, selector, logits[0])
                    continue
                refined[plan, number] = _Clock(lambda refiner=refiner, selector=selector: refine(refiner, selector))  # type: ignore[misc]
            # The densest mask last: it leaves memory that is large enough for all, which the timed rounds find.
            for number in sorted(range(len(self._masks)), key=lambda number: self._masks[number].sites):
                if not settings.graph:
                    refined[plan, number].watch_memory(device, clear=getattr(packed, "clear", None))
        for number in range(settings.rounds):
            self._tell(f"{name}, {runtime}: round {number + 1} of {settings.rounds}")
            for clock in (*clocks.values(), *refined.values()):
                clock.round()
        return [
            self._record(runtime, plan, self._masks[number], clocks, clock, packed_mb[plan])
            for (plan, number), clock in refined.items()
        ]

    def _recorded(self, refiner: SparseRefiner, selector: GivenSites, logits: Tensor) -> _Clock:
        """The refinement as a graph. Its memory is what the recording took: it is kept."""
        image, refiner.selector = self._image, selector
        with on_gpu_in(self._settings.precision, self._device), PeakMemory(self._device) as memory:
            captured = refiner.capture(image, logits)
        macs = _macs(captured.refine(image, logits))

        def replay() -> dict[str, float]:
            refiner.selector = selector
            start = self._now()
            captured.labels(image, logits)
            ms = self._now() - start
            return {"graph": ms, "ms": ms, "macs": macs}

        clock = _Clock(replay)
        clock.peak_mb = memory.megabytes
        return clock

    def _calibrate(self, refiner: SparseRefiner, logits: Tensor) -> None:
        """8-bit arithmetic needs to know how large activations get."""
        densest = max(self._masks, key=lambda mask: mask.sites)
        refiner.selector = GivenSites(threshold=0.5, entropy=densest.entropy.to(self._device))
        with calibrating(refiner.extractor):
            refiner.refine(self._image, logits)

    def _record(
        self,
        runtime: str,
        plan: str,
        mask: _Mask,
        base: dict[str, _Clock],
        refine: _Clock,
        packed_mb: float | None,
    ) -> Record:
        settings, dense, coarse = self._settings, base["dense"], base["coarse"]
        height, width = settings.size
        dense_ms, coarse_ms, refine_ms = (clock.median() for clock in (dense, coarse, refine))
        stages = [key for key in refine.rounds[0] if key not in ("ms", "macs")]
        gmacs = {key: None if value is None else value / 1e9 for key, value in self._macs.items()}
        return Record(
            model=self._entry.name,
            size=size_text(settings.size),
            density=mask.sites / (height * width),
            plan=plan,
            engine=self._engine.name,
            threads=torch.get_num_threads(),
            dense_ms=dense_ms,
            coarse_ms=coarse_ms,
            refine_ms=refine_ms,
            ratio=dense_ms / (coarse_ms + refine_ms),
            runtime=runtime,
            precision=settings.precision,
            device=str(self._device),
            coarse_size=size_text(self._coarse_size),
            mask=mask.name,
            sites=mask.sites,
            classes=self._classes,
            stages_ms={stage: refine.median(stage) for stage in stages},
            dense_gmacs=gmacs["dense"],
            coarse_gmacs=gmacs["coarse"],
            refine_gmacs=refine.rounds[0]["macs"] / 1e9,
            dense_peak_mb=dense.peak_mb,
            coarse_peak_mb=coarse.peak_mb,
            refine_peak_mb=refine.peak_mb,
            packed_mb=packed_mb,
            rounds=settings.rounds,
            machine=self._machine,
            mode="graph" if settings.graph else "eager",
        )

    def _now(self) -> float:
        """Milliseconds; what the device was asked to do is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * time.perf_counter()


def _macs(refinement: Refinement) -> float:
    """Multiply-accumulates after the base."""
    return float(sum(value or 0 for stage, value in refinement.macs.items() if stage != "base"))


def _trim() -> None:
    """Garbage, and free memory that the C library keeps for later, would hide what the next run needs."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    if len(words) > 300:
        words = words[:300] + " ..."
    return words if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {words}"
