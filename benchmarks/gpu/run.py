"""One run of ``benchmarks.gpu``: what is asked for, the time there is for it, what came of it; and its inputs."""

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

SETS = 3  # of inputs, taken in turn

T = TypeVar("T")


@dataclass(frozen=True)
class UncertaintyCase:
    """K, coarse height and width, full height and width [px]."""

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
        parts: of :data:`benchmarks.gpu.records.PARTS`, in that order.
        presets: networks by name.
        masks: ``bool [H, W]`` by name; the first one is that of checks, training and tilings.
        mask_files: the same as files.
        batches: images at once.
        dtypes: of :data:`benchmarks.gpu.device.DTYPES`.
        cases: of uncertainty.
        models: bases, for the whole method.
        budget_s: after so many seconds nothing new is begun; ``None``: no limit.
        spconv_python: the interpreter that has spconv.
        side: of the matrices that are multiplied for a ceiling.
        copy_bytes: of the tensor that is copied for a ceiling.
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
    """What all parts share.

    Attributes:
        options: what is asked for.
        device: where.
        results: records so far.
        left_out: lines: what was not measured, and why.
        failures: lines: what went wrong in this package.
    """

    options: Options
    device: Device
    results: Results
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.monotonic)

    def attempt(self, what: str, action: Callable[[], T], *, peer: bool = False) -> T | None:
        """``action()``, or ``None`` where time is up or it fails, and a line about that.

        Args:
            what: the action in words.
            action: whatever it raises is told and does not stop the others.
            peer: somebody else's code: its failure is not ours.
        """
        if self.options.budget_s is not None and time.monotonic() - self._start >= self.options.budget_s:
            self.leave_out(f"{what}: no time left")
            return None
        try:
            return action()
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.leave_out(f"{what}: {words}")
            if not peer:
                self.failures.append(f"{what}: {words}")
            return None
        finally:
            if self.device.device.type == "cuda":
                with suppress(RuntimeError):  # after a fault on the GPU every call fails
                    torch.cuda.empty_cache()

    def leave_out(self, line: str) -> None:
        """Tells and records what is not measured."""
        self.left_out.append(line)
        self.results.leave_out(line)
        print(f"left out: {line}", flush=True)

    def ceilings(self) -> dict[str, float]:
        """Measured rates by name, those of an earlier run of this machine too."""
        return {record["name"]: record["rate"] for record in self.results.of("ceilings")}

    def first_mask(self) -> tuple[str, Tensor]:
        """Name and ``bool [H, W]``."""
        return next(iter(self.options.masks.items()))


@dataclass(frozen=True)
class Inputs:
    """One set: ``bool [B, H, W]``, and ``float32 [N, C]`` for its sites."""

    mask: Tensor
    features: Tensor


def input_sets(mask: Tensor, batch: int, device: torch.device, sets: int = SETS) -> list[Inputs]:
    """Sets of as many sites at other places: images are turned upside down and shifted sideways.

    Args:
        mask: ``bool [H, W]``.
        batch: images of a set, all of them different.
        device: where to.
        sets: how many.
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
    """Seeded random weights, for evaluation."""
    return random_network(config).to(device)


def cases_of(options: Options) -> Iterator[tuple[str, int, str, str]]:
    """Dtype, batch, mask, preset of each case; what matters most comes first."""
    for dtype in options.dtypes:
        for batch in options.batches:
            for mask in options.masks:
                for preset in options.presets:
                    yield dtype, batch, mask, preset


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64; NaN stays NaN."""
    difference = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    return float(difference / size) if float(size) else float(difference)
