"""Third-party weights files: read without running any code in them, and loaded into our modules by renaming rules."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparserefine.files.regular import regular_file
from sparserefine.files.tensors import not_finite, read_tensors
from sparserefine.files.text import first_line, printable
from sparserefine.images.classes import Classes, wheel

_REPLACED = (  # mmengine also saves its training log, in arrays of old and new NumPy
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)
_MOST_LISTED = 3
"""Most keys that a message lists for each kind of fault."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of weights that mean what they say: 8-bit floats need scales that we would not know."""


@dataclass(frozen=True)
class Checkpoint:
    """What we use of a weights file.

    Attributes:
        tensors: by name, with the names and dtypes of the file; they may be memory-mapped rather than read.
        classes: names and colours, if the file has names; missing colours are those of
            :func:`sparserefine.images.classes.wheel`.
    """

    tensors: dict[str, Tensor]
    classes: Classes | None

    def classes_of(self, num_classes: int, source: str | Path) -> Classes | None:
        """The classes if there are ``num_classes`` of them; otherwise ``None``, with a warning."""
        if self.classes is None or len(self.classes) == num_classes:
            return self.classes
        message = f"{source}: has {len(self.classes)} class names for a model of {num_classes}; they are ignored"
        warnings.warn(message, stacklevel=3)
        return None


class _Inert:
    """Replaces objects in a checkpoint that we do not need: accepts any arguments, does nothing, stores nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _inert_class(name: str) -> type[_Inert]:
    """An inert class with that name: torch finds a class by its own ``__module__`` and ``__name__``."""
    module, _, class_name = name.rpartition(".")
    return type(class_name, (_Inert,), {"__module__": module})


_INERT_CLASSES = tuple(_inert_class(name) for name in _REPLACED)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a ``.safetensors`` file, or a state dict from ``torch.save``, also one under ``state_dict`` or ``model``.

    Checkpoints of mmengine 1.x and of the older mmcv need no conversion; class names and colours come from their
    ``meta``. The prefixes ``module.`` (data-parallel training) and ``_orig_mod.`` (torch.compile) are removed from the
    names. Nothing in the file is executed: torch unpickles only tensors and plain values, and other objects that
    mmengine saves are replaced by ones that do nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, has another format, is cut short, or contains objects that could run code.
    """
    path = regular_file(path, "a weights file")
    if path.suffix == ".safetensors":
        return Checkpoint(_without_prefix(read_tensors(path)), None)
    content = _unpickled(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state dict")
    inner = (content.get(name) for name in ("state_dict", "model"))
    state = next((value for value in inner if isinstance(value, Mapping)), content)
    others = [f"{key!r:.80} ({_kind(value)})" for key, value in state.items() if not _is_plain(value)]
    if others or not state:
        count = len(state) - len(others)
        tensors = f"{count} tensors and, besides them," if count else "no tensors but"
        found = f"{tensors} {_listed(others)}" if state else "nothing"
        raise ValueError(f"{path}: expected names and tensors, or those in 'state_dict' or 'model'; found {found}")
    return Checkpoint(_without_prefix(state), _classes(content))


def _without_prefix(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that data-parallel training and torch.compile put before every name."""
    tensors = {str(key): value for key, value in state.items()}
    for prefix in ("module.", "_orig_mod.", "module."):  # the two may be nested either way
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _unpickled(path: Path) -> Any:
    """Unpickles the file. Tensors are memory-mapped if the format allows it: optimiser states are then not read."""
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path)
        with torch.serialization.safe_globals(list(_INERT_CLASSES)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except MemoryError:
        raise
    except Exception as error:  # unpickling a file that is no pickle can raise anything
        if isinstance(error, OSError) and error.filename is not None:  # without a name it is about the content
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: contains {printable(refused[1])} and is not loaded, because it could run code; expected "
                "tensors and plain values only, as torch.save(model.state_dict(), file) writes them"
            ) from error
        explained = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (explained[1].strip() if explained else first_line(error)) or type(error).__name__
        raise ValueError(f"{path}: not a torch weights file, or cut short ({reason})") from error


def _check_archive(path: Path) -> None:
    """Raises ``ValueError`` if unpacking would take more memory than the file has bytes; torch never compresses."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts claim to be larger than the file")


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor whose values lie in memory, one after the other."""
    if not isinstance(value, Tensor):
        return False
    plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested
    return plain and value.device.type == "cpu"


def _kind(value: Any) -> str:
    return f"a {value.layout} {value.device} tensor" if isinstance(value, Tensor) else type(value).__name__


def _classes(content: Mapping[Any, Any]) -> Classes | None:
    """Names and colours as mmengine 1.x or mmsegmentation 0.x store them."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    newer = meta.get("dataset_meta")
    entries = {str(key).lower(): value for key, value in (newer if isinstance(newer, Mapping) else meta).items()}
    names, palette = entries.get("classes"), entries.get("palette")
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    return Classes(tuple(names), _palette(palette, len(names)))


def _palette(colours: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of a file if they are ``count`` times three bytes; otherwise our own."""
    if isinstance(colours, list | tuple) and len(colours) == count:
        values = [value for colour in colours if isinstance(colour, list | tuple) for value in colour]
        if len(values) == 3 * count and all(isinstance(v, int) and 0 <= v <= 255 for v in values):
            return tuple((r, g, b) for r, g, b in zip(values[0::3], values[1::3], values[2::3], strict=True))
    return tuple(wheel(k) for k in range(count))


def load_renamed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    rules: Sequence[tuple[str, str]],
    dropped: Sequence[str],
    source: str,
) -> None:
    """Copies ``tensors`` into ``model``, converted to its names and dtypes; on an error nothing is copied.

    Values are read last, after names and shapes have been found to fit.

    Batch normalisation's ``num_batches_tracked``, which evaluation does not use, is optional and ignored.

    Args:
        model: changed in place.
        tensors: by name, as in the file.
        rules: pairs of a regular expression for a whole name in the file and a template (``re.Match.expand``) for the
            model's name; the first that matches applies.
        dropped: prefixes of names to ignore, such as ``auxiliary_head.``.
        source: the file, for messages.

    Raises:
        ValueError: a tensor of the model is missing, or has another shape or is integer instead of floating point (or
            the other way round); a name matches no rule; two names become the same; or values are NaN or infinite, or
            become so in the model's dtype.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    own = {name: value for name, value in model.state_dict().items() if not _is_counter(name)}
    given: dict[str, Tensor] = {}
    unexpected: list[str] = []
    twice: list[str] = []
    misfits: list[str] = []
    for key, value in tensors.items():
        if _is_counter(key) or key.startswith(tuple(dropped)):
            continue
        match, replacement = next(
            ((m, replacement) for pattern, replacement in patterns if (m := pattern.fullmatch(key))), (None, "")
        )
        name = match.expand(replacement) if match else ""
        if name not in own:
            unexpected.append(key)
        elif name in given:
            twice.append(f"{key} as {name}")
        else:
            given[name] = value
            if value.shape != own[name].shape:
                misfits.append(f"{key} is {_shape(value)}, expected {_shape(own[name])}")
            elif value.dtype not in _FLOATS if own[name].is_floating_point() else value.is_floating_point():
                misfits.append(f"{key} is {value.dtype}, expected {own[name].dtype}")
    missing = [name for name in own if name not in given]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misfits, "given twice": twice}
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {_listed(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{source}: does not fit {type(model).__name__}, nothing is loaded; {listed}")
    bad = [f"{name} ({count})" for name, value in given.items() if (count := not_finite(value.to(own[name].dtype)))]
    if bad:
        raise ValueError(f"{source}: {len(bad)} tensors hold values that are NaN or infinite: {_listed(bad)}")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def check_files(folder: Path) -> None:
    """Raises ``ValueError`` if something in the folder is no file that may be opened, such as a FIFO.

    For libraries that open what they find in a folder: opening a FIFO waits for ever.
    """
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            regular_file(path)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(map(printable, items[:_MOST_LISTED])) + (", ..." if len(items) > _MOST_LISTED else "")
