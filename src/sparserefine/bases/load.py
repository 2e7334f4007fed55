"""Bases by name: one string, as configuration and command line have it, becomes a frozen base.

Each kind is a file of ``families/`` with a function that loads it: ``from sparserefine.bases.families.hf import hf``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Literal

from torch import nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.loaded import LoadedModel
from sparserefine.images.classes import Classes

BASE_NAMES = (
    "hf:<folder or hub id>",
    "hrnet_w48:<file>",
    "segnext_<t, s, b or l>:<file>",
    "onnx:<file>",
    "unet:<file>",
    "torchvision:<model>:<file>",
    "timm:<model>:<file>",
    "smp:<folder or hub id>",
    "python:<module>:<callable>",
)
SEGNEXT: dict[str, Literal["t", "s", "b", "l"]] = {
    "segnext_t": "t",
    "segnext_s": "s",
    "segnext_b": "b",
    "segnext_l": "l",
}


def load_base(
    config: BaseConfig, classes: Classes | int | None = None, *, folder: Path | None = None, trust_base: bool = True
) -> FrozenBase:
    """The base that ``config.name`` names.

    Args:
        config: name and input of the base.
        classes: of the data, or their number; a base of another class count is refused, unless ``config.class_map``
            says which of its classes counts as which. ``None``: the model's own.
        folder: where relative files are looked for first (the folder of a stored refiner).
        trust_base: false where the name comes out of a downloaded configuration: then ``python:``, which runs any code
            on the module path, is refused.

    Raises:
        ValueError: unknown name, wrong class count, files that are not such a model, or ``python:`` without trust.
        FileNotFoundError: no such weights.
        ImportError: a package is missing; the message says which.
    """
    known = classes if isinstance(classes, Classes) else None
    count = len(classes) if isinstance(classes, Classes) else classes
    loaded = load_model(config.name, count, folder=folder, trust_base=trust_base)
    return FrozenBase(loaded, count, config, classes=known)


def load_model(
    name: str, num_classes: int | None = None, *, folder: Path | None = None, trust_base: bool = True
) -> LoadedModel:
    """The model of that name; ``num_classes`` helps where its files do not tell. For the rest see :func:`load_base`."""
    kind, _, rest = name.partition(":")
    unknown = f"base {name!r} is not known; expected one of {', '.join(BASE_NAMES)}"
    if kind == "python" and rest.count(":") == 1:
        if not trust_base:
            raise ValueError(f"base {name}: runs code; pass trust_base=True (--trust_base) if you trust it")
        return _called(name, *rest.split(":"))
    if not rest:
        random = "; random weights are for `sparserefine benchmark` only" if kind in ("hrnet_w48", *SEGNEXT) else ""
        raise ValueError(unknown + random)
    if kind in ("torchvision", "timm"):
        from sparserefine.bases.families.libraries import timm, torchvision

        builder, _, weights = rest.partition(":")
        if not weights:
            raise ValueError(f"base {name!r}: no weights; expected '{kind}:{builder}:<file>'")
        door = torchvision if kind == "torchvision" else timm
        return door(builder, _found(weights, folder), num_classes)
    place = _found(rest, folder)
    if kind == "hf":
        from sparserefine.bases.families.hf import hf

        return hf(place)
    if kind == "hrnet_w48":
        from sparserefine.bases.families.hrnet import load_hrnet_w48

        return load_hrnet_w48(place)
    if kind in SEGNEXT:
        from sparserefine.bases.families.segnext import load_segnext

        return load_segnext(SEGNEXT[kind], place)
    if kind == "onnx":
        from sparserefine.bases.families.onnx import onnx

        return onnx(place)
    if kind == "unet":
        from sparserefine.bases.families.unet import load_unet

        unet = load_unet(place)
        return LoadedModel(unet, unet.num_classes)
    if kind == "smp":
        from sparserefine.bases.families.libraries import smp

        return smp(place)
    raise ValueError(unknown)


def _found(file: str, folder: Path | None) -> str:
    """A relative file or folder inside ``folder``, where it is there; else the name as it is."""
    inside = folder / file if folder else None
    return str(inside) if inside and inside.exists() else file


def _called(base: str, module: str, name: str) -> LoadedModel:
    """What the callable of that name in that module returns; a module of torch is taken as it is."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"base {base}: {error}; expected 'python:<module>:<callable returning a model>'") from error
    if not callable(found):
        raise ValueError(f"base {base}: is {type(found).__name__}, expected a callable returning a model")
    model = found if isinstance(found, nn.Module) else found()
    if isinstance(model, LoadedModel):
        return model
    if not callable(model):
        raise ValueError(f"base {base}: returned {type(model).__name__}, expected a model: a module or a callable")
    return LoadedModel(model)
