"""A folder of predictions, one safetensors file per image, whose header says what the prediction was made of."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from sparserefine.files.regular import regular_file
from sparserefine.files.tensors import read_header, write_tensors
from sparserefine.files.text import first_line, printable
from sparserefine.files.whole import written_whole

FORMAT_VERSION = "2"
_SUFFIX = ".safetensors"
_MAX_NAME = 255
"""Bytes of a file name, on most file systems."""


class PredictionFiles:
    """A folder of predictions of one kind, one file ``<folder>/<sample name>.safetensors`` per image.

    The header of a file says what its prediction was made of: the name of the sample, the identity of the model, the H
    and W of the image [px], and the SHA-256 of the image file.
    """

    what: ClassVar[str]
    """Name of this kind in messages."""
    model: ClassVar[str]
    """Role of the model that makes them, and name of its identity in the header."""
    setting: ClassVar[str]
    """The configuration's field for the folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def again(self) -> str:
        """The cure for files that do not fit."""
        return f"run `sparserefine logits --overwrite`, or give another {self.setting}"

    def path(self, name: str) -> Path:
        """File of the sample called ``name``. A name that leaves no room for the suffix is cut."""
        path = self.folder / f"{printable(name)}{_SUFFIX}"  # safetensors opens files with names in UTF-8 only
        encoded = path.name.encode()
        if len(encoded) <= _MAX_NAME:
            return path
        end = f"-{sha256(encoded).hexdigest()[:16]}{_SUFFIX}"
        return path.with_name(encoded[: _MAX_NAME - len(end)].decode(errors="ignore") + end)

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        model: str,
        image_size: tuple[int, int],
        digest: str,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Stores the tensors of a prediction.

        Args:
            name: name of the sample.
            tensors: by name.
            model: identity of the model.
            image_size: H and W of the image [px].
            digest: SHA-256 of the image file.
            more: further entries of the header.

        Raises:
            OSError: the file cannot be written; a former one is still there.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "name": printable(name),
            self.model: model,
            "image": shown_size(image_size),
            "image_sha256": digest,
            **(more or {}),
        }
        with written_whole(self.path(name)) as temporary:
            write_tensors(temporary, tensors, header)

    def checked_header(
        self, name: str, model: str, image_size: tuple[int, int] | None, digest: str | None
    ) -> dict[str, str]:
        """The header of the stored prediction, if it is the right one.

        Args:
            name: name of the sample.
            model: identity of the model that must have made it.
            image_size: H and W of the image [px]; ``None``: not compared.
            digest: SHA-256 of the image file; ``None``: not compared.

        Raises:
            ValueError: the prediction is missing, unreadable, or not of this sample, model and image.
        """
        header, path, what = self.header(name), self.path(name), self.what
        if header["name"] != printable(name):
            raise ValueError(
                f"{path}: {what} of image {shown(header['name'])!r}, expected {printable(name)!r}; {self.again}"
            )
        if header[self.model] != model:
            raise ValueError(
                f"{path}: {what} of {self.model} {shown(header[self.model])}, this configuration has {self.model} "
                f"{model}; {self.again}"
            )
        if digest is not None and header["image_sha256"] != digest:
            raise ValueError(
                f"{path}: {what} of an image that has changed since, or is read otherwise now (images); {self.again}"
            )
        if image_size is not None and header["image"] != shown_size(image_size):
            raise ValueError(
                f"{path}: {what} of an image of {shown(header['image'])} pixels, this image has "
                f"{shown_size(image_size)}; {self.again}"
            )
        return header

    def header(self, name: str) -> dict[str, str]:
        """The header of the stored prediction of a sample.

        Raises:
            ValueError: none is stored, or the file is another one or of another version.
        """
        path = self.path(name)
        try:
            header = read_header(regular_file(path, f"stored {self.what}"))
        except FileNotFoundError:
            raise ValueError(
                f"{path}: no stored {self.what}; run `sparserefine logits` with this configuration first"
            ) from None
        except ValueError as error:
            raise ValueError(f"{first_line(error)}; {self.again}") from error
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version {shown(header.get('format_version'))}, expected {FORMAT_VERSION}; {self.again}"
            )
        missing = {"name", self.model, "image", "image_sha256"} - header.keys()
        if missing:
            raise ValueError(f"{path}: its header lacks {', '.join(sorted(missing))}; {self.again}")
        return header


def shown(text: str | None) -> str:
    """An entry of a header, for messages; in a foreign file it may be anything."""
    return printable(text)[:80]


def shown_size(size: tuple[int, int]) -> str:
    """``HxW``."""
    return f"{size[0]}x{size[1]}"
