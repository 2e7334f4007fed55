"""Lightning's trainer, for one process on one device, whatever cluster the machine belongs to."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning import seed_everything as seed_everything
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from torch.utils.data import DataLoader

from sparserefine.data.crops import CropDataset
from sparserefine.data.loader import CropLoader
from sparserefine.files.text import first_line
from sparserefine.machine.memory import give_back_free_memory
from sparserefine.training.checkpoint import LAST, CheckpointError, read_checkpoint, write_checkpoint
from sparserefine.training.checks import READ_EVERY
from sparserefine.training.items import WholeImages
from sparserefine.training.module import RefinerModule

_NOT_SO = (
    ".*in eval mode.*",  # the base must stay in it
    ".*does not have many workers.*",  # the user's choice
    ".*`srun` command.*",  # one process is what is wanted
    ".*callbacks used to create the checkpoint.*",  # checkpoints of older versions name one; it held nothing
    ".*LeafSpec.*",
)
"""Warnings of Lightning that do not apply."""
_EXIT_SIGTERM = 143
_TRIM_EVERY = 50
"""Steps: about a minute of a CPU."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints whole, and reads them without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See :func:`sparserefine.training.checkpoint.write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """See :func:`sparserefine.training.checkpoint.read_checkpoint`."""
        return read_checkpoint(Path(path))


class SaveLast(Checkpoint):
    """Saves the checkpoint after each validation."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves it."""
        trainer.save_checkpoint(self._path)


class Trim(Callback):
    """Keeps the memory of a run on the CPU near what is in use."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Gives free memory back now and then."""
        if trainer.global_step % _TRIM_EVERY == 0:
            give_back_free_memory()


class RunBar(TQDMProgressBar):
    """A progress bar with loss and density, crops per second and memory in use."""

    def __init__(self, batch: int, device: torch.device) -> None:
        # Each time it is drawn, it reads the loss.
        super().__init__(refresh_rate=1 if device.type == "cpu" else READ_EVERY)
        self._batch, self._device, self._process = batch, device, psutil.Process()
        self._began, self._batches = time.perf_counter(), 0

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Starts the clock."""
        super().on_train_epoch_start(trainer, *args)
        self._began, self._batches = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Counts."""
        self._batches += 1
        super().on_train_batch_end(trainer, *args)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, its density, and what is measured here."""
        assert isinstance(pl_module, RefinerModule)
        on_gpu = self._device.type == "cuda"
        used = torch.cuda.max_memory_allocated(self._device) if on_gpu else self._process.memory_info().rss
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return {
            **super().get_metrics(trainer, pl_module),
            "density": f"{pl_module.density:.3f}",
            "crops/s": f"{self._batches * self._batch / seconds:.1f}",
            "GB": f"{used / 1e9:.1f}",
        }


def fit(
    module: RefinerModule, crops: CropDataset, val: WholeImages, device: torch.device, checkpoint: Path | None
) -> None:
    """Trains the module, which writes ``best/`` and a checkpoint at each validation.

    Args:
        module: the refiner with its configuration.
        crops: the training split.
        val: the validation split.
        device: where to train.
        checkpoint: where to go on; ``None``: at step 0.

    Raises:
        CheckpointError: the checkpoint cannot be restored.
        DivergedError: a loss, gradient or weight became NaN or infinite.
        KeyboardInterrupt: the run was interrupted or terminated; all files are whole.
    """
    c, out = module.config.training, Path(module.config.out)
    steps_per_epoch = min(c.val_every, c.steps)
    loader = CropLoader(crops, c.batch, steps_per_epoch * c.accumulate, c.workers)
    val_loader = DataLoader(val, batch_size=1, collate_fn=WholeImages.collate)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # below that it prints advertisements
    trainer = L.Trainer(
        default_root_dir=out / "none",  # where Lightning would look for checkpoints that it made for a cluster
        max_epochs=c.steps // steps_per_epoch,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1,
        precision=c.precision,
        gradient_clip_val=c.clip,
        accumulate_grad_batches=c.accumulate,
        callbacks=[RunBar(c.batch, device), SaveLast(out / LAST), *([Trim()] if device.type == "cpu" else [])],
        # One process on one device, whatever the variables of SLURM, torchrun and other launchers say.
        plugins=[LightningEnvironment(), WholeCheckpoints()],
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        for message in _NOT_SO:
            warnings.filterwarnings("ignore", message)
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, loader, val_loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:  # Lightning makes this of Ctrl-C and SIGTERM
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            if trainer.received_sigterm:
                raise SystemExit(_EXIT_SIGTERM) from None
            raise
        except (MemoryError, torch.OutOfMemoryError, OSError, ImportError):  # of the machine, not of the checkpoint
            raise
        except Exception as error:
            if checkpoint is None or module.restored:
                raise
            raise CheckpointError(f"{checkpoint}: cannot be restored ({first_line(error)})") from error
        finally:  # Lightning answers Ctrl-C by ignoring any further one, for ever
            if interrupt is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupt)
