"""Configuration of logits, training and evaluation: one YAML file, one tree of frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from sparserefine.bases.base import BaseConfig
from sparserefine.data.crops import AugmentConfig
from sparserefine.data.readers.config import DataConfig
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import PRESETS


@dataclass(frozen=True)
class CrossFit:
    """Images of ``split`` get their coarse logits from ``base``, which was not trained on them."""

    split: str
    base: str


@dataclass(frozen=True)
class LogitsConfig:
    """Where coarse logits come from in training.

    Attributes:
        source: ``stored``: read what ``sparserefine logits`` wrote; ``live``: computed at the start, kept in memory.
        folder: of the stored logits.
        crossfit: bases for images that the base itself was trained on, where it is over-confident.
    """

    source: Literal["stored", "live"] = "live"
    folder: str = ""
    crossfit: tuple[CrossFit, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in ("stored", "live"):
            raise ValueError(f"logits.source = {self.source!r}, expected 'stored' or 'live'")
        if self.source == "stored" and not self.folder:
            raise ValueError("logits.source = 'stored' needs logits.folder")


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: AdamW with a cosine schedule (paper, section 4.1).

    Attributes:
        init: folder of a refiner of the same shape to start from; empty: from random weights.
        steps: optimiser steps.
        batch: crops a step.
        lr: peak learning rate.
        clip: largest norm of the gradient; a larger one is scaled down to it.
        weight_decay: of weights; biases and normalisation are not decayed.
        warmup: share of the steps over which the rate rises linearly.
        dice: weight of a Dice loss on the refined prediction; 0: cross entropies only, as in the paper.
        val_every: steps between validations, which are also when checkpoints are written.
        seed: of initialisation and crops.
        workers: processes that prepare crops.
        precision: as Lightning names it: ``32-true``, ``bf16-mixed``, ``16-mixed``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        cache_gb: decoded images kept in memory, at most [GB].
    """

    init: str = ""
    steps: int = 10_000
    batch: int = 8
    lr: float = 3e-4
    clip: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.02
    dice: float = 0.0
    val_every: int = 500
    seed: int = 0
    workers: int = 0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    cache_gb: float = 4.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "clip", "val_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"training.{name} = {getattr(self, name)}, expected more than 0")
        for name in ("weight_decay", "warmup", "dice", "workers", "cache_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} = {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True)
class Config(RefinerConfig):
    """All that the commands ``logits``, ``train`` and ``evaluate`` need: the refiner's own choices, and these.

    Attributes:
        data: images and splits.
        base: the frozen model.
        out: folder of the trained refiner: ``best/``, ``last/``, ``last.ckpt``, ``log.jsonl``.
        preset: a named extractor instead of ``extractor``: ``paper``, ``slim`` or ``slim16``.
        logits: where coarse logits come from in training.
        augment: crops.
        training: optimisation.
        boundary_px: width of the band of boundary IoU [px]; ``null``: 2 % of the image's diagonal, as published.
    """

    data: DataConfig
    base: BaseConfig
    out: str
    preset: Literal["paper", "slim", "slim16"] | None = None
    logits: LogitsConfig = LogitsConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    boundary_px: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise ValueError("out is empty, expected a folder for the trained refiner")
        if self.preset is not None and self.extractor not in (PRESETS["slim"], PRESETS[self.preset]):
            raise ValueError(f"preset = {self.preset!r} and an extractor of its own shape: give one of them")
        if self.boundary_px is not None and self.boundary_px < 1:
            raise ValueError(f"boundary_px = {self.boundary_px}, expected at least 1, or null")

    @property
    def refiner(self) -> RefinerConfig:
        """The refiner's own choices; its extractor is that of ``preset``, if one is named."""
        own = RefinerConfig(**{field.name: getattr(self, field.name) for field in fields(RefinerConfig)})
        return own if self.preset is None else replace(own, extractor=PRESETS[self.preset])
