"""``sparserefine benchmark``: times a model with and without refinement, end to end.

For each base and runtime, three things are timed in turn:

- dense: the base on the full-resolution image, with normalisation and labels;
- coarse: the base on the downsized image, with antialiased resize and normalisation;
- refine: all stages after the base, from its coarse logits to labels.

Random weights suffice, because time does not depend on them. But the pixels that they would select are not realistic,
so the sites are given: by mask files, by :func:`synthetic_mask`, or both. The selector still does all its work, see
:class:`GivenSites`.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.onnx import OnnxModel
from sparserefine.bases.loaded import LoadedModel, tensor_of
from sparserefine.bases.runtimes import NEEDS
from sparserefine.engines.choose import EngineChoice
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.files.text import printable
from sparserefine.images.normalisation import default_normalisation
from sparserefine.machine.device import device_named, gpu_precision
from sparserefine.machine.memory import PeakMemory
from sparserefine.machine.timing import now_ms
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Engine, calibrating
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import PRESETS
from sparserefine.stages.refinement import Refinement
from sparserefine.studies.benchmark.clock import Clock
from sparserefine.studies.benchmark.inputs import RANDOM_MODELS, GivenSites, random_model, read_mask, synthetic_mask
from sparserefine.studies.benchmark.records import DENSITIES, BaseEntry, Record, Report, Settings, size_text
from sparserefine.studies.scoring import dense_labels


@torch.no_grad()
def benchmark(
    settings: Settings,
    *,
    seen: Callable[[Report], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Measures every base with every runtime, one after the other.

    Each round runs dense, coarse and every refinement once, so that a disturbance of the machine affects one round of
    all of them, not all rounds of one. Before the rounds, each runs twice untimed: to warm up and to measure memory.

    The peak memory of dense and coarse is what they need beyond the loaded base. What another runtime keeps for itself
    (its own weights, its memory pool) is included. The peak memory of refine is what its stages need beyond the loaded
    networks and the extractor's packed weights, which are reported separately. Memory that an engine keeps for features
    is included.

    On a GPU, the base's convolutions use full float32, not TF32, as the refiner's do. A half precision applies to base
    and refiner there (to the refiner by autocast); on the CPU it applies to the base only.

    Dense labels are made by the fastest code available, see :func:`sparserefine.studies.scoring.dense_labels`.

    Args:
        settings: what to measure.
        seen: called after each base with the results so far.
        tell: called with a line of text when a step that may take long begins, or when something is left out.

    Raises:
        ValueError: raised before the first measurement: an unknown name, a mask of another size, a base that cannot be
            loaded, or a runtime other than torch on a GPU.
        ImportError: a package is missing; the message names it.
    """
    tell = tell or (lambda line: None)
    device = device_named(settings.device)
    engine = EngineChoice(settings.engine).on(device)
    others = [runtime for runtime in settings.runtimes if runtime != "torch"]
    if others and device.type != "cpu":
        raise ValueError(f"{', '.join(others)} run on the CPU, the device is {device}; choose --device cpu")
    if settings.graph and engine.name != "triton":
        raise ValueError(f"a CUDA graph needs a GPU and engine 'triton', this is {engine.name!r} on {device}")
    _check_packages(settings)
    masks = _masks(settings)
    for entry in settings.bases:
        if entry.name not in RANDOM_MODELS:
            _load(entry, settings)  # fail now, not after an hour of measuring other bases
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        report = Report(settings, machine(device, engine))
        for runtime in others:
            tell(f"{runtime}: loading")
            _warm_up_runtime(runtime)
        for entry in settings.bases:
            records, left_out = _BaseBenchmark(entry, settings, masks, device, engine, report.machine, tell).measure()
            report = Report(settings, report.machine, (*report.records, *records), (*report.left_out, *left_out))
            gc.collect()  # the next base may need all of the memory
            if seen:
                seen(report)
        return report
    finally:
        threads, torch.backends.cudnn.allow_tf32 = before
        torch.set_num_threads(threads)


def machine(device: torch.device, engine: Engine) -> str:
    """GPU, processor, instruction set used by torch, torch's version, instruction set of the CPU engine."""
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
    """Sites to refine: name of their source, the map ``float32 [1, H, W]`` for :class:`GivenSites`, their number."""

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
            cure = f"`pip install 'sparserefine[{extra}]'`"
            raise ImportError(f"{what} needs {' and '.join(missing)}, not installed here: {cure}")


def _load(entry: BaseEntry, settings: Settings) -> LoadedModel:
    if entry.name in RANDOM_MODELS:
        return random_model(entry.name, settings.classes)
    from sparserefine.loading import load_model

    try:
        return load_model(entry.name, settings.classes, engine=settings.engine)
    except ValueError as error:
        if ":" in entry.name:
            raise
        raise ValueError(f"{error}; models with random weights: {', '.join(RANDOM_MODELS)}") from error


def _warm_up_runtime(name: Any) -> None:
    """Runs a tiny model, so that memory the library allocates once is not counted for the first base."""
    with suppress(Exception):  # errors are reported later, for each base that it cannot run
        tiny = LoadedModel(nn.Conv2d(3, 2, 1), 2)
        FrozenBase(tiny, config=BaseConfig(ratio=1.0, runtime=name))(torch.zeros(1, 3, 8, 8))


class _BaseBenchmark:
    """Measures one base with all runtimes, presets and masks."""

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

    def measure(self) -> tuple[list[Record], list[str]]:
        """Records, and one line for each runtime that failed."""
        records: list[Record] = []
        left_out: list[str] = []
        name = printable(self._entry.name)
        try:
            self._tell(f"{name}: loading")
            self._prepare()
        except Exception as error:  # a user's model may raise anything; the other bases are still measured
            left_out.append(f"{name} is left out: {_one_line(error)}")
            self._tell(left_out[-1])
            return records, left_out
        for runtime in self._runtimes():
            try:
                records += self._measure_runtime(runtime)
            except Exception as error:
                left_out.append(f"{name} with runtime {runtime} is left out: {_one_line(error)}")
                self._tell(left_out[-1])
            gc.collect()  # exporters and runtimes leave reference cycles
        return records, left_out

    def _prepare(self) -> None:
        settings = self._settings
        loaded = self._loaded = _load(self._entry, settings)
        if isinstance(loaded.model, nn.Module):
            loaded.model.eval().to(self._device)
        channels = len(loaded.mean)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (1, channels, *settings.size), generator=generator, dtype=torch.uint8)
        self._image = pixels.to(self._device)
        self._classes = loaded.num_classes or self._count_classes(channels)
        coarse = self._frozen(BaseConfig(self._entry.name, size=self._coarse_size))
        dense = self._frozen(BaseConfig(self._entry.name, size=settings.size))
        # Counted before the parameters change type: the counter's input is float32.
        self._macs = {"dense": dense.macs(*settings.size), "coarse": coarse.macs(*settings.size)}
        if isinstance(loaded.model, nn.Module):
            loaded.model.to(getattr(torch, settings.precision))
        elif settings.precision != "float32":
            raise ValueError(
                f"precision {settings.precision} needs a torch module, this is {type(loaded.model)}; use float32"
            )
        self._refiners: dict[str, SparseRefiner] = {}
        for preset in settings.presets:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mean, std = default_normalisation(channels)
                config = RefinerConfig(extractor=PRESETS[preset], mean=mean, std=std)
                refiner = SparseRefiner(coarse, config, engine=settings.engine)
            self._refiners[preset] = refiner.eval().to(self._device)

    def _count_classes(self, channels: int) -> int:
        """K of a model that does not state it: the number of channels that it returns."""
        x = torch.zeros(1, channels, *self._coarse_size, device=self._device)
        return tensor_of(self._loaded.model(x), self._entry.name).shape[1]

    def _frozen(self, config: BaseConfig) -> FrozenBase:
        loaded = self._loaded
        if isinstance(loaded.model, OnnxModel):  # a session for each size, so that memory is measured for each
            loaded = replace(loaded, model=copy.deepcopy(loaded.model))
        return FrozenBase(loaded, self._classes, config)

    def _runtimes(self) -> list[str]:
        """The runtimes to measure. ``torch`` means the model itself, which need not be a torch module."""
        model = self._loaded.model
        if isinstance(model, nn.Module):
            return list(self._settings.runtimes)
        native = "onnxruntime" if isinstance(model, OnnxModel) else "own"
        return list(dict.fromkeys(native if name == "torch" else name for name in self._settings.runtimes))

    def _measure_runtime(self, runtime: str) -> list[Record]:
        settings, device, image = self._settings, self._device, self._image
        shown = printable(self._entry.name)
        # ONNX Runtime runs an ONNX file directly, without exporting it first.
        native = runtime in ("torch", "own") or (runtime == "onnxruntime" and isinstance(self._loaded.model, OnnxModel))
        exported_to: Any = None if native else runtime
        name = self._entry.name
        dense_base = self._frozen(BaseConfig(name, size=settings.size, runtime=exported_to))
        coarse_base = self._frozen(BaseConfig(name, size=self._coarse_size, runtime=exported_to))
        logits: list[Tensor] = []

        def dense() -> dict[str, float]:
            start = now_ms(device)
            dense_labels(self._engine, dense_base(image), settings.size, dense_base.outputs)
            return {"ms": now_ms(device) - start}

        def coarse() -> dict[str, float]:
            start = now_ms(device)
            logits[:] = [coarse_base(image)]
            return {"ms": now_ms(device) - start}

        def refine(refiner: SparseRefiner, selector: GivenSites) -> dict[str, float]:
            refiner.selector = selector
            start = now_ms(device)
            with gpu_precision(settings.precision, device):
                refinement = refiner.refine(image, logits[0])
            middle = now_ms(device)
            refinement.labels()
            end = now_ms(device)
            return {**refinement.timings_ms, "labels": end - middle, "ms": end - start, "macs": _macs(refinement)}

        clocks = {"dense": Clock(dense), "coarse": Clock(coarse)}
        for which, clock in clocks.items():
            self._tell(f"{shown}, {runtime}: {which}, untimed run and memory")
            clock.watch_memory(device, keeps=runtime != "torch")
        refined: dict[tuple[str, int], Clock] = {}
        packed_mb: dict[str, float | None] = {}
        for preset, refiner in self._refiners.items():
            self._tell(f"{shown}, {runtime}: refinement with {preset}, untimed run and memory")
            if self._engine.name == "cpu-int8":
                self._quantize(refiner, logits[0])
            packed = refiner.engine.on(device).prepare(refiner.extractor)
            packed_mb[preset] = getattr(packed, "megabytes", None)
            for number, mask in enumerate(self._masks):
                selector = GivenSites(threshold=0.5, entropy=mask.entropy.to(device))
                if settings.graph:
                    refined[preset, number] = self._graph_clock(refiner, selector, logits[0])
                    continue
                refined[preset, number] = Clock(lambda refiner=refiner, selector=selector: refine(refiner, selector))  # type: ignore[misc]
            # The densest mask last: the memory that it leaves allocated suffices for all masks in the timed rounds.
            for number in sorted(range(len(self._masks)), key=lambda number: self._masks[number].sites):
                if not settings.graph:
                    refined[preset, number].watch_memory(device, clear=getattr(packed, "clear", None))
        for number in range(settings.rounds):
            self._tell(f"{shown}, {runtime}: round {number + 1} of {settings.rounds}")
            for clock in (*clocks.values(), *refined.values()):
                clock.round()
        return [
            self._record(runtime, preset, self._masks[number], clocks, clock, packed_mb[preset])
            for (preset, number), clock in refined.items()
        ]

    def _graph_clock(self, refiner: SparseRefiner, selector: GivenSites, logits: Tensor) -> Clock:
        """A clock for the refinement as a CUDA graph. Its peak memory is the capture's, which the graph keeps."""
        image, device, refiner.selector = self._image, self._device, selector
        with gpu_precision(self._settings.precision, device), PeakMemory(device) as memory:
            captured = refiner.capture(image, logits)
        macs = _macs(captured.refine(image, logits))

        def replay() -> dict[str, float]:
            refiner.selector = selector
            start = now_ms(device)
            captured.labels(image, logits)
            ms = now_ms(device) - start
            return {"graph": ms, "ms": ms, "macs": macs}

        clock = Clock(replay)
        clock.peak_mb = memory.megabytes
        return clock

    def _quantize(self, refiner: SparseRefiner, logits: Tensor) -> None:
        """Measures the range of activations, which 8-bit arithmetic needs."""
        densest = max(self._masks, key=lambda mask: mask.sites)
        refiner.selector = GivenSites(threshold=0.5, entropy=densest.entropy.to(self._device))
        with calibrating(refiner.extractor):
            refiner.refine(self._image, logits)

    def _record(
        self,
        runtime: str,
        preset: str,
        mask: _Mask,
        base: dict[str, Clock],
        refine: Clock,
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
            preset=preset,
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


def _macs(refinement: Refinement) -> float:
    """Multiply-accumulates of all stages after the base."""
    return float(sum(value or 0 for stage, value in refinement.macs.items() if stage != "base"))


def _one_line(error: Exception) -> str:
    words = printable(" ".join(str(error).split()))
    if len(words) > 300:
        words = words[:300] + " ..."
    return words if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {words}"
