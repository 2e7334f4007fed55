"""Configuration of ``logits``, ``train`` and ``evaluate``: one YAML file, one tree of frozen dataclasses."""

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
    """Images of ``split`` get their coarse logits from ``base``, a base that was not trained on them."""

    split: str
    base: str


@dataclass(frozen=True)
class LogitsConfig:
    """Where coarse logits come from in training.

    Attributes:
        source: ``stored``: read the files that ``sparserefine logits`` wrote; ``live``: computed when training starts,
            and kept in memory.
        folder: folder of the stored logits.
        crossfit: other bases for images that the base itself was trained on, because it is over-confident there.
    """

    source: Literal["stored", "live"] = "live"
    folder: str = ""
    crossfit: tuple[CrossFit, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in ("stored", "live"):
            raise ValueError(f"logits.source = {self.source!r}, expected 'stored' or 'live'")
        if self.source == "stored" and not self.folder:
            raise ValueError(
                "logits.source = 'stored' needs logits.folder, the folder that `sparserefine logits` wrote"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: AdamW with a cosine schedule (paper, section 4.1).

    Attributes:
        init: folder of a refiner with the same extractor and ensembler to start from; empty: start from random weights.
        steps: optimiser steps.
        batch: crops per step.
        lr: peak learning rate.
        clip: maximum norm of the gradient; a longer gradient is scaled down to it.
        weight_decay: decay of weights; biases and normalisation layers have none.
        warmup: share of the steps in which the learning rate rises linearly.
        dice: weight of a Dice loss on sparse and refined logits; 0: cross entropy only, as in the paper.
        val_every: steps between validations; each validation also writes checkpoints.
        seed: seed of initialisation and crops.
        workers: number of processes that prepare crops.
        precision: one of Lightning's names ``32-true``, ``bf16-mixed``, ``16-mixed``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        cache_gb: maximum size of the cache of decoded images [GB].
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
    """Configuration of the commands ``logits``, ``train`` and ``evaluate``: the refiner's settings and the following.

    Attributes:
        data: images and splits.
        base: the frozen model.
        out: folder of the trained refiner: ``best/``, ``last/``, ``last.ckpt``, ``log.jsonl``.
        preset: named extractor shape, used instead of ``extractor``: ``paper``, ``slim`` or ``slim16``.
        logits: where coarse logits come from in training.
        augment: random crops and augmentation.
        training: optimisation.
        boundary_px: width of the boundary IoU band [px]; ``null``: 2 % of the image's diagonal, as published.
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
            raise ValueError(f"preset = {self.preset!r} and extractor = {self.extractor}: give only one")
        if self.boundary_px is not None and self.boundary_px < 1:
            raise ValueError(f"boundary_px = {self.boundary_px}, expected at least 1, or null")

    @property
    def refiner(self) -> RefinerConfig:
        """The refiner's settings, with the extractor of ``preset`` if one is named."""
        own = RefinerConfig(**{field.name: getattr(self, field.name) for field in fields(RefinerConfig)})
        return own if self.preset is None else replace(own, extractor=PRESETS[self.preset])
