"""Trains the plain U-Net at any resolution: bases, bases of the folds and dense peers are one recipe.

    python examples/train_dense.py --data hrf:../shared/data/hrf --train 06-13 --val 14-15 --ratio 0.25 --out runs/base

Images are downsized once (antialiased), labels to the share of each class in each pixel, so that a coarse pixel that a
thin vessel half covers is learnt as "uncertain" and not as one or the other. Validation is on the full-size label,
logits upsampled, as everywhere in this project. ``curve.jsonl`` holds the validation curve: Dice of class 1 of two
classes, else mean IoU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.families.unet import UNet, load_unet, save_unet
from sparserefine.data.readers.config import DataConfig
from sparserefine.machine.device import device_named
from sparserefine.scores.counts import Counts

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="reader and folder: hrf:<folder> or folder:<folder>")
    parser.add_argument("--train", required=True, help="split to train on")
    parser.add_argument("--val", required=True, help="split that chooses the best weights")
    parser.add_argument("--ignore", type=int, nargs="*", default=[], help="label values that are no class")
    parser.add_argument("--ratio", type=float, required=True, help="size of the network's input relative to the image")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="weights to start from (a lower resolution's)")
    parser.add_argument("--planes", type=int, nargs="+", default=[16, 32, 64, 96, 128])
    parser.add_argument("--crop", type=int, nargs=2, default=[448, 448])
    parser.add_argument("--upright", action="store_true", help="mirror left-right only, not upside down too")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--val-every", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def normalised(image: Tensor) -> Tensor:
    """``uint8 [..., 3, H, W]`` -> float32, zero mean and unit spread."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((image.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def downsized(image: Tensor, label: Tensor, k: int, ratio: float) -> Tensor:
    """Image ``uint8 [3, H, W]`` and label ``[H, W]`` -> ``uint8 [3 + K, h, w]`` at ``ratio`` of the size.

    The last K planes are the share of each class in a pixel, 255: all of it. Ignored pixels have no share of any.
    """
    shares = [(label == c).to(torch.uint8) * 255 for c in range(k)]
    both = torch.cat([image, torch.stack(shares)])
    size = (round(image.shape[1] * ratio), round(image.shape[2] * ratio))
    if size == tuple(label.shape):
        return both
    small = F.interpolate(both[None].float(), size, mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8)


def crops(data: list[Tensor], args: argparse.Namespace, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of augmented crops: rescaled 0.75-1.33, mirrored, brightness, contrast and colour changed."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    parts, colours = [], []
    for _ in range(args.batch):
        whole = data[int(torch.randint(len(data), (), generator=rng))]
        scale = math.exp(uniform(-0.29, 0.29))
        h, w = (min(size, round(c / scale)) for size, c in zip(whole.shape[1:], args.crop, strict=True))
        top, left = int(uniform(0, whole.shape[1] - h + 0.99)), int(uniform(0, whole.shape[2] - w + 0.99))
        part = whole[:, top : top + h, left : left + w].float()
        target = [min(c, round(s * scale)) for s, c in zip((h, w), args.crop, strict=True)]
        part = F.interpolate(part[None], target, mode="bilinear", antialias=scale < 1)[0]
        part = F.pad(part, (0, args.crop[1] - target[1], 0, args.crop[0] - target[0]))
        for axis in (2,) if args.upright else (1, 2):
            if uniform(0, 1) < 0.5:
                part = part.flip(axis)
        if not args.upright and args.crop[0] == args.crop[1] and uniform(0, 1) < 0.5:
            part = part.transpose(1, 2)
        brightness = uniform(0.75, 1.25)
        colours.append([*(uniform(0.9, 1.1) * brightness for _ in range(3)), uniform(-20, 20), uniform(0.8, 1.25)])
        parts.append(part)
    both = torch.stack(parts)
    colour = torch.tensor(colours).to(both.device)[:, :, None, None]
    gain, shift, gamma = colour[:, :3], colour[:, 3:4], colour[:, 4:]
    image = 255 * ((both[:, :3] * gain + shift).clamp(0, 255) / 255) ** gamma
    return normalised(image), both[:, 3:] / 255


def loss_of(logits: Tensor, share: Tensor) -> Tensor:
    """Cross entropy against the shares of the classes, plus half a soft Dice loss over the batch.

    Args:
        logits: ``[B, K, h, w]``.
        share: ``[B, K, h, w]``, of sum 1 where nothing is ignored.
    """
    counted = share.sum(1, keepdim=True)
    entropy = -(share * logits.log_softmax(1)).sum() / counted.sum().clamp_min(1)
    p = logits.softmax(1) * counted
    both = (2 * (p * share).sum((0, 2, 3)) + 1) / ((p + share).sum((0, 2, 3)) + 1)
    return entropy + 0.5 * (1 - (both[1] if len(both) == 2 else both.mean()))


@torch.no_grad()
def validate(model: UNet, data: list[tuple[Tensor, Tensor]]) -> float:
    """The score over all images at full size; ``data`` holds downsized images and full-size labels."""
    model.eval()
    counts = Counts.zero(model.num_classes)
    for image, label in data:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits = model(normalised(image[None]))
        full = F.interpolate(logits.float(), label.shape, mode="bilinear", align_corners=False)[0]
        counts += Counts.of(full.argmax(0), label, model.num_classes)
    model.train()
    return counts.dice() if model.num_classes == 2 else counts.mean_iou()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    device, (reader, _, folder) = device_named(args.device), args.data.partition(":")
    config: Any = {"name": reader, "root": folder, "ignore": tuple(args.ignore)}
    splits = [DataConfig(**config).read(split) for split in (args.train, args.val)]
    for data in splits:
        data.check_labelled("train_dense.py")
    k = len(splits[0].classes)
    pairs = [[[part.to(device) for part in data.read(i)] for i in range(len(data))] for data in splits]
    train = [downsized(image, label, k, args.ratio) for image, label in pairs[0]]
    val = [(downsized(image, label, k, args.ratio)[:3], label) for image, label in pairs[1]]
    del pairs

    model = load_unet(args.init) if args.init else UNet(k, args.planes)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.steps, pct_start=0.1)
    best, started, running = -1.0, time.monotonic(), torch.zeros((), device=device)
    with (args.out / "curve.jsonl").open("w") as curve:
        for step in range(1, args.steps + 1):
            image, share = crops(train, args, rng)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(image)
            loss = loss_of(logits.float(), share)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            running += loss.detach()
            if step % args.val_every == 0 or step == args.steps:
                score = validate(model, val)
                line = {"step": step, "val": round(score, 4), "loss": round(float(running) / args.val_every, 4)}
                line["minutes"] = round((time.monotonic() - started) / 60, 2)
                print(json.dumps(line), file=curve, flush=True)
                print(args.out.name, line, flush=True)
                running.zero_()
                if score > best:
                    best = score
                    save_unet(model, args.out / "best.safetensors")
    save_unet(model, args.out / "last.safetensors")


if __name__ == "__main__":
    main()
