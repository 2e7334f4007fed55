"""What ``sparserefine benchmark`` is asked for, and what it reports."""

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
        name: one of :data:`sparserefine.studies.benchmark.inputs.RANDOM_MODELS`, or what
            :func:`sparserefine.bases.load.load_base` knows.
        coarse: its own low-resolution input, height and width [px]; ``None``: that of the settings.
    """

    name: str
    coarse: tuple[int, int] | None = None


def parse_size(text: str, what: str = "size") -> tuple[int, int]:
    """``1024x2048`` -> height and width [px].

    Raises:
        ValueError: not of that form, or no pixels.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None or min(map(int, found.groups())) < 1:
        raise ValueError(f"{what} {text!r}, expected height x width in pixels, as 1024x2048")
    return int(found[1]), int(found[2])


def parse_density(text: str) -> float:
    """``0.1``: a share of the pixels.

    Raises:
        ValueError: no number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"density {text!r}, expected a number between 0 and 1, as 0.1") from error


def parse_base(text: str) -> BaseEntry:
    """``name`` or ``name@512x1024``.

    >>> parse_base("segnext_l@640x1280")
    BaseEntry(name='segnext_l', coarse=(640, 1280))
    """
    name, separator, size = text.strip().rpartition("@")
    if separator and name and re.fullmatch(r"\d+x\d+", size):  # other names may have an @ of their own
        return BaseEntry(name, parse_size(size, f"coarse size of {name}:"))
    return BaseEntry(text.strip())


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        bases: the models.
        size: full-resolution height and width [px].
        coarse: low-resolution input of the base [px]; ``None``: half of ``size``.
        presets: names of extractors, see :data:`sparserefine.stages.extractor.PRESETS`.
        densities: of synthetic masks, 0..1; ``None``: :data:`DENSITIES`, unless there are ``masks``.
        masks: image files of ``size``, measured beside the synthetic ones; a pixel that is not black is a site.
        runtimes: what runs the base.
        classes: of models with random weights.
        threads: of the CPU; ``None``: as many as torch uses.
        precision: of the base's parameters and activations, and on a GPU of the refiner's too.
        device: by name.
        engine: what executes the sparse network.
        graph: all after the base is recorded as one CUDA graph, for each preset and mask.
        rounds: timed runs of everything; times are medians.
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
            raise ValueError("a base without a name; expected e.g. hrnet_w48, or unet:FILE")
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
            raise ValueError(f"precision {self.precision} is for runtime torch, not {', '.join(others)}")

    def coarse_size(self, base: BaseEntry) -> tuple[int, int]:
        """Low-resolution input of ``base``, height and width [px]."""
        half = (max(1, round(self.size[0] / 2)), max(1, round(self.size[1] / 2)))
        return base.coarse or self.coarse or half


@dataclass(frozen=True)
class Record:
    """One base, runtime, preset and mask; times are medians over the rounds.

    Attributes:
        model: the base's name.
        size: of the image, ``1024x2048``.
        density: share of the pixels that are sites.
        preset: name of the extractor.
        engine: what executed it.
        threads: of the CPU.
        dense_ms: the base on the whole image, and labels.
        coarse_ms: the base on the downsized image.
        refine_ms: all stages after the base, labels included.
        ratio: dense_ms / (coarse_ms + refine_ms): how many times faster.
        runtime: of the base: ``torch``, ``onnxruntime``, ``openvino``; ``own``: a callable that is no torch module.
        precision: of the base, and on a GPU of the refiner.
        device: where.
        coarse_size: the base's low-resolution input.
        mask: ``synthetic``, or the file's name.
        sites: N.
        classes: K.
        stages_ms: of ``refine_ms``: uncertainty, select, plan, gather, extractor, ensembler, labels. On engine ``cpu``
            some tables of the plan are made when the extractor first reads them, and count there. A graph is one stage.
        dense_gmacs: 1e9 multiply-accumulates; ``None`` where they cannot be counted.
        coarse_gmacs: likewise.
        refine_gmacs: of extractor and ensembler.
        dense_peak_mb: most memory beyond the loaded base [1e6 bytes], see
            :func:`sparserefine.studies.benchmark.measure.benchmark`.
        coarse_peak_mb: likewise.
        refine_peak_mb: most memory beyond the loaded networks and ``packed_mb``; the extractor's features count.
        packed_mb: the copy of the extractor's weights that the engine packs once; ``None`` where it packs none.
        rounds: timed runs.
        machine: processor, instruction set, torch's version.
        mode: of the refinement: ``eager``, or ``graph``.
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
    """What was measured so far.

    Attributes:
        settings: what was asked for.
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
    """``1024x2048``."""
    return f"{size[0]}x{size[1]}"
