"""Pascal VOC 2012, semantic segmentation: 21 classes, labels with a palette (Everingham et al. 2012)."""

from __future__ import annotations

from pathlib import Path

from sparserefine.data.readers.dataset import Dataset, Sample, checked
from sparserefine.data.readers.published import Published, stems
from sparserefine.images.classes import Classes, wheel

ORIGIN = Published("Pascal VOC 2012", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012", "under the terms of flickr")
_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
CLASSES = Classes(_NAMES, tuple(wheel(k) for k in range(len(_NAMES))))
_WITHOUT_LABELS = "test"


def voc2012(root: str | Path, split: str) -> Dataset:
    """Reads the images that ``ImageSets/Segmentation/<split>.txt`` lists.

    Images are in ``JPEGImages/``, labels in ``SegmentationClass/``, in which 255 is the rim of objects. The usual list
    of 10,582 images, with labels of Hariharan et al. 2011, is read if it is there: as ``train_aug.txt`` beside the
    other lists, with the folder ``SegmentationClassAug/``.

    Args:
        root: the folder ``VOC2012``, or one above it.
        split: ``train``, ``val``, ``trainval``, ``test`` (without labels), ``train_aug``, or another list beside them;
            labels of lists whose name ends in ``aug`` are those of ``SegmentationClassAug/``.

    Raises:
        ValueError: a part is missing.
        OSError: a file is missing.
    """
    places = [Path(root) / below for below in ("", "VOC2012", "VOCdevkit/VOC2012")]
    root = next((place for place in places if (place / "JPEGImages").is_dir()), places[0])
    images, listed = ORIGIN.folder(root / "JPEGImages"), root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = stems(ORIGIN.file(listed))
    folder = root / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    labels = None if split == _WITHOUT_LABELS else ORIGIN.folder(folder)
    samples = [
        Sample(
            name,
            ORIGIN.file(images / f"{name}.jpg"),
            None if labels is None else ORIGIN.file(labels / f"{name}.png"),
        )
        for name in names
    ]
    return checked(samples, CLASSES, root, split)
