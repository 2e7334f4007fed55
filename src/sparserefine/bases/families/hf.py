"""Loader for transformers' semantic segmentation models, from a folder or the hub."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparserefine.bases.checkpoint import check_files
from sparserefine.bases.families.hf_model import MASKS, HfModel
from sparserefine.bases.loaded import LoadedModel
from sparserefine.files.hub import hub_snapshot
from sparserefine.files.json import read_json
from sparserefine.files.tensors import check_finite
from sparserefine.files.text import first_line
from sparserefine.images.classes import CITYSCAPES, Classes, wheel
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD

_log = logging.getLogger(__name__)

_CONFIG = "config.json"
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # transformers 5 writes either, 4 only the second
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")

_LOGITS = (
    "BeitForSemanticSegmentation",
    "DPTForSemanticSegmentation",
    "Data2VecVisionForSemanticSegmentation",
    "MobileNetV2ForSemanticSegmentation",
    "MobileViTForSemanticSegmentation",
    "MobileViTV2ForSemanticSegmentation",
    "SegformerForSemanticSegmentation",
    "UperNetForSemanticSegmentation",
)
"""Models that return logits for each class and pixel. A model added here needs a test: it may return a shifted output
at sizes that it does not support."""

_OPTIONAL_WEIGHTS = re.compile(
    r"auxiliary_head\.|criterion\.|(num_batches_tracked|position_ids|relative_position_index)\b"
)
"""Weights that a checkpoint may lack: the prediction does not use them, or they are buffers that are not learnt."""


def hf(name: str | Path) -> LoadedModel:
    """Loads a model that transformers saved, from a folder or the hub.

    Supported: SegFormer, UperNet, DPT, BEiT, Data2Vec, MobileViT (1 and 2) and MobileNetV2 for semantic segmentation
    (logits), Mask2Former, MaskFormer and EoMT (scores). The code is always transformers' own, never the checkpoint's: a
    configuration that names code, or a backbone stored elsewhere, is refused. Weights are read from safetensors, or
    from a state dict in ``.bin`` with torch's ``weights_only``, and converted to float32.

    The normalisation is read from the image processor's JSON file. The processor takes bytes, 255 p for our pixels p in
    0..1. It multiplies by r (``rescale_factor``; 1 without ``do_rescale``), subtracts m and divides by s (0 and 1
    without ``do_normalize``). That is (p - mean) / std with ``mean = m / (255 r)`` and ``std = s / (255 r)``. Its sizes
    and crops are ignored: :class:`sparserefine.bases.base.BaseConfig` sets the input size. Without such a file the
    normalisation is ImageNet's, with a warning.

    Args:
        name: a folder written by ``save_pretrained``, or a hub id like ``nvidia/segformer-b0-finetuned-ade-512-512``.

    Raises:
        ValueError: another model, a configuration that needs code or models from elsewhere, files that are broken or do
            not fit the configuration, or weights missing from the checkpoint (transformers would use random ones).
        FileNotFoundError: no such folder, and no such hub id, or the hub cannot be reached.
        ImportError: transformers, or a package that this model needs, is missing.
    """
    transformers = _transformers()
    folder = _local_folder(name)
    check_files(folder)
    config = read_json(folder / _CONFIG)
    _check_self_contained(config, folder / _CONFIG)
    model = _load(_architecture(config, transformers, folder / _CONFIG), transformers, folder)
    processor, where = _read_processor(folder)
    mean, std, flip = _normalisation(processor, str(config.get("model_type")), where)
    return _loaded(model, flip=flip, mean=mean, std=std, classes=_classes(model.config, config, processor, where))


def segformer_b5(num_classes: int) -> LoadedModel:
    """SegFormer-B5 (Xie et al. 2021) with random weights, 84.6 M parameters: for benchmarks and tests."""
    transformers = _transformers()
    config = transformers.SegformerConfig(
        num_labels=num_classes,
        hidden_sizes=[64, 128, 320, 512],
        depths=[3, 6, 40, 3],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=768,
    )
    return _loaded(transformers.SegformerForSemanticSegmentation(config))


def mask2former_t(num_classes: int) -> LoadedModel:
    """Mask2Former (Cheng et al. 2022) on Swin-T with random weights: 100 queries, 47.4 M parameters."""
    return _mask2former(num_classes, 100, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7)


def mask2former_l(num_classes: int) -> LoadedModel:
    """Mask2Former on Swin-L with random weights: 200 queries, as in its authors' configuration, 215.5 M parameters."""
    return _mask2former(
        num_classes, 200, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12
    )


def _mask2former(num_classes: int, queries: int, **swin: Any) -> LoadedModel:
    transformers = _transformers()
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(out_features=stages, **swin),
        num_labels=num_classes,
        num_queries=queries,
    )
    return _loaded(transformers.Mask2FormerForUniversalSegmentation(config))


def _loaded(
    model: nn.Module,
    *,
    flip: bool = False,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    classes: Classes | None = None,
) -> LoadedModel:
    wrapped = HfModel(model, flip_channels=flip)
    outputs: Any = "scores" if wrapped.gives_masks else "logits"
    return LoadedModel(wrapped, int(wrapped.config.num_labels), classes, mean, std, outputs, channels=3)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"this base needs the package transformers; `pip install 'sparserefine[hf]'` ({error})"
        ) from error


def _local_folder(name: str | Path) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise ValueError(
                f"{folder}: no {_CONFIG} in it; expected a folder written by transformers' save_pretrained"
            )
        return folder
    for weights in _WEIGHTS:  # .bin is fetched only if there is no safetensors file
        folder = hub_snapshot(name, _CONFIG, *_PROCESSOR, "*.index.json", weights)
        if list(folder.glob(weights)):
            break
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{name}: no {_CONFIG} under this hub id; expected a model of transformers")
    return folder


def _check_self_contained(value: Any, where: Path) -> None:
    """Raises ``ValueError`` if a configuration would make transformers use code or models from elsewhere.

    Before 5.3 it calls ``AutoBackbone.from_pretrained(backbone, **backbone_kwargs)``, where the latter may contain
    ``trust_remote_code``; or it asks on the terminal whether to run the code that ``auto_map`` names.
    """
    if isinstance(value, dict):
        for key in ("auto_map", "backbone_kwargs", "use_pretrained_backbone"):
            if value.get(key):
                cure = (
                    "the checkpoint's own code is never run; remove this line if transformers itself has the model"
                    if key == "auto_map"
                    else "save the model with its backbone's configuration inside (backbone_config), and set this to "
                    "null or false"
                )
                raise ValueError(f"{where}: {key} = {value[key]!r}, expected none; {cure}")
        backbone = value.get("backbone")
        if isinstance(backbone, str) and not re.fullmatch(r"[\w.-]+", backbone):  # the characters of timm's names
            raise ValueError(
                f"{where}: backbone = {backbone!r} is not in the checkpoint; save the model with its backbone's "
                "configuration inside (backbone_config)"
            )
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_self_contained(part, where)


def _architecture(config: Mapping[str, Any], transformers: Any, where: Path) -> str:
    """Name of the configuration's model class in transformers."""
    given = config.get("architectures")
    name = given[0] if isinstance(given, list) and given else None
    supported = (*_LOGITS, *MASKS)
    known = name in supported
    if known and hasattr(transformers, str(name)):
        return str(name)
    unavailable = f", which transformers {transformers.__version__} does not have" if known else ""
    raise ValueError(f"{where}: architectures = {given}{unavailable}; expected one of {', '.join(supported)}")


def _load(architecture: str, transformers: Any, folder: Path) -> Any:
    """Loads the model; the checkpoint must have every weight that prediction uses."""
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, architecture).from_pretrained(
                str(folder),
                local_files_only=True,
                weights_only=True,
                dtype=torch.float32,
                attn_implementation=None,  # otherwise config.json could name attention code on the hub
                ignore_mismatched_sizes=True,  # the report lists them
                output_loading_info=True,
            )
    except ImportError as error:
        raise ImportError(f"{folder}: {architecture} needs a package that is missing: {error}") from error
    except Exception as error:  # transformers, safetensors and torch raise many kinds for files that are broken
        if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            expected = " or ".join(pattern.replace("*", "") for pattern in _WEIGHTS)
            raise FileNotFoundError(f"{folder}: no weights in it; expected {expected}") from error
        raise ValueError(f"{folder}: transformers cannot load a {architecture} from it: {first_line(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not _OPTIONAL_WEIGHTS.search(key))
    if missing:
        raise ValueError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {architecture}, such as "
            f"{', '.join(missing[:3])}; they would be random. Was it saved from a model for another task?"
        )
    # transformers 5 reports (name, stored shape, expected shape), 4 only the name
    misfits = sorted(
        key if isinstance(key, str) else "{}: {}, expected {}".format(*key) for key in report["mismatched_keys"]
    )
    misfits = [misfit for misfit in misfits if not _OPTIONAL_WEIGHTS.search(misfit)]
    if misfits:
        raise ValueError(
            f"{folder}: {len(misfits)} weights have other shapes than {_CONFIG} says, such as {misfits[0]}"
        )
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise ValueError(f"{folder}: the model takes {channels} channels, expected 3 (red, green, blue)")
    check_finite(model.state_dict(), folder)
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hides progress bars and the report of weights; :func:`_load` raises what matters of it."""
    logs = transformers.utils.logging
    verbosity, bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bar:
            logs.enable_progress_bar()


def _read_processor(folder: Path) -> tuple[dict[str, Any], Path]:
    """Settings of the image processor, and the file they come from; no settings if there is no such file."""
    for name in _PROCESSOR:
        if (folder / name).is_file():
            found: Any = read_json(folder / name)
            if name == _PROCESSOR[0]:
                found = found.get("image_processor")
            if isinstance(found, dict):
                return found, folder / name
    return {}, folder / _PROCESSOR[1]


def _normalisation(
    processor: Mapping[str, Any], model_type: str, where: Path
) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Mean and standard deviation for pixels in 0..1, and whether the model takes BGR; formula: :func:`hf`."""
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or model_type
    mobilevit = str(kind).lower().startswith("mobilevit")  # never normalises, even if its files have a mean
    flip = bool(processor.get("do_flip_channel_order", mobilevit))
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    scale = 255 * _numbers(factor, 1, f"{where}: rescale_factor", positive=True)[0]
    if mobilevit or not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif processor.get("image_mean") is None or processor.get("image_std") is None:
        _log.warning("%s: has no normalisation; using ImageNet's. Give base.mean and base.std for another one", where)
        return IMAGENET_MEAN, IMAGENET_STD, flip
    else:
        mean = _numbers(processor["image_mean"], 3, f"{where}: image_mean")
        std = _numbers(processor["image_std"], 3, f"{where}: image_std", positive=True)
    a, b, c = (m / scale for m in mean)
    d, e, f = (s / scale for s in std)
    return (a, b, c), (d, e, f), flip


def _numbers(value: Any, count: int, where: str, *, positive: bool = False) -> list[float]:
    """Checks ``count`` numbers from JSON; a single number is repeated."""
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in found)
    if not good or len(found) != count or (positive and min(found) <= 0):
        above = " above 0" if positive else ""
        raise ValueError(f"{where} = {value!r}, expected a number{above}{f' or {count}' if count > 1 else ''}")
    return [float(v) for v in found]


def _classes(loaded: Any, config: Mapping[str, Any], processor: Mapping[str, Any], where: Path) -> Classes | None:
    """Names and colours of the classes; ``None`` where the names are transformers' placeholders."""
    names = tuple(str(loaded.id2label.get(k, f"class {k}")) for k in range(loaded.num_labels))
    if all(re.fullmatch(r"(LABEL_|class )\d+", name) for name in names):
        return None
    known = dict(zip(CITYSCAPES.names, CITYSCAPES.palette, strict=True))
    palette = config.get("palette") or processor.get("palette")
    if palette is not None:
        if _is_palette(palette, len(names)):
            return Classes(names, tuple((r, g, b) for r, g, b in palette))
        _log.warning(
            "%s: palette is not %d colours [red, green, blue] in 0..255; it is ignored", where.parent, len(names)
        )
    if {name.lower() for name in names} == set(known):
        return Classes(names, tuple(known[name.lower()] for name in names))
    return Classes(names, tuple(wheel(k) for k in range(len(names))))


def _is_palette(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v < 256 for v in c) for c in value)
    )
