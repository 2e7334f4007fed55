"""The Lightning module: losses at the sites of crops, scores on whole validation images."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sparserefine.data.batches import CropBatch
from sparserefine.images.classes import IGNORE
from sparserefine.images.pictures import labels_picture, shrink, side_by_side
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.counts import Counts
from sparserefine.stages.refinement import Refinement
from sparserefine.training.averages import WeightMean
from sparserefine.training.checks import FiniteWatch, Seen, check_finite_weights
from sparserefine.training.config import Config
from sparserefine.training.deep import DeepHeads
from sparserefine.training.items import WholeImage
from sparserefine.training.losses import refinement_loss
from sparserefine.training.record import RunRecord
from sparserefine.training.soft_losses import teacher_at_sites, teacher_loss
from sparserefine.training.teacher import teacher_labels
from sparserefine.training.weights import SiteWeights

_PICTURE_PX = 330  # three of them are about 1,000 pixels wide
_AGREEMENT = "agreement_"
"""Before the names of scores whose truth is the teacher's most probable classes."""


class RefinerModule(L.LightningModule):
    """Trains the extractor and the ensembler. The base is frozen; batches contain its logits.

    The best refiner is the one with the highest refined score: Dice of class 1 for two classes, mean IoU for more. The
    truth is the labels, or the teacher's most probable classes if the validation images have no labels.

    Args:
        refiner: the refiner to train.
        config: losses and schedule. This module writes ``<out>/best``.
        record: takes the scores and pictures.
        labelled: whether the validation images have labels.

    Attributes:
        best_score: the highest refined score so far; minus infinity if there was none.
        density: share of the pixels that were refined in the last batch.
        learnt: number of sites with a target in all steps so far: labelled sites, or all of them if there is a teacher.
        restored: whether training has begun, so that nothing of a checkpoint is left to restore.
    """

    def __init__(self, refiner: SparseRefiner, config: Config, record: RunRecord, labelled: bool = True) -> None:
        super().__init__()
        self.refiner, self.config, self.record, self.labelled = refiner, config, record, labelled
        self.strict_loading = False  # checkpoints do not contain the base
        self.best_score = -math.inf
        self.density = 0.0
        self.learnt = 0
        self.restored = False
        self._counts = self._no_counts()
        self._density: list[float] = []
        self._losses: list[Tensor] = []
        self._labelled: list[Tensor] = []
        self._names: list[str] = []
        self._watch = FiniteWatch()
        self._mean = WeightMean(refiner, config.training.ema)
        self._with_mean = ExitStack()
        self._weights = SiteWeights(config.training.class_weights, config.training.boundary_weight)
        deep = config.training.deep_supervision > 0 and len(config.refiner.extractor.planes) > 1
        self._deep = DeepHeads(refiner.extractor, refiner.base.num_classes) if deep else None

    def on_train_start(self) -> None:
        """Everything is restored."""
        self.restored = True

    def training_step(self, batch: CropBatch, _: int) -> Tensor:
        """Loss of one batch of crops."""
        with self._deep.watching() if self._deep else nullcontext():
            result = self.refiner.refine(batch.image, batch.logits, windows=batch.parts, valid=batch.valid)
        truth = result.sites.gather(batch.label[:, None])[:, 0]
        loss, has_target = self._loss(result, truth, batch)
        self.log("loss", loss.detach(), prog_bar=True)
        self.density = result.density  # logged, it would be copied to the GPU
        self._losses.append(loss.detach())
        self._labelled.append(has_target.sum())
        self._names += batch.names
        self._watch.add(self._seen("loss", loss.detach(), batch.names))
        return loss

    def _loss(self, result: Refinement, truth: Tensor, batch: CropBatch) -> tuple[Tensor, Tensor]:
        """The loss, and which sites have a target, ``bool [N]``."""
        c, labelled = self.config.training, truth != IGNORE
        sparse, refined = result.sparse_logits, result.refined_logits
        loss = sparse.new_zeros(())
        if c.targets != "teacher":
            weight = self._weights.by_labels(truth, batch.label, result.sites)
            loss = refinement_loss(sparse, refined, truth, c.dice, weight)
        if batch.teacher is not None:
            teacher = teacher_at_sites(batch.teacher, batch.windows, result.sites)
            weight = self._weights.by_teacher(teacher)
            taught = teacher_loss(sparse, refined, teacher, c.temperature, c.dice, weight)
            loss = loss + (c.teacher_weight if c.targets == "both" else 1) * taught
            labelled = torch.ones_like(labelled)
            if c.targets == "teacher":
                truth = teacher.argmax(1)
        if self._deep is not None:
            loss = loss + c.deep_supervision * self._deep.loss(truth)
        return loss, labelled

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Scales a long gradient down. Its length must be finite, too: a NaN in it would reach every weight."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.training.clip)
        names, self._names = self._names, []
        if self.config.training.precision != "16-mixed":  # there, steps that overflow are skipped
            self._watch.add(self._seen("gradient norm", norm, names))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, and the mean of the weights follows."""
        super().optimizer_step(*args, **kwargs)
        self._mean.update()

    def on_fit_end(self) -> None:
        """The result is the mean, if there is one."""
        self._mean.use()

    def _seen(self, what: str, value: Tensor, names: list[str]) -> Seen:
        return Seen(what, value, names, self.global_step + 1, self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_epoch_start(self) -> None:
        """Nothing is scored or stored unless all losses and weights are finite."""
        self._watch.check()
        check_finite_weights(self.refiner, self.global_step)
        self._with_mean.enter_context(self._mean.in_use())

    def validation_step(self, item: WholeImage, index: int) -> None:
        """Scores one whole image."""
        result = self.refiner.refine(item.image[None], item.logits[None], valid=item.valid_batch)
        k, labels = self.refiner.base.num_classes, {"coarse": result.coarse_labels[0], "refined": result.labels()[0]}
        truths = {"": item.label} if self.labelled else {}
        if item.teacher is not None:
            size, engine = (item.label.shape[0], item.label.shape[1]), self.refiner.engine.on(item.label.device)
            taught = teacher_labels(item.teacher, size, engine)
            truths[_AGREEMENT] = taught if item.valid is None else torch.where(item.valid, taught, IGNORE)
        for kind, truth in truths.items():
            for name, predicted in labels.items():
                self._counts[kind + name] += Counts.of(predicted, truth, k)
        self._density.append(result.density)
        if index < self.config.training.pictures:
            self.record.picture(self.global_step, item.name, self._picture(item, result))

    def _picture(self, item: WholeImage, result: Refinement) -> Tensor:
        """The image beside its coarse and refined labels."""
        classes = self.refiner.classes
        panels = (
            ("image", item.image),
            ("coarse", labels_picture(result.coarse_labels[0], classes)),
            ("refined", labels_picture(result.labels()[0], classes)),
        )
        return side_by_side([(caption, shrink(picture, _PICTURE_PX)) for caption, picture in panels])

    def on_validation_epoch_end(self) -> None:
        """Records the scores, and saves the refiner if it is the best so far."""
        scores = {name: self._score(counts) for name, counts in self._counts.items()}
        score = scores["refined" if self.labelled else f"{_AGREEMENT}refined"]
        self.log("val_score", score, prog_bar=True)
        self.learnt += int(torch.stack(self._labelled).sum()) if self._labelled else 0
        self.record.scores(
            self.global_step,
            {
                "loss": round(float(torch.stack(self._losses).mean()), 4) if self._losses else None,
                **{f"val_{name}": None if math.isnan(x) else round(x, 4) for name, x in scores.items()},
                "val_density": round(sum(self._density) / len(self._density), 4),
            },
        )
        if self.learnt and score > self.best_score:
            self.best_score = score
            self.refiner.save_pretrained(Path(self.config.out) / "best")
        self._with_mean.close()
        self._counts = self._no_counts()
        for values in (self._density, self._losses, self._labelled):
            values.clear()

    def _no_counts(self) -> dict[str, Counts]:
        """For each score of the log: of coarse and refined predictions, by the labels and by the teacher."""
        kinds = ("",) if self.labelled else ()
        if self.config.training.targets != "labels":
            kinds = (*kinds, _AGREEMENT)
        return {
            kind + name: Counts.zero(self.refiner.base.num_classes) for kind in kinds for name in ("coarse", "refined")
        }

    def _score(self, counts: Counts) -> float:
        """NaN, which is never the best, if nothing can be scored: no pixel is labelled, or none as class 1 of two."""
        if self.refiner.base.num_classes > 2:
            return counts.iou()
        return counts.dice() if counts.matrix[1].any() else math.nan

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on weights only; linear warm-up, then a cosine to zero."""
        c = self.config.training
        parameters = list(self.refiner.trained_parameters())
        parameters += [] if self._deep is None else self._deep.parameters()
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
        """Makes the crops of a training batch on the device; moves anything else as Lightning does."""
        if isinstance(batch, list):
            return CropBatch.of(batch, self.config.augment.crop, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes the base from the checkpoint, as it is not trained."""
        check_finite_weights(self.refiner, self.global_step)
        state = checkpoint["state_dict"]
        trained = {k: v for k, v in state.items() if k.startswith("refiner.") and not k.startswith("refiner.base.")}
        checkpoint["state_dict"] = trained
        checkpoint["heads"] = {} if self._deep is None else self._deep.state_dict()
        checkpoint["best_score"] = self.best_score
        checkpoint["learnt"] = self.learnt
        checkpoint["mean"] = self._mean.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what was reached so far."""
        self.best_score = checkpoint["best_score"]
        self.learnt = checkpoint.get("learnt", 1)  # checkpoints of older versions do not tell: assume something
        self._mean.load(checkpoint.get("mean"))
        if self._deep is not None:
            self._deep.load_state_dict(checkpoint["heads"])
