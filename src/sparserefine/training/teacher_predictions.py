"""TeacherPredictions: the teacher's predictions for the images of one split, stored or computed now."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from sparserefine.data.readers.dataset import Dataset
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.training.forecast import Forecast
from sparserefine.training.stored_teacher import LiveTeacherSplit, StoredTeacher, StoredTeacherSplit
from sparserefine.training.teacher import Teacher


class TeacherPredictions:
    """The teacher's predictions for the images of one split.

    Args:
        teacher: makes them.
        data: the split.
    """

    def __init__(self, teacher: Teacher, data: Dataset) -> None:
        self.teacher, self.data = teacher, data
        self.files = StoredTeacher(teacher.config.folder)

    def identity(self, name: str) -> str:
        """Identity of the teacher, whatever the sample is called."""
        return self.teacher.identity

    def compute(self, index: int) -> tuple[SoftLabels, tuple[int, int]]:
        """The prediction of image ``index``, and H and W of the image."""
        image, _ = self.data.read(index)
        return self.teacher.predict(image), (image.shape[1], image.shape[2])

    def check(self, name: str, digest: str) -> None:
        """Raises ``ValueError`` unless the right prediction of that sample is stored whole."""
        self.files.read(name, len(self.data.classes), teacher=self.teacher.identity, digest=digest)

    def store(self, index: int, digest: str) -> int:
        """Computes and stores the prediction of an image with that SHA-256; returns its bytes."""
        soft, size = self.compute(index)
        name = self.data.samples[index].name
        self.files.write(name, soft, teacher=self.teacher.identity, image_size=size, digest=digest)
        return soft.nbytes

    def stored(self) -> StoredTeacherSplit:
        """The predictions of all images, to be read from ``teacher.folder``.

        Raises:
            ValueError: some are missing or have changed, or were made by another teacher or of another image.
            OSError: an image cannot be read.
        """
        split = StoredTeacherSplit(Path(self.teacher.config.folder), self.data, self.teacher.identity)
        split.check()
        return split

    def live(self) -> LiveTeacherSplit:
        """The predictions of all images, computed now and kept in memory."""
        forecast, items = Forecast("the teacher's predictions", len(self.data)), []
        for index in tqdm(range(len(self.data)), desc="teacher", unit="image", delay=2):
            began = time.perf_counter()
            items.append(self.compute(index)[0])
            forecast.after(items[-1].nbytes, time.perf_counter() - began)
        return LiveTeacherSplit(items)
