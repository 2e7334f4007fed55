"""Bases of every kind by name, those included that are refiners."""

from __future__ import annotations

from pathlib import Path

from sparserefine.bases import load
from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.loaded import LoadedModel
from sparserefine.images.classes import Classes
from sparserefine.refiner import Loading


def load_base(
    config: BaseConfig,
    classes: Classes | int | None = None,
    *,
    folder: Path | None = None,
    trust_base: bool | None = None,
    engine: str = "auto",
) -> FrozenBase:
    """Loads the base that ``config.name`` names.

    Args:
        config: name of the base, and the input it expects.
        classes: the data's classes or their number; default: the model's own. A base with another class count is
            refused unless ``config.class_map`` assigns its classes to the data's.
        folder: relative paths are looked up here first (the folder of a stored refiner).
        trust_base: whether a base ``python:<module>:<callable>`` may be loaded, which can run any code on the module
            path. Default: if ``config`` itself names it, but not if the folder of a base ``refiner:<folder>`` does.
        engine: of ``refiner:<folder>``: engine that runs the refiner. A refiner that is built on the base sets its own.

    Raises:
        ValueError: unknown name, wrong class count, files of another model, or ``python:`` that is not trusted.
        FileNotFoundError: the weights are not there.
        ImportError: a package is missing; the message says which.
    """
    return load.load_base(
        config,
        classes,
        folder=folder,
        trust_base=trust_base is not False,
        refiners=Loading(trust_base is True, engine, config.runtime).as_base,
    )


def load_model(name: str, num_classes: int | None = None, *, engine: str = "auto") -> LoadedModel:
    """Loads the model of that name; ``num_classes`` is K of the data. Errors as in :func:`load_base`."""
    return load.load_model(name, num_classes, refiners=Loading(engine=engine).as_base)
