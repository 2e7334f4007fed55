"""Bases by name: one string, as configuration and command line have it, becomes a frozen base."""

from __future__ import annotations

import importlib
from pathlib import Path

from sparserefine.base import BaseConfig, FrozenBase

BASE_NAMES = ("unet:<file>", "python:<module>:<callable>")


def load_base(
    config: BaseConfig, num_classes: int, *, folder: Path | None = None, trust_base: bool = True
) -> FrozenBase:
    """The base that ``config.name`` names.

    Args:
        config: name and input of the base.
        num_classes: K; a base of another class count is refused.
        folder: where relative files of ``unet:`` are looked for first (the folder of a stored refiner).
        trust_base: false where the name comes out of a downloaded configuration: then ``python:``, which runs any code
            on the module path, is refused.

    Raises:
        ValueError: unknown name, wrong class count, or ``python:`` without trust.
        FileNotFoundError: no such weights.
    """
    kind, _, rest = config.name.partition(":")
    if kind == "unet" and rest:
        from sparserefine.bases.unet import load_unet

        inside = (folder / rest) if folder else None
        model = load_unet(inside if inside and inside.is_file() else rest)
        if model.num_classes != num_classes:
            raise ValueError(f"base {config.name}: {model.num_classes} classes, the data has {num_classes}")
        return FrozenBase(model, num_classes, config)
    if kind == "python" and rest.count(":") == 1:
        if not trust_base:
            raise ValueError(f"base {config.name}: runs code; pass trust_base=True (--trust_base) if you trust it")
        module, _, name = rest.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"base {config.name}: {error}; expected 'python:<module>:<callable returning a model>'"
            ) from error
        if not callable(factory):
            raise ValueError(f"base {config.name}: is {type(factory).__name__}, expected a callable returning a model")
        return FrozenBase(factory(), num_classes, config)
    raise ValueError(f"base {config.name!r} is not known; expected one of {', '.join(BASE_NAMES)}")
