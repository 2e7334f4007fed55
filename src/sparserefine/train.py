"""``sparserefine train``: trains a refiner as one configuration says."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sparserefine.bases import load_base
from sparserefine.config import Config
from sparserefine.data.crops import CropBatch, CropDataset, EpochSampler
from sparserefine.data.datasets import Dataset
from sparserefine.data.images import written_whole
from sparserefine.logits import CoarseLogits, LiveLogits
from sparserefine.refiner import SparseRefiner


def build_refiner(config: Config, data: Dataset) -> SparseRefiner:
    """An untrained refiner as ``config`` describes it, for the classes of ``data``."""
    base = load_base(config.base, len(data.classes))
    return SparseRefiner(
        base,
        selector=config.selector,
        extractor=config.extractor,
        ensembler=config.ensembler,
        classes=data.classes,
        upsampling=config.upsampling,
    )


class _WholeImages(TorchDataset[tuple[Tensor, Tensor, Tensor]]):
    """Whole validation images with their coarse logits."""

    def __init__(self, data: Dataset, logits: LiveLogits | CoarseLogits) -> None:
        self.data = data
        self.logits = logits.stored if isinstance(logits, CoarseLogits) else logits

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label = self.data.read(index)
        return image, label, self.logits(index, (label.shape[0], label.shape[1]))


def _first(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    return items[0]


def train(config: Config, *, resume: bool = False) -> Path:
    """Trains, and returns the folder of the best refiner, ``<out>/best``.

    ``<out>`` gets ``best/`` (highest refined score on the validation split), ``last/``, ``last.ckpt`` (to resume from),
    ``config.json`` and ``log.jsonl`` (a line a validation).

    Args:
        config: everything.
        resume: go on from ``<out>/last.ckpt``.

    Raises:
        ValueError: ``out`` holds another run and ``resume`` is false, or there is nothing to resume.
        ImportError: Lightning is not installed.
    """
    try:
        import lightning as L
        from lightning.pytorch.callbacks import ModelCheckpoint

        from sparserefine.training.module import RefinerModule
    except ImportError as error:
        raise ImportError(f"training needs Lightning: pip install 'sparserefine[train]' ({error})") from error

    c, out = config.training, Path(config.out)
    checkpoint = out / "last.ckpt"
    if resume and not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: nothing to resume; leave --resume out to start")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; pass --resume to go on with the run in it, or choose another --out")
    steps_per_epoch = min(c.val_every, c.steps)
    if c.steps % steps_per_epoch:
        raise ValueError(f"training.steps = {c.steps} is no multiple of training.val_every = {c.val_every}")

    L.seed_everything(c.seed, verbose=False)
    data, val = config.data.read(config.data.train), config.data.read(config.data.val)
    refiner = build_refiner(config, data)
    sources = [CoarseLogits(config, part, torch.device("cpu")) for part in (data, val)]
    logits = sources if config.logits.source == "stored" else [source.live() for source in sources]

    first = logits[0]
    crops = CropDataset(
        data, first.stored if isinstance(first, CoarseLogits) else first, config.augment, c.seed, c.cache_gb
    )
    loader = DataLoader(
        crops,
        batch_size=c.batch,
        sampler=EpochSampler(steps_per_epoch * c.batch),
        num_workers=c.workers,
        collate_fn=CropBatch.collate,
        persistent_workers=c.workers > 0,
    )
    val_loader = DataLoader(_WholeImages(val, logits[1]), batch_size=1, collate_fn=_first)

    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    trainer = L.Trainer(
        max_epochs=c.steps // steps_per_epoch,
        accelerator=c.device if c.device != "cuda" else "gpu",
        devices=1,
        precision=c.precision,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(out, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    module = RefinerModule(refiner, config)
    with warnings.catch_warnings():
        # The base is meant to stay in evaluation mode, `out` was checked above, loader workers are the user's choice.
        for message in (
            ".*in eval mode.*",
            ".*exists and is not empty.*",
            ".*does not have many workers.*",
            ".*LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, loader, val_loader, ckpt_path=checkpoint if resume else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    refiner.save_pretrained(out / "last")
    return out / "best"
