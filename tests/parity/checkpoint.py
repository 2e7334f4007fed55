"""Writes ``tests/data/parity/mmengine.pth``: what mmengine 0.10.7 saves while it trains, of a model of a few numbers.

Runs in the environment of ``make parity``. Beside the weights it holds the optimiser's state, the scheduler's, and the
log with its numpy arrays, which no reader of plain weights takes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset


class Images(Dataset):
    """Four images of one colour each."""

    metainfo: ClassVar[dict[str, Any]] = {
        "classes": ("road", "sky"),
        "palette": [[128, 64, 128], [70, 130, 180]],
        "label_map": None,
        "reduce_zero_label": False,
    }

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": torch.full((3, 4, 4), index / 4)}


class Tiny(BaseModel):
    """A convolution, a normalisation and a classifier, under the names that mmsegmentation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
        self.decode_head = nn.Conv2d(2, 2, 1)

    def forward(self, inputs: list[Tensor], mode: str) -> Any:
        """A loss without meaning, in training."""
        logits = self.decode_head(self.backbone(torch.stack(inputs)))
        return {"loss": logits.square().mean()} if mode == "loss" else logits


def main(target: Path) -> None:
    """Trains for three iterations and moves what mmengine's own hook saved."""
    target = target.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # mmengine notes the path, and the git commit of where it runs
        runner = Runner(
            Tiny(),
            work_dir=".",
            train_dataloader={
                "batch_size": 2,
                "dataset": Images(),
                "sampler": {"type": "DefaultSampler", "shuffle": False},
            },
            train_cfg={"by_epoch": False, "max_iters": 3},
            optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01}},
            param_scheduler=[{"type": "PolyLR", "eta_min": 1e-4, "begin": 0, "end": 3, "by_epoch": False}],
            default_hooks={
                "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 3},
                "logger": {"type": "LoggerHook", "interval": 1},
            },
            log_level="ERROR",
            experiment_name="tiny",
            randomness={"seed": 0},
        )
        runner.train()
        shutil.copy("iter_3.pth", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
