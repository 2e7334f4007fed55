"""One run of ``benchmarks.gpu``: its options, time budget, failures and inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.records import Results
from benchmarks.sparse_unet import CHANNELS, random_network
from sparserefine.sparse import SparseUNet
from sparserefine.stages.extractor import ExtractorConfig

SETS = 3  # sets of inputs, used in turn

T = TypeVar("T")


@dataclass(frozen=True)
class UncertaintyCase:
    """K, height and width of the coarse logits, full height and width [px]."""

    classes: int
    coarse: tuple[int, int]
    full: tuple[int, int]

    def __str__(self) -> str:
        (h, w), (height, width) = self.coarse, self.full
        return f"{self.classes} classes, {h}x{w} -> {height}x{width}"


@dataclass(frozen=True)
class Options:
    """The command line, checked.

    Attributes:
        parts: the parts to run, of :data:`benchmarks.gpu.records.PARTS`, in that order.
        presets: networks by name.
        masks: ``bool [H, W]`` by name; checks, training and tilings use the first one.
        mask_files: their files.
        batches: batch sizes.
        dtypes: names in :data:`benchmarks.gpu.device.DTYPES`.
        cases: sizes for uncertainty.
        models: bases for timing the whole method.
        budget_s: time after which nothing new starts [s]; ``None``: no limit.
        spconv_python: the interpreter that has spconv.
        side: side of the matrices multiplied for a ceiling.
        copy_bytes: size of the tensor copied for a ceiling [bytes].
    """

    parts: tuple[str, ...]
    presets: dict[str, ExtractorConfig]
    masks: dict[str, Tensor]
    mask_files: tuple[Path, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    cases: tuple[UncertaintyCase, ...]
    models: tuple[str, ...]
    budget_s: float | None
    spconv_python: Path
    side: int = 8192
    copy_bytes: int = 1 << 30


@dataclass
class Run:
    """State shared by all parts.

    Attributes:
        options: the command line.
        device: where everything runs.
        results: records so far.
        left_out: lines that say what was not measured, and why.
        failures: lines that say what failed in this package.
    """

    options: Options
    device: Device
    results: Results
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def attempt(self, what: str, action: Callable[[], T], *, peer: bool = False) -> T | None:
        """Runs ``action``; if it fails or time is up, reports that and returns ``None``.

        Args:
            what: the action in words.
            action: its exceptions are reported and do not stop the others.
            peer: whether the action only serves comparison; its failure then does not fail the run.
        """
        if self.options.budget_s is not None and time.monotonic() - self._start >= self.options.budget_s:
            self.leave_out(f"{what}: no time left")
            return None
        try:
            return action()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.leave_out(f"{what}: {reason}")
            if not peer:
                self.failures.append(f"{what}: {reason}")
            return None
        finally:
            if self.device.device.type == "cuda":
                with suppress(RuntimeError):  # after a fault on the GPU every call fails
                    torch.cuda.empty_cache()

    def leave_out(self, line: str) -> None:
        """Prints and records what is not measured."""
        self.left_out.append(line)
        self.results.leave_out(line)
        print(f"left out: {line}", flush=True)

    def ceilings(self) -> dict[str, float]:
        """Measured rates by name, including those of earlier runs on this machine."""
        return {record["name"]: record["rate"] for record in self.results.of("ceilings")}

    def first_mask(self) -> tuple[str, Tensor]:
        """Name and ``bool [H, W]`` of the first mask."""
        return next(iter(self.options.masks.items()))


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: mask ``bool [B, H, W]``, and features ``float32 [N, C]`` of its sites."""

    mask: Tensor
    features: Tensor


def input_sets(mask: Tensor, batch: int, device: torch.device, sets: int = SETS) -> list[Inputs]:
    """Sets with equally many sites at different places: masks are flipped upside down and shifted sideways.

    Args:
        mask: ``bool [H, W]``.
        batch: images in a set, all different.
        device: device of the inputs.
        sets: number of sets.
    """
    found, sites = [], batch * int(mask.sum())
    for i in range(sets):
        images = [_moved(mask, i * batch + b) for b in range(batch)]
        found.append(Inputs(torch.stack(images).to(device), torch.randn(sites, CHANNELS, device=device)))
    return found


def _moved(mask: Tensor, number: int) -> Tensor:
    turned = mask.flip(0) if number % 2 else mask
    return turned.roll(number * mask.shape[1] // 16, 1)


def network_of(config: ExtractorConfig, device: torch.device) -> SparseUNet:
    """A network in evaluation mode with seeded random weights."""
    return random_network(config).to(device)


def cases_of(options: Options) -> Iterator[tuple[str, int, str, str]]:
    """Dtype, batch size, mask and preset of each case, the most important first."""
    for dtype in options.dtypes:
        for batch in options.batches:
            for mask in options.masks:
                for preset in options.presets:
                    yield dtype, batch, mask, preset


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of ``expected``, in float64; NaN stays NaN."""
    difference = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    return float(difference / size) if float(size) else float(difference)
