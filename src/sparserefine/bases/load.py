"""Makes a frozen base from its name, the string that configurations and command lines use.

Each model family is a file in ``families/`` with its loader: ``from sparserefine.bases.families.hf import hf``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Literal

from torch import nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.loaded import LoadedModel
from sparserefine.bases.refined import RefinerReader
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import default_normalisation

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
    "refiner:<folder or hub id>",
)
SEGNEXT: dict[str, Literal["t", "s", "b", "l"]] = {
    "segnext_t": "t",
    "segnext_s": "s",
    "segnext_b": "b",
    "segnext_l": "l",
}


def load_base(
    config: BaseConfig,
    classes: Classes | int | None = None,
    *,
    folder: Path | None = None,
    trust_base: bool = True,
    refiners: RefinerReader | None = None,
) -> FrozenBase:
    """Loads the base that ``config.name`` names; :func:`sparserefine.load_base` hands it the reader of refiners.

    Args:
        config: name of the base, and the input it expects.
        classes: the data's classes or their number; default: the model's own. A base with another class count is
            refused unless ``config.class_map`` assigns its classes to the data's.
        folder: relative paths are looked up here first (the folder of a stored refiner).
        trust_base: pass false for a name from a downloaded configuration: then ``python:``, which can run any code on
            the module path, is refused.
        refiners: reads ``refiner:<folder>``; default: such a base is refused.

    Raises:
        ValueError: unknown name, wrong class count, files of another model, ``python:`` with ``trust_base=False``, or
            ``refiner:`` without ``refiners``.
        FileNotFoundError: the weights are not there.
        ImportError: a package is missing; the message says which.
    """
    known = classes if isinstance(classes, Classes) else None
    count = len(classes) if isinstance(classes, Classes) else classes
    loaded = load_model(config.name, count, folder=folder, trust_base=trust_base, refiners=refiners)
    return FrozenBase(loaded, count, config, classes=known)


def load_model(
    name: str,
    num_classes: int | None = None,
    *,
    folder: Path | None = None,
    trust_base: bool = True,
    refiners: RefinerReader | None = None,
) -> LoadedModel:
    """Loads the model of that name; arguments and errors as in :func:`load_base`.

    ``num_classes`` is K of the data: torchvision and timm models are first built with it; the weights decide.
    """
    kind, _, rest = name.partition(":")
    unknown = f"base {name!r} is not known; expected one of {', '.join(BASE_NAMES)}"
    if kind == "python" and rest.count(":") == 1:
        if not trust_base:
            raise ValueError(f"base {name}: runs code; pass trust_base=True (--trust_base) if you trust it")
        return _model_from_module(name, *rest.split(":"))
    if not rest:
        random = "; random weights are for `sparserefine benchmark` only" if kind in ("hrnet_w48", *SEGNEXT) else ""
        raise ValueError(unknown + random)
    if kind in ("torchvision", "timm"):
        from sparserefine.bases.families.libraries import timm, torchvision

        architecture, _, weights = rest.partition(":")
        if not weights:
            raise ValueError(f"base {name!r}: no weights; expected '{kind}:{architecture}:<file>'")
        load = torchvision if kind == "torchvision" else timm
        return load(architecture, _resolved(weights, folder), num_classes)
    path = _resolved(rest, folder)
    if kind == "hf":
        from sparserefine.bases.families.hf import hf

        return hf(path)
    if kind == "hrnet_w48":
        from sparserefine.bases.families.hrnet import load_hrnet_w48

        return load_hrnet_w48(path)
    if kind in SEGNEXT:
        from sparserefine.bases.families.segnext import load_segnext

        return load_segnext(SEGNEXT[kind], path)
    if kind == "onnx":
        from sparserefine.bases.families.onnx import onnx

        return onnx(path)
    if kind == "unet":
        from sparserefine.bases.families.unet import load_unet

        unet = load_unet(path)
        mean, std = default_normalisation(unet.in_channels)
        return LoadedModel(unet, unet.num_classes, None, mean, std, channels=unet.in_channels)
    if kind == "refiner":
        if refiners is None:
            raise ValueError(f"base {name}: is a refiner; load it with sparserefine.load_base")
        return refiners(path)
    if kind == "smp":
        from sparserefine.bases.families.libraries import smp

        return smp(path)
    raise ValueError(unknown)


def _resolved(file: str, folder: Path | None) -> str:
    """The path inside ``folder`` if it exists there; otherwise ``file`` unchanged."""
    inside = folder / file if folder else None
    return str(inside) if inside and inside.exists() else file


def _model_from_module(base: str, module: str, name: str) -> LoadedModel:
    """Calls that callable of that Python module, which returns a model; an ``nn.Module`` is the model itself.

    Modules are also found in the current folder, after all others, so that no file there is taken for a library. It
    stays on the path: the module may import its neighbours later, and processes that load data import them again.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        imported = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"base {base}: {error}; expected 'python:<module>:<callable returning a model>'") from error
    found = getattr(imported, name, None)
    if found is None:
        place = getattr(imported, "__file__", None) or "Python itself"
        raise ValueError(
            f"base {base}: no {name!r} in module {module!r} ({place}); expected 'python:<module>:<callable returning a "
            "model>'. The current folder is searched last, so a module there needs a name that no library has"
        )
    if not callable(found):
        raise ValueError(f"base {base}: is {type(found).__name__}, expected a callable returning a model")
    model = found if isinstance(found, nn.Module) else found()
    if isinstance(model, LoadedModel):
        return model
    if not callable(model):
        raise ValueError(f"base {base}: returned {type(model).__name__}, expected a model: a module or a callable")
    return LoadedModel(model)
