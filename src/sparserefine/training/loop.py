"""``sparserefine train``: trains a refiner as a configuration describes it."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sparserefine.bases.load import load_base
from sparserefine.data.crops import CropBatch, CropDataset, EpochSampler
from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.whole import written_whole
from sparserefine.machine.device import device_named
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.config import RefinerConfig
from sparserefine.training.config import Config
from sparserefine.training.logits import Bases, CoarseLogits
from sparserefine.training.stored_logits import LiveSplit, StoredSplit


def build_refiner(config: Config, data: Dataset) -> SparseRefiner:
    """An untrained refiner as ``config`` describes it, for the classes of ``data``."""
    return SparseRefiner(load_base(config.base, data.classes), config.refiner, classes=data.classes)


class _WholeImages(TorchDataset[tuple[Tensor, Tensor, Tensor]]):
    """Whole validation images with their coarse logits."""

    def __init__(self, data: Dataset, logits: LiveSplit | StoredSplit) -> None:
        self.data, self.logits = data, logits

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label = self.data.read(index)
        return image, label, self.logits(index, (label.shape[0], label.shape[1]))


def _first(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    return items[0]


_MAY_DIFFER = ("workers", "device", "cache_gb")  # fields of training that do not change the result


def _check_resumable(config: Config, checkpoint: Path) -> None:
    """Raises ``ValueError`` if there is no checkpoint, or if it was made with another configuration."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no checkpoint to resume from; start without --resume")
    stored = json.loads((checkpoint.parent / "config.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    # Fields that are newer than the stored configuration had their default value.
    stored = {**json.loads(json.dumps(dataclasses.asdict(RefinerConfig()))), **stored}
    for values in (stored, now):
        values.pop("out", None)
        values["base"].pop("runtime", None)
        for name in _MAY_DIFFER:
            values["training"].pop(name, None)
    for key in sorted({*stored, *now}):
        if stored.get(key) != now.get(key):
            raise ValueError(
                f"{checkpoint}: was made with {key} = {stored.get(key)}, this configuration has {now.get(key)}; "
                "resume with the same value, or start a new run in another --out"
            )


def train(config: Config, *, resume: bool = False) -> Path:
    """Trains a refiner, and returns the folder of the best one, ``<out>/best``.

    Writes into ``<out>``: ``best/`` (highest refined score on the validation split), ``last/``, ``last.ckpt`` (to
    resume from), ``config.json`` and ``log.jsonl`` (one line per validation).

    Args:
        config: the whole configuration.
        resume: continue from ``<out>/last.ckpt``.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is false; there is no run to resume, or one with another
            configuration; or ``steps`` is not a multiple of ``val_every``.
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
    if resume:
        _check_resumable(config, checkpoint)
    elif checkpoint.exists() or (out / "best").exists():
        raise ValueError(
            f"{out}: holds a run; pass --resume to continue it from last.ckpt, choose another --out, or delete it"
        )
    steps_per_epoch = min(c.val_every, c.steps)
    if c.steps % steps_per_epoch:
        raise ValueError(f"training.steps = {c.steps}, expected a multiple of training.val_every = {c.val_every}")

    L.seed_everything(c.seed, verbose=False)
    data, val = config.data.read(config.data.train), config.data.read(config.data.val)
    refiner = build_refiner(config, data)
    if c.init:
        refiner.load_weights(c.init)
    device = device_named(c.device)
    bases = Bases(config.base, device, refiner.base)
    sources = [CoarseLogits(config, part, device, bases) for part in (data, val)]
    logits = [source.stored() if config.logits.source == "stored" else source.live() for source in sources]
    del sources, bases  # frees the cross-fit bases, which training does not need

    crops = CropDataset(data, logits[0], config.augment, c.seed, c.cache_gb / max(1, c.workers))
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
    if not resume:
        (out / "log.jsonl").unlink(missing_ok=True)  # left by a run that ended before its first checkpoint
    with written_whole(out / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # below that it prints advertisements
    trainer = L.Trainer(
        max_epochs=c.steps // steps_per_epoch,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1,
        precision=c.precision,
        gradient_clip_val=c.clip,
        callbacks=[
            ModelCheckpoint(out, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    module = RefinerModule(refiner, config)
    with warnings.catch_warnings():
        # These warnings do not apply: the base must stay in evaluation mode, `out` was checked above, and the number of
        # workers is the user's choice.
        for message in (
            ".*in eval mode.*",
            ".*exists and is not empty.*",
            ".*does not have many workers.*",
            ".*LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            trainer.fit(module, loader, val_loader, ckpt_path=checkpoint if resume else None, weights_only=True)
        except SystemExit:
            if trainer.interrupted:  # Lightning turns Ctrl-C into SystemExit
                raise KeyboardInterrupt from None
            raise
    refiner.save_pretrained(out / "last")
    return out / "best"
