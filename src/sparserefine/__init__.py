"""High-resolution segmentation at low-resolution cost, for the model you already trained."""

import importlib  # nothing else: `python -m sparserefine` imports this file before it takes the current folder away

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sparserefine.bases.base import BaseConfig as BaseConfig
    from sparserefine.bases.base import FrozenBase as FrozenBase
    from sparserefine.files.image_config import ImageConfig as ImageConfig
    from sparserefine.files.images import read_image as read_image
    from sparserefine.files.images import read_label as read_label
    from sparserefine.images.classes import Classes as Classes
    from sparserefine.inference.predict import predict as predict
    from sparserefine.loading import load_base as load_base
    from sparserefine.refiner import SparseRefiner as SparseRefiner
    from sparserefine.sparse import SparseUNet as SparseUNet
    from sparserefine.stages.config import RefinerConfig as RefinerConfig
    from sparserefine.stages.ensembler import EnsemblerConfig as EnsemblerConfig
    from sparserefine.stages.extractor import PRESETS as PRESETS
    from sparserefine.stages.extractor import ExtractorConfig as ExtractorConfig
    from sparserefine.stages.refinement import Refinement as Refinement
    from sparserefine.stages.selector import Selector as Selector
    from sparserefine.studies.assess import assess as assess
    from sparserefine.studies.evaluate import evaluate as evaluate
    from sparserefine.training.config import Config as Config
    from sparserefine.training.loop import train as train

_MODULE_OF = {
    "BaseConfig": "bases.base",
    "FrozenBase": "bases.base",
    "load_base": "loading",
    "Classes": "images.classes",
    "ImageConfig": "files.image_config",
    "read_image": "files.images",
    "read_label": "files.images",
    "RefinerConfig": "stages.config",
    "EnsemblerConfig": "stages.ensembler",
    "PRESETS": "stages.extractor",
    "ExtractorConfig": "stages.extractor",
    "Selector": "stages.selector",
    "SparseUNet": "sparse",
    "Refinement": "stages.refinement",
    "SparseRefiner": "refiner",
    "predict": "inference.predict",
    "train": "training.loop",
    "Config": "training.config",
    "assess": "studies.assess",
    "evaluate": "studies.evaluate",
}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: torch loads slowly and ``sparserefine --help`` does not need it."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sparserefine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparserefine.{_MODULE_OF[name]}"), name)
