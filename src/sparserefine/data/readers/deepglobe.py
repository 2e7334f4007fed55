"""DeepGlobe land cover: 1,146 satellite images of 2448 x 2448 pixels, labels as colours (Demir et al. 2018)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, checked, pairs
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.data.readers.published import Published, stems
from sparserefine.images.classes import Classes

ORIGIN = Published("DeepGlobe land cover", "http://deepglobe.org", "for research, under the terms of the challenge")
CLASSES = Classes(
    ("urban", "agriculture", "rangeland", "forest", "water", "barren"),
    ((0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), (0, 0, 255), (255, 255, 255)),
)
COLOURS = LabelsConfig("colour", map={"0 0 0": None}, tolerance=127)
"""Black is unknown. The makers say that masks are not pure, and to cut each channel at 128."""


def deepglobe(root: str | Path, split: str) -> Dataset:
    """Reads ``<split>/<number>_sat.jpg`` with ``<number>_mask.png`` beside it.

    Only ``train`` has published labels, so people divide it: a list ``<split>.txt`` in the folder names images of
    ``train``, one a line: ``119`` or ``119_sat.jpg``.

    Args:
        root: folder with ``train/``.
        split: a folder of it, such as ``train``, or the stem of a list.

    Raises:
        ValueError: a part is missing, or a list names an image that there is not.
    """
    root = Path(root)
    listed = root / f"{split}.txt"
    below = "train" if listed.exists() else split
    folder = ORIGIN.folder(root / below)
    labels = root if any(folder.glob("*_mask.png")) else None
    samples = pairs(root, labels, below, image_suffix="_sat", label_suffix="_mask")
    if listed.exists():
        by_name = {sample.name.removeprefix(f"{below}/"): sample for sample in samples}
        names = [name.removesuffix("_mask").removesuffix("_sat") for name in stems(listed)]
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            raise ValueError(f"{listed} lists {missing!r}, which is not in {folder}")
        samples = [by_name[name] for name in dict.fromkeys(names)]
    return checked(samples, CLASSES, root, split, COLOURS)
