"""Tensors in safetensors files, and the check of weights that come from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line, printable

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the floating-point weights that this package writes."""


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
    """The tensors of a safetensors file by name, on the CPU; they may be memory-mapped rather than read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, not a safetensors file, or cut short.
        OSError: it cannot be read.
    """
    with _explained(Path(path)):
        return load_file(path)


def read_header(path: str | Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; errors as in :func:`read_tensors`."""
    with _explained(Path(path)), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def check_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raises ``ValueError`` that names the first tensor with NaN or infinite values; ``where`` is the file."""
    for name, tensor in tensors.items():
        if bad := not_finite(tensor):
            raise ValueError(f"{where}: {bad} of {tensor.numel()} values of {printable(name)} are NaN or infinite")


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    low, high = tensor.detach().aminmax()  # NaN if any value is; many times faster than isfinite on the CPU
    return 0 if bool(low.isfinite() & high.isfinite()) else int((~tensor.isfinite()).sum())


def check_weights(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str | Path) -> None:
    """Checks stored weights against those of the network that they are for. Values are read last.

    Args:
        tensors: by name, as :func:`write_tensors` stored them.
        own: the network's ``state_dict()``; its values are not read, so it may be on the meta device.
        where: the file, for messages.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape or a foreign dtype; values are NaN or
            infinite, or a variance is negative.
    """
    missing, unexpected = [name for name in own if name not in tensors], [name for name in tensors if name not in own]
    if missing or unexpected:
        listed = [", ".join(map(printable, names[:3])) or "nothing" for names in (missing, unexpected)]
        raise ValueError(f"{where}: does not fit its network: missing {listed[0]}, unexpected {listed[1]}")
    for name, tensor in tensors.items():
        wanted = own[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{where}: does not fit its network: {name} is {list(tensor.shape)}, expected {list(wanted.shape)}"
            )
        if tensor.dtype not in (WEIGHT_DTYPES if wanted.is_floating_point() else (wanted.dtype,)):
            expected = "float32, float16 or bfloat16" if wanted.is_floating_point() else wanted.dtype
            raise ValueError(f"{where}: {name} is {tensor.dtype}, expected {expected}")
    check_finite(tensors, where)
    for name, tensor in tensors.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ValueError(f"{where}: {name} has negative variances")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    regular_file(path, "a safetensors file")
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # besides its own error, whatever torch and Python raise for what the header says
        raise ValueError(f"{path}: not a safetensors file, or cut short ({first_line(error)})") from error


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
