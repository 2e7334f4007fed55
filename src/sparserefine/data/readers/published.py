"""What readers of published datasets share: where the data are asked for, and what is said if a part is missing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparserefine.files.lines import read_lines

_MAX_BYTES = 100_000_000
"""Of a list of images: a million of them."""


@dataclass(frozen=True)
class Published:
    """A published dataset.

    Attributes:
        title: its name.
        source: where it is asked for.
        terms: what its makers allow, in short; their own text counts.
    """

    title: str
    source: str
    terms: str

    def folder(self, path: Path) -> Path:
        """The path, if there is such a folder."""
        if not path.is_dir():
            raise self._missing(path, "folder")
        return path

    def file(self, path: Path) -> Path:
        """The path, if there is such a file."""
        if not path.exists():
            raise self._missing(path, "file")
        return path

    def check_split(self, split: str, known: Collection[str]) -> None:
        """Raises ``ValueError`` unless the split is one of those."""
        if split not in known:
            raise ValueError(f"{self.title} has no split {split!r}, expected one of {', '.join(known)}")

    def _missing(self, path: Path, what: str) -> ValueError:
        return ValueError(
            f"{path}: no such {what}, expected {self.title} as it is published; ask for it at {self.source} "
            f"({self.terms})"
        )


def stems(path: Path) -> list[str]:
    """The file names, without folders and suffixes, in a list of images, or of pairs of images and labels, each once.

    Names have no blanks. So a line is ``a``, ``images/a.jpg``, or ``/images/a.jpg /labels/a.png``.
    """
    words = (word for line in read_lines(path, "a list of images", max_bytes=_MAX_BYTES) for word in line.split())
    return list(dict.fromkeys(PurePosixPath(word).stem for word in words))
