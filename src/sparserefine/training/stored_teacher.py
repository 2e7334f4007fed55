"""The teacher's predictions of one split: on disk, one file per image, or in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.tensors import not_finite, read_tensors
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.images.uncertainty import label_dtype
from sparserefine.training.prediction_files import PredictionFiles

_CONTENT = "content_sha256"


class StoredTeacher(PredictionFiles):
    """A folder of the teacher's predictions; see :class:`PredictionFiles`. Headers also have a digest of the values."""

    what, model, setting = "predictions", "teacher", "teacher.folder"

    def write(self, name: str, soft: SoftLabels, *, teacher: str, image_size: tuple[int, int], digest: str) -> None:
        """Stores the prediction of a whole image; see :meth:`PredictionFiles.write_tensors`."""
        tensors = {"values": soft.values.cpu().contiguous(), "classes": soft.classes.cpu().contiguous()}
        content = {_CONTENT: _digest(*tensors.values())}
        self.write_tensors(name, tensors, teacher, image_size, digest, content)

    def read(
        self,
        name: str,
        num_classes: int,
        *,
        teacher: str,
        image_size: tuple[int, int] | None = None,
        digest: str | None = None,
        values: bool = True,
    ) -> SoftLabels:
        """Reads the prediction of a whole image; its tensors may be memory-mapped rather than read.

        Args:
            name: name of the sample.
            num_classes: K.
            teacher: identity of the teacher that must have made it.
            image_size: H and W of the image [px]; default: not compared.
            digest: SHA-256 of the image file; default: not compared.
            values: whether to read and check all values, too.

        Raises:
            ValueError: the prediction is missing, unreadable, changed, or not of this sample, teacher and image.
        """
        header, path = self.checked_header(name, teacher, image_size, digest), self.path(name)
        tensors = read_tensors(path)
        if set(tensors) != {"values", "classes"}:
            raise ValueError(f"{path}: holds {len(tensors)} tensors, expected 'values' and 'classes'; {self.again}")
        numbers, classes = tensors["values"], tensors["classes"]
        size, two = numbers.shape[1:], num_classes == 2
        expected = (torch.float16, (1 if two else 2, *size)), (label_dtype(num_classes), (0 if two else 2, *size))
        for key, (dtype, shape) in zip(("values", "classes"), expected, strict=True):
            found = tensors[key]
            if found.dtype != dtype or found.shape != shape or len(size) != 2 or not numbers.numel():
                raise ValueError(
                    f"{path}: {key} are {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)} for "
                    f"{num_classes} classes; {self.again}"
                )
        if values:
            if _digest(numbers, classes) != header.get(_CONTENT):
                raise ValueError(f"{path}: its values have changed since they were stored; {self.again}")
            wrong = not_finite(numbers) + int((classes.long() >= num_classes).sum()) + int((classes < 0).sum())
            if not two:
                wrong += int(((numbers < 0) | (numbers > 1)).sum())
            if wrong:
                raise ValueError(
                    f"{path}: {wrong} values are no probabilities, or none of {num_classes} classes; {self.again}"
                )
        return SoftLabels(numbers, classes, num_classes, (size[0], size[1]))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredTeacherSplit:
    """Stored predictions of the samples of one split. Holds plain values, so it can be sent to data loader processes.

    Attributes:
        folder: folder of the predictions.
        data: the split.
        teacher: identity of the teacher.
    """

    folder: Path
    data: Dataset
    teacher: str

    def check(self) -> None:
        """Checks that all predictions are stored whole, and were made by this teacher of the images as they are now.

        Reads all predictions, and all image files unless their digests are known already.

        Raises:
            ValueError: the prediction of a sample does not fit, or an image is no regular file.
            OSError: an image cannot be read.
        """
        store, k = StoredTeacher(self.folder), len(self.data.classes)
        for sample in self.data.samples:  # first what is said at once
            store.checked_header(sample.name, self.teacher, None, None)
        for sample, digest in zip(self.data.samples, self.data.image_digests, strict=True):
            store.read(sample.name, k, teacher=self.teacher, digest=digest)

    def __call__(self, index: int, image_size: tuple[int, int]) -> SoftLabels:
        """The prediction of sample ``index``, memory-mapped."""
        store, name = StoredTeacher(self.folder), self.data.samples[index].name
        return store.read(name, len(self.data.classes), teacher=self.teacher, image_size=image_size, values=False)


@dataclass(frozen=True)
class LiveTeacherSplit:
    """Predictions of the samples of one split, in memory."""

    items: list[SoftLabels]

    def __call__(self, index: int, image_size: tuple[int, int]) -> SoftLabels:
        """The prediction of sample ``index``."""
        return self.items[index]
