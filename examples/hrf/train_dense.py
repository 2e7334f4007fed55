"""Trains the plain U-Net on HRF at any resolution: base, cross-fit folds and dense peer are the same recipe.

    python examples/hrf/train_dense.py --ratio 0.25 --out runs/hrf/base4

Images are downsized once (antialiased), labels to the share of vessel in each pixel, so that a coarse pixel that a thin
vessel half covers is learnt as "uncertain" and not as one or the other. Validation is on the full-size label, logits
upsampled, as everywhere in this project. ``curve.jsonl`` holds the validation curve.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.families.unet import UNet, load_unet, save_unet
from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.hrf import hrf
from sparserefine.machine.device import device_named
from sparserefine.scores.confusion import confusion, dice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/hrf")
    parser.add_argument("--ratio", type=float, required=True, help="size of the network's input relative to the image")
    parser.add_argument("--train", default="06-13")
    parser.add_argument("--val", default="14-15")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="weights to start from (a lower resolution's)")
    parser.add_argument("--planes", type=int, nargs="+", default=[16, 32, 64, 96, 128])
    parser.add_argument("--crop", type=int, nargs=2, default=[448, 448])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--val-every", type=int, default=200)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def normalised(image: Tensor) -> Tensor:
    """``uint8 [..., 3, H, W]`` -> float32, zero mean and unit spread."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((image.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def downsized(image: Tensor, label: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Image ``uint8 [3, h, w]`` and vessel share ``uint8 [h, w]`` (255 = all vessel) at ``ratio`` of the size."""
    size = (round(image.shape[1] * ratio), round(image.shape[2] * ratio))
    share = label * 255
    if size == tuple(label.shape):
        return image, share
    both = torch.cat([image, share[None]])[None].float()
    both = F.interpolate(both, size, mode="bilinear", antialias=True)[0].round().clamp(0, 255).to(torch.uint8)
    return both[:3].contiguous(), both[3].contiguous()


def crops(data: list[tuple[Tensor, Tensor]], args: argparse.Namespace, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of augmented crops: rescaled 0.75-1.33, flipped, transposed, brightness/contrast/colour changed."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    images, shares, colours = [], [], []
    for _ in range(args.batch):
        image, share = data[int(torch.randint(len(data), (), generator=rng))]
        scale = math.exp(uniform(-0.29, 0.29))
        h, w = (min(size, round(c / scale)) for size, c in zip(share.shape, args.crop, strict=True))
        top, left = int(uniform(0, share.shape[0] - h + 0.99)), int(uniform(0, share.shape[1] - w + 0.99))
        both = torch.cat(
            [image[:, top : top + h, left : left + w], share[None, top : top + h, left : left + w]]
        ).float()
        if abs(scale - 1) > 0.05:
            both = F.interpolate(both[None], args.crop, mode="bilinear", antialias=scale < 1)[0]
        else:
            both = F.pad(both, (0, max(0, args.crop[1] - w), 0, max(0, args.crop[0] - h)))
            both = both[:, : args.crop[0], : args.crop[1]]
        for axis in (1, 2):
            if uniform(0, 1) < 0.5:
                both = both.flip(axis)
        if args.crop[0] == args.crop[1] and uniform(0, 1) < 0.5:
            both = both.transpose(1, 2)
        brightness = uniform(0.75, 1.25)
        colours.append([*(uniform(0.9, 1.1) * brightness for _ in range(3)), uniform(-20, 20), uniform(0.8, 1.25)])
        images.append(both[:3])
        shares.append(both[3] / 255)
    colour = torch.tensor(colours).to(images[0].device)[:, :, None, None]
    gain, shift, gamma = colour[:, :3], colour[:, 3:4], colour[:, 4:]
    recoloured = 255 * ((torch.stack(images) * gain + shift).clamp(0, 255) / 255) ** gamma
    return normalised(recoloured), torch.stack(shares)


def loss_of(logits: Tensor, share: Tensor) -> Tensor:
    """Cross entropy against the vessel share, plus half a soft Dice loss over the batch."""
    margin = logits[:, 1] - logits[:, 0]
    p = margin.sigmoid()
    overlap = 1 - (2 * (p * share).sum() + 1) / (p.sum() + share.sum() + 1)
    return F.binary_cross_entropy_with_logits(margin, share) + 0.5 * overlap


@torch.no_grad()
def validate(model: UNet, data: list[tuple[Tensor, Tensor]]) -> float:
    """Dataset-wide vessel Dice at full size; ``data`` holds downsized images and full-size labels."""
    model.eval()
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    for image, label in data:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits = model(normalised(image[None]))
        margin = (logits[:, 1:] - logits[:, :1]).float()
        full = F.interpolate(margin, label.shape, mode="bilinear", align_corners=False)[0, 0]
        matrix += confusion(full > 0, label, 2).cpu()
    model.train()
    return float(dice(matrix)[1])


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_named(args.device)
    train_set, val_set = hrf(args.data, args.train), hrf(args.data, args.val)

    def read(data: Dataset, index: int) -> tuple[Tensor, Tensor]:
        image, label = data.read(index)
        return image.to(device), label.to(device)

    train = [downsized(*read(train_set, i), args.ratio) for i in range(len(train_set))]
    val = [
        (downsized(image, label, args.ratio)[0], label) for image, label in (read(val_set, i) for i in range(len(val_set)))
    ]

    model = load_unet(args.init) if args.init else UNet(2, args.planes)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.steps, pct_start=0.1)
    best, started, running = 0.0, time.monotonic(), torch.zeros((), device=device)
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
                line = {"step": step, "val_dice": round(score, 4), "loss": round(float(running) / args.val_every, 4)}
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
