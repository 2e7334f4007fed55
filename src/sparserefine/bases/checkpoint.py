"""Weights files of others: read without running anything in them, loaded into our modules by rules for the names."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparserefine.images.classes import Classes, wheel

_STOOD_IN = (  # what mmengine saves beside the weights: its log of the training, in arrays of old and new numpy
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)
_SHOWN = 3
"""Keys that a message lists of each kind of fault."""


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds for us.

    Attributes:
        tensors: by the names of the file, in its dtypes; some may be mapped from the file rather than read.
        classes: of the model, where the file tells; colours that it does not tell are those of
            :func:`sparserefine.images.classes.wheel`.
    """

    tensors: dict[str, Tensor]
    classes: Classes | None

    def classes_of(self, num_classes: int, source: str | Path) -> Classes | None:
        """The classes, if there are ``num_classes`` of them; else none, with a warning."""
        if self.classes is None or len(self.classes) == num_classes:
            return self.classes
        told = f"{source}: names {len(self.classes)} classes for a model of {num_classes}; they are left out"
        warnings.warn(told, stacklevel=3)
        return None


class _Inert:
    """Takes the place of an object of a checkpoint that we have no use for: takes anything, does and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str) -> type[_Inert]:
    """A class that unpickling finds under that name: torch 2.5 looks for the names that a class itself bears."""
    module, _, own = name.rpartition(".")
    return type(own, (_Inert,), {"__module__": module})


_STAND_INS = tuple(_stand_in(name) for name in _STOOD_IN)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or one in ``state_dict`` or ``model``.

    Files of mmengine 1.x and of the older mmcv are read as they are, with the class names and colours in their
    ``meta``. A leading ``module.`` or ``_orig_mod.``, as data-parallel training and
    torch.compile leave them, is taken off. Nothing in the file is executed:
    torch unpickles tensors and plain values only; what mmengine saves beside them becomes objects that do nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, is cut short, or holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(_without_prefix(load_file(path)), None)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
    content = _unpickled(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state dict")
    inner = (content.get(name) for name in ("state_dict", "model"))
    state = next((value for value in inner if isinstance(value, Mapping)), content)
    odd = [f"{key!r} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        count = len(state) - len(odd)
        tensors = f"{count} tensors and, besides them," if count else "no tensors but"
        found = f"{tensors} {_listed(odd)}" if state else "nothing"
        raise ValueError(f"{path}: expected names and tensors, or those in 'state_dict' or 'model'; found {found}")
    return Checkpoint(_without_prefix(state), _classes(content))


def _without_prefix(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Without what data-parallel training and torch.compile put before every name."""
    tensors = {str(key): value for key, value in state.items()}
    for prefix in ("module.", "_orig_mod.", "module."):  # either may be around the other
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _unpickled(path: Path) -> Any:
    """What is in the file. Tensors are mapped where the format allows it: optimiser states are never read then."""
    try:
        with torch.serialization.safe_globals(list(_STAND_INS)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling what is not a pickle fails in any way there is
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: contains {refused[1]} and is not loaded, because it could run code; expected tensors and "
                "plain values only, as torch.save(model.state_dict(), file) writes them"
            ) from error
        told = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (told[1] if told else str(error)) or type(error).__name__
        raise ValueError(f"{path}: not a weights file of torch, or cut short ({reason})") from error


def _classes(content: Mapping[Any, Any]) -> Classes | None:
    """Names and colours as mmengine 1.x or mmsegmentation 0.x store them."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    told = meta.get("dataset_meta")
    told = {str(key).lower(): value for key, value in (told if isinstance(told, Mapping) else meta).items()}
    names, palette = told.get("classes"), told.get("palette")
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        return None
    return Classes(tuple(names), _palette(palette, len(names)))


def _palette(colours: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of a file, if these are ``count`` times three bytes; else our own."""
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
    """Copies ``tensors`` into ``model``, whose own names and dtypes they take: all of them, or on error none.

    Batch normalisation's ``num_batches_tracked``, which plays no part in evaluation, may be there or not.

    Args:
        model: gets the weights, in place.
        tensors: by the names of a file.
        rules: regular expressions for a whole name of the file, and templates (``re.Match.expand``) of the model's
            name; the first that matches applies.
        dropped: what starts with one of these is left out, as ``auxiliary_head.``.
        source: the file, for messages.

    Raises:
        ValueError: a tensor of the model is missing or has another shape or kind of numbers, a name fits no rule, or
            two become one.
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
            elif value.is_floating_point() != own[name].is_floating_point():
                misfits.append(f"{key} is {value.dtype}, expected {own[name].dtype}")
    missing = [name for name in own if name not in given]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misfits, "given twice": twice}
    if any(faults.values()):
        told = "; ".join(f"{len(which)} {fault}: {_listed(which)}" for fault, which in faults.items() if which)
        raise ValueError(f"{source}: does not fit {type(model).__name__}, nothing is loaded; {told}")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
