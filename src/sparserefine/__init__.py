"""High-resolution segmentation at low-resolution cost, for the model you already trained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparserefine.base import BaseConfig as BaseConfig
    from sparserefine.base import FrozenBase as FrozenBase
    from sparserefine.classes import Classes as Classes
    from sparserefine.data.images import read_image as read_image
    from sparserefine.data.images import read_label as read_label
    from sparserefine.ensembler import EnsemblerConfig as EnsemblerConfig
    from sparserefine.extractor import PRESETS as PRESETS
    from sparserefine.extractor import ExtractorConfig as ExtractorConfig
    from sparserefine.refiner import Refinement as Refinement
    from sparserefine.refiner import SparseRefiner as SparseRefiner
    from sparserefine.selector import Selector as Selector
    from sparserefine.sparse import SparseUNet as SparseUNet

_HOMES = {
    "BaseConfig": "base",
    "FrozenBase": "base",
    "Classes": "classes",
    "read_image": "data.images",
    "read_label": "data.images",
    "EnsemblerConfig": "ensembler",
    "PRESETS": "extractor",
    "ExtractorConfig": "extractor",
    "SparseUNet": "sparse",
    "Refinement": "refiner",
    "SparseRefiner": "refiner",
    "Selector": "selector",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    """Loads torch only when something that needs it is asked for, so that ``sparserefine --help`` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparserefine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparserefine.{_HOMES[name]}"), name)
