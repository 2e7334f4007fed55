"""The Lightning module: losses at the sites of crops, scores on whole validation images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sparserefine.data.crops import CropBatch
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.counts import Counts
from sparserefine.training.config import Config
from sparserefine.training.losses import refinement_loss

ValidationItem = tuple[Tensor, Tensor, Tensor]
"""Image ``uint8 [3, H, W]``, label ``[H, W]``, coarse logits ``[K, h, w]``."""


class RefinerModule(L.LightningModule):
    """Trains the extractor and the ensembler. The base is frozen; batches contain its logits.

    The best refiner is the one with the highest refined score: Dice of class 1 for two classes, mean IoU for more.

    Args:
        refiner: the refiner to train.
        config: losses and schedule. This module writes ``<out>/best`` and ``<out>/log.jsonl``.
    """

    def __init__(self, refiner: SparseRefiner, config: Config) -> None:
        super().__init__()
        self.refiner, self.config = refiner, config
        self.strict_loading = False  # checkpoints do not contain the base
        self.best_score = -math.inf
        k = refiner.base.num_classes
        self._counts = {name: Counts.zero(k) for name in ("coarse", "refined")}
        self._density: list[float] = []
        self._losses: list[Tensor] = []

    def training_step(self, batch: CropBatch, _: int) -> Tensor:
        """Loss of one batch of crops."""
        result = self.refiner.refine(batch.image, batch.logits, windows=batch.windows, valid=batch.valid)
        truth = result.sites.gather(batch.label[:, None])[:, 0]
        loss = refinement_loss(result.sparse_logits, result.refined_logits, truth, self.config.training.dice)
        self.log("loss", loss.detach(), prog_bar=True)
        self.log("density", result.density, prog_bar=True)
        self._losses.append(loss.detach())
        return loss

    def validation_step(self, item: ValidationItem, _: int) -> None:
        """Scores one whole image."""
        image, label, logits = item
        result = self.refiner.refine(image[None], logits[None])
        k = self.refiner.base.num_classes
        self._counts["coarse"] += Counts.of(result.coarse_labels[0], label, k)
        self._counts["refined"] += Counts.of(result.labels()[0], label, k)
        self._density.append(result.density)

    def on_validation_epoch_end(self) -> None:
        """Logs the scores, and saves the refiner if it is the best so far."""
        if not self.trainer.sanity_checking:
            two = self.refiner.base.num_classes == 2
            scores = {name: counts.dice() if two else counts.iou() for name, counts in self._counts.items()}
            self.log("val_score", scores["refined"], prog_bar=True)
            line = {
                "step": self.global_step,
                "loss": round(float(torch.stack(self._losses).mean()), 4) if self._losses else None,
                **{f"val_{name}": None if math.isnan(x) else round(x, 4) for name, x in scores.items()},
                "val_density": round(sum(self._density) / len(self._density), 4),
            }
            with (Path(self.config.out) / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            # NaN: the foreground class neither occurs in the split nor is predicted.
            score = -1.0 if math.isnan(scores["refined"]) else scores["refined"]
            if score > self.best_score:
                self.best_score = score
                self.refiner.save_pretrained(Path(self.config.out) / "best")
        self._counts = {name: Counts.zero(self.refiner.base.num_classes) for name in self._counts}
        self._density.clear()
        self._losses.clear()

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on weights only; linear warm-up, then a cosine to zero."""
        c = self.config.training
        parameters = list(self.refiner.trained_parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": c.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=c.lr)
        warmup = max(1, round(c.warmup * c.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, c.steps - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves crops with :meth:`CropBatch.to`, and anything else as Lightning does."""
        return (
            batch.to(device)
            if isinstance(batch, CropBatch)
            else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes the base from the checkpoint, as it is not trained."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("refiner.base.")}
        checkpoint["best_score"] = self.best_score

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the best score so far."""
        self.best_score = checkpoint["best_score"]
