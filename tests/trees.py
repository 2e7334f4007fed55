"""Tiny datasets in their official layouts, with official label values: what the readers are tested on.

The values stand here once more, as the datasets' own pages say them, and not as the readers do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IGNORE = 255
CITYSCAPES_IDS = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
    **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
    **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
}
CITYSCAPES_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, parking, rail track, guard rail,
bridge, tunnel, polegroup, caravan, trailer."""
DEEPGLOBE = {
    **{"urban": (0, 255, 255), "agriculture": (255, 255, 0), "rangeland": (255, 0, 255)},
    **{"forest": (0, 255, 0), "water": (0, 0, 255), "barren": (255, 255, 255)},
}
CAMVID = {  # of the 32 published classes one for each of the eleven, and another one where there is
    "sky": ((128, 128, 128),),
    "building": ((128, 0, 0), (64, 192, 0)),
    "pole": ((192, 192, 128), (0, 0, 64)),
    "road": ((128, 64, 128), (128, 0, 192)),
    "pavement": ((0, 0, 192), (128, 128, 192)),
    "tree": ((128, 128, 0), (192, 192, 0)),
    "sign": ((192, 128, 128), (0, 64, 64)),
    "fence": ((64, 64, 128),),
    "car": ((64, 0, 128), (64, 128, 192)),
    "pedestrian": ((64, 64, 0), (192, 128, 64)),
    "cyclist": ((0, 128, 192), (192, 0, 192)),
}
VOC_COLOURS = ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128))
"""Of the first classes."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Tree:
    """A dataset on disk.

    Attributes:
        name: the reader's.
        root: its folder.
        classes: how many there are.
        truth: for each split and sample the classes, ``uint8 [H, W]``, 255 where ignored; ``None``: it has no label.
        settings: further entries of ``data``.
    """

    name: str
    root: Path
    classes: int
    truth: dict[str, dict[str, np.ndarray | None]]
    settings: dict[str, object]


class _Writer:
    """Draws truth and writes files."""

    def __init__(self, root: Path, classes: int, size: tuple[int, int], void: bool = True) -> None:
        self.root, self.classes, self.size, self.void = root, classes, size, void
        self.rng = np.random.default_rng(classes)
        self.truth: dict[str, dict[str, np.ndarray | None]] = {}

    def image(self, path: str) -> None:
        pixels = self.rng.integers(0, 256, (*self.size, 3), dtype=np.uint8)
        self._save(Image.fromarray(pixels), path)

    def draw(self, split: str, name: str) -> np.ndarray:
        """All classes, and ignored pixels, at random in blocks."""
        high, wide = (-(-side // 4) for side in self.size)
        values = np.array([*range(self.classes), *([IGNORE] if self.void else [])], np.uint8)
        blocks = np.resize(values, high * wide)
        assert len(values) <= len(blocks)
        self.rng.shuffle(blocks)
        truth = np.kron(blocks.reshape(high, wide), np.ones((4, 4), np.uint8))[: self.size[0], : self.size[1]]
        self.truth.setdefault(split, {})[name] = truth
        return truth

    def without(self, split: str, name: str) -> None:
        self.truth.setdefault(split, {})[name] = None

    def label(self, path: str, pixels: np.ndarray, palette: list[int] | None = None) -> None:
        image = Image.fromarray(pixels)
        if palette is not None:
            image.putpalette(palette)
        self._save(image, path)

    def text(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def tree(self, name: str, **settings: object) -> Tree:
        return Tree(name, self.root, self.classes, self.truth, settings)

    def _save(self, image: Image.Image, path: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(self.root / path)


def _coded(truth: np.ndarray, values: list[object], void: object) -> np.ndarray:
    """Classes -> the values of a file, numbers or colours."""
    table = np.array([void] * 256, np.uint8)
    table[: len(values)] = values
    return table[truth]


def cityscapes(root: Path, size: tuple[int, int], *, train_ids: bool = False) -> Tree:
    writer = _Writer(root, 19, size)
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "munster"), ("test", "berlin")):
        name = f"{split}/{city}/{city}_000000_000019"
        writer.image(f"leftImg8bit/{name}_leftImg8bit.png")
        labels = f"gtFine/{name}_gtFine"
        truth = writer.draw(split, name)
        ids = _coded(truth, list(CITYSCAPES_IDS.values()), 0)
        void = truth == IGNORE
        ids[void] = np.resize(CITYSCAPES_VOID, void.sum())
        if split == "test":  # all void
            writer.label(f"{labels}_labelIds.png", np.zeros_like(truth))
            writer.without(split, name)
            continue
        writer.label(f"{labels}_color.png", np.zeros((*size, 4), np.uint8))
        writer.label(f"{labels}_instanceIds.png", ids.astype(np.uint16) * 1000)
        writer.label(f"{labels}_{'labelTrainIds' if train_ids else 'labelIds'}.png", truth if train_ids else ids)
        writer.text(f"{labels}_polygons.json", "{}")
    return writer.tree("cityscapes")


def bdd100k(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 19, size)
    for split, name in (("train", "0004a4c0-d4dff0ad"), ("val", "7d06fefd-f7be05a6"), ("test", "ac517380-00000000")):
        writer.image(f"images/10k/{split}/{name}.jpg")
        if split == "test":
            writer.without(split, f"{split}/{name}")
        else:
            writer.label(f"labels/sem_seg/masks/{split}/{name}.png", writer.draw(split, f"{split}/{name}"))
            writer.label(f"labels/sem_seg/colormaps/{split}/{name}.png", np.zeros((*size, 3), np.uint8))
    return writer.tree("bdd100k")


def deepglobe(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 6, size)
    for split, number in (("fit", 119), ("fit", 606), ("choose", 992)):
        writer.image(f"train/{number}_sat.jpg")
        pixels = _coded(writer.draw(split, f"train/{number}"), list(DEEPGLOBE.values()), (0, 0, 0))
        pixels[0] ^= 3  # masks are not pure
        writer.label(f"train/{number}_mask.png", pixels)
    writer.truth["train"] = writer.truth["fit"] | writer.truth["choose"]
    writer.image("valid/1021_sat.jpg")
    writer.without("valid", "valid/1021")
    writer.text("fit.txt", "119\n606\n")
    writer.text("choose.txt", "992_sat.jpg 992_mask.png\n")
    return writer.tree("deepglobe", train="fit", val="choose", test="valid")


def isic2018(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 2, size, void=False)
    for split, of, number in (("train", "Training", 0), ("val", "Validation", 12255), ("test", "Test", 12169)):
        name = f"ISIC_{number:07d}"
        writer.image(f"ISIC2018_Task1-2_{of}_Input/{name}.jpg")
        writer.text(f"ISIC2018_Task1-2_{of}_Input/LICENSE.txt", "CC-0")
        writer.label(f"ISIC2018_Task1_{of}_GroundTruth/{name}_segmentation.png", writer.draw(split, name) * 255)
    return writer.tree("isic2018")


def voc2012(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 21, size)
    palette = [0] * 768
    for value in (*range(21), 255):
        for bit in range(8):
            for channel in range(3):
                palette[3 * value + channel] |= (value >> (3 * bit + channel) & 1) << (7 - bit)
    assert tuple(map(tuple, np.reshape(palette, (-1, 3))[:7].tolist())) == VOC_COLOURS
    inside = "VOCdevkit/VOC2012"
    for split, name in (("train", "2007_000032"), ("val", "2007_000033"), ("test", "2008_000006")):
        writer.image(f"{inside}/JPEGImages/{name}.jpg")
        writer.text(f"{inside}/ImageSets/Segmentation/{split}.txt", f"{name}\n")
        if split == "test":
            writer.without(split, name)
            continue
        truth = writer.draw(split, name)
        writer.label(f"{inside}/SegmentationClass/{name}.png", truth, palette)
        writer.label(f"{inside}/SegmentationClassAug/{name}.png", truth)
    writer.image(f"{inside}/JPEGImages/2008_000002.jpg")  # most images have no labels
    writer.image(f"{inside}/JPEGImages/2008_000003.jpg")
    writer.label(f"{inside}/SegmentationClassAug/2008_000003.png", writer.draw("train_aug", "2008_000003"))
    writer.truth["train_aug"] |= writer.truth["train"]
    names = ("2008_000003", "2007_000032")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names]
    writer.text(f"{inside}/ImageSets/Segmentation/train_aug.txt", "".join(lines))
    return writer.tree("voc2012")


def ade20k(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 150, (max(size[0], 64), max(size[1], 64)))
    for split, of in (("train", "training"), ("val", "validation")):
        name = f"ADE_{of.removesuffix('ing').removesuffix('idation')}_00000001"
        writer.image(f"ADEChallengeData2016/images/{of}/{name}.jpg")
        truth = writer.draw(split, f"{of}/{name}")
        writer.label(
            f"ADEChallengeData2016/annotations/{of}/{name}.png",
            np.where(truth == IGNORE, 0, truth + 1).astype(np.uint8),
        )
    return writer.tree("ade20k", test="val")


def camvid(root: Path, size: tuple[int, int]) -> Tree:
    """In the form of SegNet."""
    writer = _Writer(root, 11, size)
    for split, name in (("train", "0001TP_006690"), ("val", "0016E5_07959"), ("test", "Seq05VD_f00000")):
        writer.image(f"{split}/{name}.png")
        truth = writer.draw(split, name)
        writer.label(f"{split}annot/{name}.png", np.where(truth == IGNORE, 11, truth).astype(np.uint8))
        writer.text(f"{split}.txt", f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n")
    return writer.tree("camvid")


def camvid_colours(root: Path, size: tuple[int, int]) -> Tree:
    """As published, with SegNet's lists."""
    writer = _Writer(root, 11, size)
    for split, name in (("train", "0001TP_006690"), ("val", "0016E5_07959"), ("test", "Seq05VD_f00000")):
        writer.image(f"701_StillsRaw_full/{name}.png")
        truth = writer.draw(split, name)
        pixels = _coded(truth, [colours[0] for colours in CAMVID.values()], (0, 0, 0))
        others = _coded(truth, [colours[-1] for colours in CAMVID.values()], (0, 0, 0))
        pixels[::2] = others[::2]
        writer.label(f"LabeledApproved_full/{name}_L.png", pixels)
        writer.text(f"{split}.txt", f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\r\n")
    return writer.tree("camvid")


def hrf(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 2, size, void=False)
    for split, name in (("01", "01_dr"), ("02", "02_g"), ("03", "03_h")):
        writer.image(f"images/{name}.JPG")
        writer.label(f"manual1/{name}.tif", writer.draw(split, name) * 255)
    return writer.tree("hrf", train="01", val="02", test="03")


def folder(root: Path, size: tuple[int, int]) -> Tree:
    writer = _Writer(root, 3, size)
    for split in SPLITS:
        writer.image(f"images/{split}/a.jpg")
        writer.label(f"labels/{split}/a.png", writer.draw(split, f"{split}/a"))
    writer.text("classes.txt", "road 128 64 128\ncar 0 0 142\ntree\n")
    return writer.tree("folder")


def pairs(root: Path, size: tuple[int, int]) -> Tree:
    writer, rows = _Writer(root, 3, size), ["image,label,split"]
    for split in SPLITS:
        writer.image(f"photos/{split} 1.jpg")
        writer.label(f"masks/{split}.png", writer.draw(split, f"photos/{split} 1"))
        rows.append(f"photos/{split} 1.jpg,masks/{split}.png,{split}")
    writer.text("pairs.csv", "\n".join(rows))
    writer.text("classes.txt", "road\ncar\ntree\n")
    return writer.tree("pairs")


TREES: dict[str, Callable[[Path, tuple[int, int]], Tree]] = {
    **{"ade20k": ade20k, "bdd100k": bdd100k, "camvid": camvid, "camvid_colours": camvid_colours},
    **{"cityscapes": cityscapes, "deepglobe": deepglobe, "folder": folder, "hrf": hrf, "isic2018": isic2018},
    **{"pairs": pairs, "voc2012": voc2012},
}
"""All of them, each ``(root, (height, width)) -> Tree``."""
