"""Coarse logits on disk: one safetensors file per image, float16, at the base's own output size."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset
from sparserefine.files.regular import regular_file
from sparserefine.files.tensors import read_header, read_tensors, write_tensors
from sparserefine.files.text import first_line, printable
from sparserefine.files.whole import written_whole

FORMAT_VERSION = "2"
_HALF_MAX = 65504.0
_SUFFIX = ".safetensors"
_MAX_NAME = 255
"""Bytes of a file name, on most file systems."""
_AGAIN = "run `sparserefine logits --overwrite`, or give another logits.folder"


class StoredLogits:
    """A folder of coarse logits, one file ``<folder>/<sample name>.safetensors`` per image.

    The header of a file says what its logits were made of: the name of the sample, the identity of the base, the H and
    W of the image [px], and the SHA-256 of the image file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """File of the sample called ``name``. A name that leaves no room for the suffix is cut."""
        path = self.folder / f"{printable(name)}{_SUFFIX}"  # safetensors opens files with names in UTF-8 only
        encoded = path.name.encode()
        if len(encoded) <= _MAX_NAME:
            return path
        end = f"-{sha256(encoded).hexdigest()[:16]}{_SUFFIX}"
        return path.with_name(encoded[: _MAX_NAME - len(end)].decode(errors="ignore") + end)

    def write(self, name: str, logits: Tensor, *, base: str, image_size: tuple[int, int], digest: str) -> None:
        """Stores logits ``[K, h, w]``.

        Args:
            name: name of the sample.
            logits: the base's outputs for the whole image.
            base: identity of the base.
            image_size: H and W of the image [px].
            digest: SHA-256 of the image file.

        Raises:
            OSError: the file cannot be written; a former one is still there.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "name": printable(name),
            "base": base,
            "image": _text(image_size),
            "image_sha256": digest,
        }
        with written_whole(self.path(name)) as temporary:
            write_tensors(temporary, {"logits": quantised(logits)}, header)

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
        header, path = self.check(name, base=base, digest=digest), self.path(name)
        if image_size is not None and header["image"] != _text(image_size):
            raise ValueError(
                f"{path}: logits of an image of {_shown(header['image'])} pixels, this image has "
                f"{_text(image_size)}; {_AGAIN}"
            )
        tensors = read_tensors(path)
        if set(tensors) != {"logits"}:
            raise ValueError(f"{path}: holds {len(tensors)} tensors, expected one called 'logits'; {_AGAIN}")
        logits = tensors["logits"]
        if logits.dtype != torch.float16 or logits.dim() != 3 or not logits.numel():
            raise ValueError(
                f"{path}: logits are {logits.dtype} {list(logits.shape)}, expected torch.float16 [K, h, w]; {_AGAIN}"
            )
        bad = logits.numel() - int(logits.isfinite().sum())
        if bad:
            raise ValueError(
                f"{path}: {bad} of {logits.numel()} coarse logits of base {base} are NaN or infinite; {_AGAIN}"
            )
        return logits

    def check(self, name: str, *, base: str, digest: str | None = None) -> dict[str, str]:
        """The header of the stored logits, if it is the right one; arguments and errors as in :meth:`read`."""
        header, path = self.header(name), self.path(name)
        if header["name"] != printable(name):
            raise ValueError(
                f"{path}: logits of image {_shown(header['name'])!r}, expected {printable(name)!r}; {_AGAIN}"
            )
        if header["base"] != base:
            raise ValueError(
                f"{path}: logits of base {_shown(header['base'])}, this configuration has base {base}; {_AGAIN}"
            )
        if digest is not None and header["image_sha256"] != digest:
            raise ValueError(f"{path}: logits of an image that has changed since; {_AGAIN}")
        return header

    def header(self, name: str) -> dict[str, str]:
        """The header of the stored logits of a sample.

        Raises:
            ValueError: none are stored, or the file is another one or of another version.
        """
        path = self.path(name)
        try:
            header = read_header(regular_file(path, "stored logits"))
        except FileNotFoundError:
            raise ValueError(
                f"{path}: no stored logits; run `sparserefine logits` with this configuration first"
            ) from None
        except ValueError as error:
            raise ValueError(f"{first_line(error)}; {_AGAIN}") from error
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version {_shown(header.get('format_version'))}, expected {FORMAT_VERSION}; {_AGAIN}"
            )
        missing = {"name", "base", "image", "image_sha256"} - header.keys()
        if missing:
            raise ValueError(f"{path}: its header lacks {', '.join(sorted(missing))}; {_AGAIN}")
        return header


def _shown(text: str | None) -> str:
    """An entry of a header, for messages; in a foreign file it may be anything."""
    return printable(text)[:80]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


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
            store.check(sample.name, base=base)
        for sample, base, digest in zip(self.data.samples, self.bases, self.data.image_digests, strict=True):
            store.check(sample.name, base=base, digest=digest)

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
