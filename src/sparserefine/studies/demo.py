"""``sparserefine demo``: compares coarse, refined and dense predictions of an embedded photograph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sparserefine.bases.base import FrozenBase
from sparserefine.bases.load import load_base
from sparserefine.files.images import read_image, write_png
from sparserefine.files.labels import read_label
from sparserefine.files.regular import given_path
from sparserefine.files.results import write_results
from sparserefine.files.text import printable
from sparserefine.files.whole import sweep
from sparserefine.images.classes import Classes
from sparserefine.images.pictures import changes, heat, labels_picture, overlay, shrink, side_by_side, sites_picture
from sparserefine.images.upsampling import entropy_limit
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.refinement import Refinement
from sparserefine.storage import DEMO
from sparserefine.studies.evaluate import Evaluation, evaluate

ASSETS = Path(__file__).parents[1] / "assets" / "demo"
IMAGE = "01_h"
"""The embedded photograph: HRF 01_h (Budai et al. 2013, CC BY 4.0), from the test split."""
BOUNDARY_PX = 3
"""Width of the band of boundary IoU. The published 2 % of the diagonal is wider than the vessels."""
_LONGEST, _CROP, _ZOOM = 1600, 256, 2  # pictures: longest side [px], side of the crop [px], its magnification


def demo_refiner_folder() -> Path:
    """Folder of the embedded refiner and its base, trained on HRF subjects 06-13 (``examples/hrf``)."""
    return DEMO


def dense_peer(refiner: SparseRefiner) -> FrozenBase:
    """The embedded dense model: the base's architecture, trained and run at full resolution."""
    config = replace(refiner.base.config, name=f"unet:{ASSETS / 'dense.safetensors'}", ratio=1.0, size=None)
    return load_base(config, refiner.classes)


def demo(out: str | Path, *, device: torch.device, repeats: int = 2) -> str:
    """Predicts and scores the embedded photograph; writes pictures and ``demo.json`` into ``out``.

    The photograph (HRF 01_h, Budai et al. 2013, CC BY 4.0) is from the test split: no network has seen its subject.

    Args:
        out: output folder; it is created.
        device: where to run.
        repeats: timed runs of each prediction; their median is reported.

    Returns:
        The table of scores and costs, and the names of the pictures, as text.

    Raises:
        ValueError: ``out`` is empty, or no folder.
    """
    out = given_path(out, "out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{printable(out)}: is a file, expected a folder, or a new name, for the pictures")
    sweep(out)
    refiner = SparseRefiner.from_pretrained(demo_refiner_folder()).to(device)
    dense = dense_peer(refiner).to(device)
    image, truth = read_image(ASSETS / f"{IMAGE}.webp"), read_label(ASSETS / f"{IMAGE}.png")

    seen_results: list[tuple[Refinement, dict[str, Tensor]]] = []
    with tqdm(desc="demo", total=6, bar_format="{desc:24} {bar} {n_fmt}/{total_fmt} [{elapsed}]") as bar:

        def progress(stage: str) -> None:
            bar.set_description_str(stage)
            bar.update()

        result = evaluate(
            refiner,
            [(image, truth)],
            dense=dense,
            boundary_px=BOUNDARY_PX,
            repeats=repeats,
            seen=lambda refinement, labels: seen_results.append((refinement, labels)),
            progress=progress,
        )
        progress("writing pictures")
        refinement, labels = seen_results[0]
        pictures = draw(image, truth, refinement, labels, refiner.classes)
        for name, picture in pictures.items():
            write_png(out / f"{name}.png", picture)
        progress("done")
    report = {
        "image": f"HRF {IMAGE}, {image.shape[2]}x{image.shape[1]}, Budai et al. 2013, CC BY 4.0",
        "density": result.density,
        "errors_selected": result.errors_selected,
        "selector": result.selector,
        "stages_ms": result.stages_ms,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rows": result.rows,
        "agreement": result.agreement,
    }
    write_results(out / "demo.json", report)
    return _text(result, image, device, out, list(pictures))


def draw(
    image: Tensor, truth: Tensor, refinement: Refinement, labels: dict[str, Tensor], classes: Classes
) -> dict[str, Tensor]:
    """The demo's pictures by file stem, ``uint8 [3, h, w]``, drawn from ``uint8 [3, H, W]`` and labels ``[H, W]``."""
    coarse, refined = labels["coarse"], labels["refined"]
    whole = {
        "1_image": image,
        "2_coarse": labels_picture(coarse, classes),
        "3_entropy": heat(refinement.coarse_entropy[0], entropy_limit(len(classes))),
        "4_sites": sites_picture(image, refinement.sites.mask()[0]),
        "5_refined": labels_picture(refined, classes),
        "6_changes": changes(coarse, refined, truth),
    }
    pictures = {name: shrink(picture, _LONGEST) for name, picture in whole.items()}
    top, left = _densest_window(refinement.sites.mask()[0], _CROP)

    def crop(x: Tensor) -> Tensor:
        return x[..., top : top + _CROP, left : left + _CROP]

    def density(x: float) -> str:
        return f"{x:.0%} of the pixels"

    panels = [
        ("image", crop(image)),
        ("truth", crop(labels_picture(truth, classes))),
        ("coarse", crop(whole["2_coarse"])),
        ("entropy of coarse", crop(whole["3_entropy"])),
        (f"sites: {density(refinement.density)}", crop(whole["4_sites"])),
        ("refined", crop(whole["5_refined"])),
        ("corrected (blue), broken (orange)", crop(whole["6_changes"])),
        ("dense at full size", crop(labels_picture(labels["dense"], classes))),
    ]
    pictures["7_zoom"] = side_by_side(panels, zoom=_ZOOM, columns=4)
    pictures["8_overlay"] = shrink(overlay(image, refined, classes), _LONGEST)
    return pictures


def _densest_window(mask: Tensor, size: int) -> tuple[int, int]:
    """Row and column [px] of the window with most sites. The truth plays no part in this choice."""
    stride = size // 4
    counts = F.avg_pool2d(mask[None, None].float(), size, stride)[0, 0]
    row, column = divmod(int(counts.argmax()), counts.shape[1])
    return row * stride, column * stride


def _text(result: Evaluation, image: Tensor, device: torch.device, out: Path, pictures: list[str]) -> str:
    dense, refined = result.rows["dense"], result.rows["refined"]
    return "\n".join(
        [
            "",
            f"HRF {IMAGE} (Budai et al. 2013, CC BY 4.0), {image.shape[2]}x{image.shape[1]} pixels, on {device}, "
            f"{torch.get_num_threads()} threads; Dice, IoU and boundary IoU ({BOUNDARY_PX} px) of the vessels",
            "",
            result.table(),
            f"refined / dense: {refined['ms'] / dense['ms']:.2f} of the time, "
            f"{refined['gmacs'] / dense['gmacs']:.2f} of the operations",
            "",
            f"Pictures and demo.json are in {printable(out)}{'' if str(out).endswith('/') else '/'}: "
            + ", ".join(f"{name}.png" for name in pictures),
        ]
    )
