"""Tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparserefine.files.text import first_line


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file and checks that it reads back the same; call it inside ``written_whole``.

    Raises:
        OSError: the file cannot be written, or reads back differently.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, path, metadata=None if metadata is None else dict(metadata))
        read = load_file(path)
    except SafetensorError as error:  # its own error for a full disk
        raise OSError(first_line(error)) from error
    # Compare bytes, since NaN != NaN.
    if any(not torch.equal(_as_bytes(read[name]), _as_bytes(tensor)) for name, tensor in stored.items()):
        raise OSError("reads back differently; check the disk")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or cut short.
    """
    with _explained(Path(path)):
        return load_file(path)


def read_header(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; errors as in :func:`read_tensors`."""
    with _explained(Path(path)), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({first_line(error)})") from error


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
