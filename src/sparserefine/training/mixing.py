"""One refiner for several bases: the training images come once with the logits of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sparserefine.data.readers.dataset import Dataset

T = TypeVar("T")
OfImage = Callable[[int, tuple[int, int]], T]
"""Function from the index of an image, and its H and W [px], to what belongs to it, such as coarse logits."""


def repeated(data: Dataset, times: int) -> Dataset:
    """The images of ``data``, so many times after one another."""
    return replace(data, samples=data.samples * times)


@dataclass(frozen=True)
class Mixed(Generic[T]):
    """What belongs to the images of a :func:`repeated` dataset: for each repetition a function of its own.

    Attributes:
        parts: one function for each repetition.
        images: number of images in one repetition.
    """

    parts: Sequence[OfImage[T]]
    images: int

    def __call__(self, index: int, size: tuple[int, int]) -> T:
        """Of image ``index`` of the repeated dataset."""
        which, image = divmod(index, self.images)
        return self.parts[which](image, size)
