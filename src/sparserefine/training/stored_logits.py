"""Coarse logits on disk: one safetensors file per image, float16, at the base's own output size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.tensors import read_tensors
from sparserefine.training.prediction_files import PredictionFiles

_HALF_MAX = 65504.0


class StoredLogits(PredictionFiles):
    """A folder of coarse logits; see :class:`PredictionFiles`."""

    what, model, setting = "logits", "base", "logits.folder"

    def write(self, name: str, logits: Tensor, *, base: str, image_size: tuple[int, int], digest: str) -> None:
        """Stores logits ``[K, h, w]``; arguments and errors as in :meth:`PredictionFiles.write_tensors`."""
        self.write_tensors(name, {"logits": quantised(logits)}, base, image_size, digest)

    def read(
        self, name: str, *, base: str, image_size: tuple[int, int] | None = None, digest: str | None = None
    ) -> Tensor:
        """Reads logits, ``float16 [K, h, w]``.

        Args:
            name: name of the sample.
            base: identity of the base that must have made them.
            image_size: H and W of the image [px]; default: not compared.
            digest: SHA-256 of the image file; default: not compared.

        Raises:
            ValueError: the logits are missing, unreadable, not finite, or not of this sample, base and image.
        """
        self.checked_header(name, base, image_size, digest)
        path = self.path(name)
        tensors = read_tensors(path)
        if set(tensors) != {"logits"}:
            raise ValueError(f"{path}: holds {len(tensors)} tensors, expected one called 'logits'; {self.again}")
        logits = tensors["logits"]
        if logits.dtype != torch.float16 or logits.dim() != 3 or not logits.numel():
            raise ValueError(
                f"{path}: logits are {logits.dtype} {list(logits.shape)}, expected torch.float16 [K, h, w]; "
                f"{self.again}"
            )
        bad = logits.numel() - int(logits.isfinite().sum())
        if bad:
            raise ValueError(
                f"{path}: {bad} of {logits.numel()} coarse logits of base {base} are NaN or infinite; {self.again}"
            )
        return logits


def quantised(logits: Tensor) -> Tensor:
    """Rounds logits to float16, clamped to its range: the precision of storage and training."""
    return logits.clamp(-_HALF_MAX, _HALF_MAX).half()


@dataclass(frozen=True)
class StoredSplit:
    """Stored logits of the samples of one split. Holds plain values, so it can be sent to data loader processes.

    Attributes:
        folder: folder of the stored logits.
        data: the split.
        bases: identity of the base for each sample.
    """

    folder: Path
    data: Dataset
    bases: tuple[str, ...]

    def check(self) -> None:
        """Checks that the logits of all samples are stored, and were made by their bases of the images as they are now.

        Reads all image files, unless their digests are known already.

        Raises:
            ValueError: the logits of a sample do not fit, or an image is no regular file.
            OSError: an image cannot be read.
        """
        store = StoredLogits(self.folder)
        for sample, base in zip(self.data.samples, self.bases, strict=True):  # first what is said at once
            store.checked_header(sample.name, base, None, None)
        for sample, base, digest in zip(self.data.samples, self.bases, self.data.image_digests, strict=True):
            store.checked_header(sample.name, base, None, digest)

    def __call__(self, index: int, image_size: tuple[int, int]) -> Tensor:
        """``float16 [K, h, w]`` of sample ``index``."""
        store = StoredLogits(self.folder)
        return store.read(self.data.samples[index].name, base=self.bases[index], image_size=image_size)


@dataclass(frozen=True)
class LiveSplit:
    """Logits of the samples of one split, in memory, with the same precision as stored ones."""

    items: list[Tensor]

    def __call__(self, index: int, image_size: tuple[int, int]) -> Tensor:
        """``float16 [K, h, w]`` of sample ``index``."""
        return self.items[index]
