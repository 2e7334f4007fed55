"""Settings and records of ``sparserefine benchmark``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparserefine.machine.device import PRECISIONS
from sparserefine.stages.extractor import PRESETS

RUNTIMES = ("torch", "onnxruntime", "openvino")
DENSITIES = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class BaseEntry:
    """A base to measure.

    Attributes:
        name: one of :data:`sparserefine.studies.benchmark.inputs.RANDOM_MODELS`, or a name that
            :func:`sparserefine.bases.load.load_base` accepts.
        coarse: height and width of its low-resolution input [px]; ``None``: as in the settings.
    """

    name: str
    coarse: tuple[int, int] | None = None


def parse_size(text: str, what: str = "size") -> tuple[int, int]:
    """Height and width [px] from text such as ``1024x2048``.

    Raises:
        ValueError: the text has another form, or a side is 0.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None or min(map(int, found.groups())) < 1:
        raise ValueError(f"{what} {text!r}, expected height x width in pixels, such as 1024x2048")
    return int(found[1]), int(found[2])


def parse_density(text: str) -> float:
    """A share of the pixels from text such as ``0.1``.

    Raises:
        ValueError: the text is not a number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"density {text!r}, expected a number between 0 and 1, such as 0.1") from error


def parse_base(text: str) -> BaseEntry:
    """A base from text such as ``name`` or ``name@512x1024``.

    >>> parse_base("segnext_l@640x1280")
    BaseEntry(name='segnext_l', coarse=(640, 1280))
    """
    name, separator, size = text.strip().rpartition("@")
    if separator and name and re.fullmatch(r"\d+x\d+", size):  # any other @ is part of the name
        return BaseEntry(name, parse_size(size, f"coarse size of {name}:"))
    return BaseEntry(text.strip())


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        bases: the models.
        size: full-resolution height and width [px].
        coarse: low-resolution input of the base [px]; ``None``: half of ``size``.
        presets: names of extractor shapes, see :data:`sparserefine.stages.extractor.PRESETS`.
        densities: densities of the synthetic masks, 0..1; ``None``: :data:`DENSITIES`, or none if there are ``masks``.
        masks: image files of ``size``, measured in addition to synthetic masks; each non-black pixel is a site.
        runtimes: libraries that run the base, of :data:`RUNTIMES`.
        classes: K of models with random weights.
        threads: CPU threads; ``None``: torch's own choice.
        precision: type of the base's parameters and activations; on a GPU of the refiner's too.
        device: name of the device, see :func:`sparserefine.machine.device.device_named`.
        engine: name of the engine that runs the sparse network.
        graph: whether all stages after the base run as one CUDA graph, captured for each preset and mask.
        rounds: timed runs of each measurement; their median is reported.

    Raises:
        ValueError: a field is out of range or not known; the message names it and what is expected.
    """

    bases: tuple[BaseEntry, ...]
    size: tuple[int, int] = (1024, 2048)
    coarse: tuple[int, int] | None = None
    presets: tuple[str, ...] = ("paper", "slim16")
    densities: tuple[float, ...] | None = None
    masks: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ("torch",)
    classes: int = 19
    threads: int | None = None
    precision: str = "float32"
    device: str = "auto"
    engine: str = "auto"
    rounds: int = 3
    graph: bool = False

    def __post_init__(self) -> None:
        if not all(b.name for b in self.bases):
            raise ValueError("a base has no name; expected for example hrnet_w48, or unet:FILE")
        _check_names("base", [f"{b.name}@{size_text(self.coarse_size(b))}" for b in self.bases], None)
        _check_names("preset", self.presets, tuple(PRESETS))
        _check_names("runtime", self.runtimes, RUNTIMES)
        _check_names("precision", [self.precision], PRECISIONS)
        if not self.masks and self.densities is not None and not self.densities:
            raise ValueError("no density is chosen; give some between 0 and 1, or masks")
        for density in self.densities or ():
            if not 0 <= density <= 1:
                raise ValueError(f"density {density}, expected a share of the pixels between 0 and 1")
        for name, coarse in [("coarse", self.coarse), *((f"{b.name}@...", b.coarse) for b in self.bases)]:
            if coarse is not None and (coarse[0] > self.size[0] or coarse[1] > self.size[1]):
                raise ValueError(f"{name}: {size_text(coarse)} is larger than the image, {size_text(self.size)}")
        if self.classes < 2:
            raise ValueError(f"classes = {self.classes}, expected at least 2")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads = {self.threads}, expected at least 1")
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}, expected at least 1")
        others = [runtime for runtime in self.runtimes if runtime != "torch"]
        if others and self.precision != "float32":
            raise ValueError(f"precision {self.precision} is for runtime torch, not {', '.join(others)}; use float32")

    def coarse_size(self, base: BaseEntry) -> tuple[int, int]:
        """Low-resolution input of ``base``, height and width [px]."""
        half = (max(1, round(self.size[0] / 2)), max(1, round(self.size[1] / 2)))
        return base.coarse or self.coarse or half


@dataclass(frozen=True)
class Record:
    """Results for one base, runtime, preset and mask; times are medians over the rounds.

    Attributes:
        model: the base's name.
        size: size of the image, as ``1024x2048``.
        density: share of the pixels that are sites.
        preset: name of the extractor's shape.
        engine: name of the engine that ran the extractor.
        threads: CPU threads.
        dense_ms: the base on the full-resolution image, and its labels.
        coarse_ms: the base on the downsized image, resize included.
        refine_ms: all stages after the base, labels included.
        ratio: dense_ms / (coarse_ms + refine_ms): how many times faster.
        runtime: what ran the base: ``torch``, ``onnxruntime``, ``openvino``, or ``own`` for a callable that is not a
            torch module.
        precision: of the base, and on a GPU also of the refiner.
        device: where everything ran.
        coarse_size: size of the base's low-resolution input.
        mask: ``synthetic``, or the stem of the mask's file.
        sites: N.
        classes: K.
        stages_ms: parts of ``refine_ms``: uncertainty, select, plan, gather, extractor, ensembler, labels. Engine
            ``cpu`` makes some tables of the plan when the extractor first reads them; they count there. A graph is one
            stage.
        dense_gmacs: 1e9 multiply-accumulates; ``None`` if they cannot be counted.
        coarse_gmacs: likewise.
        refine_gmacs: of extractor and ensembler.
        dense_peak_mb: peak memory beyond the loaded base [1e6 bytes], see
            :func:`sparserefine.studies.benchmark.measure.benchmark`.
        coarse_peak_mb: likewise.
        refine_peak_mb: peak memory beyond the loaded networks and ``packed_mb``, the extractor's features included.
        packed_mb: the engine's packed copy of the extractor's weights [1e6 bytes]; ``None`` if it packs none.
        rounds: timed runs.
        machine: processor, instruction set, torch's version.
        mode: how the refinement ran: ``eager`` or ``graph``.
    """

    model: str
    size: str
    density: float
    preset: str
    engine: str
    threads: int
    dense_ms: float
    coarse_ms: float
    refine_ms: float
    ratio: float
    runtime: str
    precision: str
    device: str
    coarse_size: str
    mask: str
    sites: int
    classes: int
    stages_ms: dict[str, float]
    dense_gmacs: float | None
    coarse_gmacs: float | None
    refine_gmacs: float
    dense_peak_mb: float
    coarse_peak_mb: float
    refine_peak_mb: float
    packed_mb: float | None
    rounds: int
    machine: str
    mode: str = "eager"


@dataclass(frozen=True)
class Report:
    """The results so far.

    Attributes:
        settings: what to measure.
        machine: processor, instruction set, torch's version.
        records: in order of bases, runtimes, presets, masks.
        left_out: for each base and runtime that failed, one line that says why.
    """

    settings: Settings
    machine: str
    records: tuple[Record, ...] = ()
    left_out: tuple[str, ...] = ()


def _check_names(what: str, names: Sequence[str], known: Sequence[str] | None) -> None:
    choices = f"; choose from {', '.join(known)}" if known else ""
    if not names or not all(names):
        raise ValueError(f"no {what} is chosen{choices}")
    for name in names:
        if known and name not in known:
            raise ValueError(f"{what} {name!r} is not known{choices}")
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} is given twice")


def size_text(size: Sequence[int]) -> str:
    """Height and width as text, ``1024x2048``."""
    return f"{size[0]}x{size[1]}"
