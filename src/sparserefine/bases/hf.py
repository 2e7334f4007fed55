"""The door to transformers: its models for semantic segmentation, from a folder or the hub, as bases."""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.base import IMAGENET_MEAN, IMAGENET_STD, LoadedModel
from sparserefine.classes import CITYSCAPES, Classes, wheel

_log = logging.getLogger(__name__)

_CONFIG = "config.json"
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # transformers 5 writes either, 4 the second
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")

_LOGITS = "ForSemanticSegmentation"
"""How transformers ends the names of models that give logits for each class and pixel."""

_MASKS = (
    "EomtDinov3ForUniversalSegmentation",
    "EomtForUniversalSegmentation",
    "Mask2FormerForUniversalSegmentation",
    "MaskFormerForInstanceSegmentation",
)
"""Models that give masks and a class distribution for each."""

_SPARE = re.compile(r"auxiliary_head\.|criterion\.|(num_batches_tracked|position_ids|relative_position_index)\b")
"""Weights that the prediction does not use, and buffers that are not learnt: a checkpoint may lack these."""

_QUERIES_AT_A_TIME = 32
"""Masks that are enlarged at once: bounds the memory at EoMT's window size."""


def hf(name: str | Path) -> LoadedModel:
    """A model that transformers saved or that its hub has.

    What works: SegFormer, UperNet, DPT, BEiT, Data2Vec, MobileViT (1 and 2) and MobileNetV2 for semantic segmentation
    (logits), Mask2Former, MaskFormer and EoMT (scores). The code is always transformers' own, never the checkpoint's;
    weights are read as safetensors, or as a state dict in ``.bin`` with torch's ``weights_only``, and become float32.

    The normalisation is that of the image processor, read from its JSON: pixels p in 0..1 are what it calls 255 p;
    it multiplies with r (``rescale_factor``; 1 without ``do_rescale``), subtracts m and divides by s (0 and 1 without
    ``do_normalize``). That is (p - mean) / std with ``mean = m / (255 r)`` and ``std = s / (255 r)``. Its sizes and
    crops are left to :class:`sparserefine.base.BaseConfig`. Without such a file it is ImageNet's, with a warning.

    Args:
        name: a folder written by ``save_pretrained``, or a hub id, as ``nvidia/segformer-b0-finetuned-ade-512-512``.

    Raises:
        ValueError: not a model for semantic segmentation, files that are broken or do not fit it, or weights that are
            missing in the checkpoint (transformers would take random ones).
        FileNotFoundError: no such folder, and no such hub id or no way to the hub.
        ImportError: transformers, or a package that this model needs, is missing.
    """
    transformers = _transformers()
    folder = _local_folder(name)
    config = _read_json(folder / _CONFIG)
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
    """Mask2Former on Swin-L with random weights: 200 queries, as its authors have it, and 215.5 M parameters."""
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


class HfModel(nn.Module):
    """A segmentation model of transformers as a function from images to one tensor.

    Attention is what transformers picks, torch's ``scaled_dot_product_attention`` where the model has it: the fastest
    on a CPU, and counted by :func:`sparserefine.base.count_macs`, as on the meta device torch runs it as matrix
    products.

    Sizes: BEiT, since transformers 5, and DPT stretch their position embeddings to any multiple of their patch size
    (DPT: of twice that); Data2Vec and hybrid DPT take their own size only. EoMT takes images whose shorter side is its
    own size: as in transformers' processor, square windows go along the longer side, their masks are enlarged to the
    window, and the scores of pixels in two windows are averaged. Others take any size.

    Args:
        model: of :func:`hf`'s kinds, with its ``.config``.
        flip_channels: the model wants blue, green, red.

    Raises:
        ValueError: an EoMT that was saved amid its training.
    """

    def __init__(self, model: nn.Module, *, flip_channels: bool = False) -> None:
        super().__init__()
        self.model, self.flip_channels = model.eval(), flip_channels
        foreign = cast(Any, model)
        self.config = foreign.config
        self.kind: str = self.config.model_type
        self.gives_masks = type(model).__name__ in _MASKS
        if self.kind == "mask2former":  # without this its class scores are not there
            self.config.use_auxiliary_loss = True
        elif self.kind == "maskformer":  # with this it makes the masks of every layer of its decoder
            self.config.use_auxiliary_loss = False
        elif self.kind.startswith("eomt"):  # numbers in place of a tensor: forward branches on them
            chances = [float(p) for p in foreign.attn_mask_probs]
            if any(0 < p < 1 for p in chances):
                raise ValueError(
                    f"{self.kind}: attn_mask_probs = {chances}, expected 0 or 1 each; this model was saved amid its "
                    "training and would draw attention masks at random"
                )
            del foreign.attn_mask_probs
            foreign.attn_mask_probs = chances

    def forward(self, image: Tensor) -> Tensor:
        """``float [B, 3, h, w]``, normalised, red green blue -> logits or scores ``[B, K, h', w']``.

        Raises:
            ValueError: a size that this model does not take; the message says which it does.
        """
        if self.flip_channels:
            image = image.flip(1)
        if self.kind.startswith("eomt"):
            return self._windows(image)
        if self.gives_masks:
            output = self.model(image, return_dict=True)
            return semantic_scores(output.class_queries_logits, output.masks_queries_logits)
        if self.kind in ("beit", "data2vec-vision", "dpt"):
            return self._patches(image)
        logits: Tensor = self.model(image, return_dict=True).logits
        return logits

    def _patches(self, image: Tensor) -> Tensor:
        """Transformers of patches with learnt position embeddings."""
        h, w = image.shape[-2:]
        patch, own = int(self.config.patch_size), _pair(self.config.image_size)
        multiple = 2 * patch if self.kind == "dpt" else patch  # it halves its patches once and doubles them again
        if (h, w) != own and self.kind == "data2vec-vision":
            raise ValueError(self._wrong_size(h, w))
        if (h, w) != own and (h % multiple or w % multiple):
            near = tuple(max(1, round(side / multiple)) * multiple for side in (h, w))
            raise ValueError(
                f"{self.kind}: input is {h}x{w}, expected multiples of {multiple}; give base.size = {near}"
            )
        try:
            if self.kind == "dpt" and not self.config.is_hybrid:
                logits = self._dpt(image, h // patch, w // patch)
            else:
                logits = self.model(image, return_dict=True).logits
        except (RuntimeError, ValueError) as error:  # as a transformers refuses a size whose models cannot stretch
            if (h, w) == own:
                raise
            raise ValueError(self._wrong_size(h, w)) from error
        if logits.shape[-2] * w != logits.shape[-1] * h:  # the patches were put together to another shape
            raise ValueError(self._wrong_size(h, w))
        return logits

    def _dpt(self, image: Tensor, rows: int, columns: int) -> Tensor:
        """DPT by its parts: its own forward takes any number of patches for a square one."""
        model: Any = self.model
        states = model.dpt(image, output_hidden_states=True, return_dict=True).hidden_states[1:]
        chosen = [state for i, state in enumerate(states) if i in self.config.backbone_out_indices]
        logits: Tensor = model.head(model.neck(chosen, rows, columns))
        return logits

    def _windows(self, image: Tensor) -> Tensor:
        """EoMT: scores ``[B, K, h, w]`` at the size of the image."""
        h, w = image.shape[-2:]
        side = _pair(self.config.image_size)[0]
        if min(h, w) != side:
            raise ValueError(self._wrong_size(h, w))
        axis = 2 if h > w else 3
        starts = window_starts(max(h, w), side)
        total = image.new_zeros(len(image), self.config.num_labels, h, w)
        for start in starts:
            output = self.model(image.narrow(axis, start, side), return_dict=True)
            classes, masks = output.class_queries_logits, output.masks_queries_logits
            total.narrow(axis, start, side).add_(semantic_scores(classes, masks, (side, side)))
        cover = torch.tensor([sum(s <= i < s + side for s in starts) for i in range(max(h, w))])
        return total / cover.to(total).view((-1, 1) if axis == 2 else (1, -1))

    def _wrong_size(self, h: int, w: int) -> str:
        own = _pair(self.config.image_size)
        if self.kind.startswith("eomt"):
            wide = (own[0], round(own[0] * w / h)) if h <= w else (round(own[0] * h / w), own[0])
            return f"{self.kind}: input is {h}x{w}, its shorter side has to be {own[0]}; give base.size = {wide}"
        return f"{self.kind}: input is {h}x{w}, this model takes {own[0]}x{own[1]} only; give base.size = {own}"


def semantic_scores(classes: Tensor, masks: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """What a model of masks says of each pixel: the sum over masks of P(class) times P(pixel is in it).

    Args:
        classes: ``float [B, Q, K + 1]``, logits of the classes, the last of them "no object".
        masks: ``float [B, Q, h, w]``, logits.
        size: masks are first enlarged to this (bilinear).

    Returns:
        ``[B, K, h, w]``, or at ``size``: >= 0 and proportional to probabilities (Cheng et al. 2021, MaskFormer, 3.4).
    """
    weights = classes.softmax(-1)[..., :-1]
    if size is None or size == tuple(masks.shape[-2:]):
        return torch.einsum("bqc,bqhw->bchw", weights, masks.sigmoid())
    total = masks.new_zeros(len(masks), weights.shape[-1], *size)
    for i in range(0, masks.shape[1], _QUERIES_AT_A_TIME):
        some = slice(i, i + _QUERIES_AT_A_TIME)
        large = F.interpolate(masks[:, some], size, mode="bilinear", align_corners=False)
        total = total + torch.einsum("bqc,bqhw->bchw", weights[:, some], large.sigmoid())
    return total


def window_starts(length: int, side: int) -> list[int]:
    """Where the fewest windows of ``side`` pixels that cover ``length`` begin, spread evenly.

    >>> window_starts(2048, 1024), window_starts(100, 64), window_starts(64, 64)
    ([0, 1024], [0, 36], [0])
    """
    count = math.ceil(length / side)
    return [i * (length - side) // max(1, count - 1) for i in range(count)]


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
    return LoadedModel(wrapped, int(wrapped.config.num_labels), classes, mean, std, outputs)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"models of transformers need `pip install 'sparserefine[hf]'`, which brings it ({error})"
        ) from error


def _local_folder(name: str | Path) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise ValueError(
                f"{folder}: no {_CONFIG} in it; expected a folder written by transformers' save_pretrained"
            )
        return folder
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder; expected one written by save_pretrained, or a hub id")
    hub = importlib.import_module("huggingface_hub")  # transformers needs it
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        for weights in _WEIGHTS:  # the second kind is fetched only where the first is not there
            folder = Path(hub.snapshot_download(name, allow_patterns=[_CONFIG, *_PROCESSOR, "*.index.json", weights]))
            if list(folder.glob(weights)):
                break
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub gave none of that id ({_first_line(error)})"
        ) from error
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{name}: no {_CONFIG} under this hub id; expected a model of transformers")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


def _architecture(config: Mapping[str, Any], transformers: Any, where: Path) -> str:
    """Name of the class in transformers that the configuration is of."""
    given = config.get("architectures")
    name = given[0] if isinstance(given, list) and given else None
    known = isinstance(name, str) and (name in _MASKS or (name.endswith(_LOGITS) and not name.startswith("Auto")))
    if known and hasattr(transformers, str(name)):
        return str(name)
    works = sorted(
        {*(n for n in dir(transformers) if n.endswith(_LOGITS) and not n.startswith(("Auto", "TF"))), *_MASKS}
    )
    lacking = f", which transformers {transformers.__version__} does not have" if known else ""
    raise ValueError(f"{where}: architectures = {given}{lacking}; what works: {', '.join(works)}")


def _load(architecture: str, transformers: Any, folder: Path) -> Any:
    """The model with its weights, all of them."""
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, architecture).from_pretrained(
                str(folder),
                local_files_only=True,
                weights_only=True,
                dtype=torch.float32,
                attn_implementation=None,  # or config.json could name code on the hub that computes it
                ignore_mismatched_sizes=True,  # they come with the report
                output_loading_info=True,
            )
    except ImportError as error:
        raise ImportError(f"{folder}: {architecture} needs a package that is missing: {error}") from error
    except Exception as error:  # transformers, safetensors and torch raise many kinds for files that are broken
        if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            expected = " or ".join(pattern.replace("*", "") for pattern in _WEIGHTS)
            raise FileNotFoundError(f"{folder}: no weights in it; expected {expected}") from error
        raise ValueError(f"{folder}: transformers cannot make a {architecture} of it: {_first_line(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not _SPARE.search(key))
    if missing:
        raise ValueError(
            f"{folder}: the checkpoint lacks {len(missing)} weights of {architecture}, as {', '.join(missing[:3])}; "
            "they would be random. Was it saved from a model for another task?"
        )
    # transformers 5 tells (name, stored shape, expected shape), 4 the name
    misfits = sorted(
        key if isinstance(key, str) else "{}: {}, expected {}".format(*key) for key in report["mismatched_keys"]
    )
    misfits = [misfit for misfit in misfits if not _SPARE.search(misfit)]
    if misfits:
        raise ValueError(f"{folder}: {len(misfits)} weights are of other shapes than {_CONFIG} says, as {misfits[0]}")
    channels = getattr(model.config, "num_channels", 3)
    if channels != 3:
        raise ValueError(f"{folder}: the model takes {channels} channels, expected 3 (red, green, blue)")
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no report of weights: what matters of it is raised."""
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
    """Settings of the image processor and the file they are from; empty without one."""
    for name in _PROCESSOR:
        if (folder / name).is_file():
            found: Any = _read_json(folder / name)
            if name == _PROCESSOR[0]:
                found = found.get("image_processor")
            if isinstance(found, dict):
                return found, folder / name
    return {}, folder / _PROCESSOR[1]


def _normalisation(
    processor: Mapping[str, Any], model_type: str, where: Path
) -> tuple[tuple[float, float, float], tuple[float, float, float], bool]:
    """Mean and spread for pixels in 0..1, and whether the model wants blue, green, red; formula: :func:`hf`."""
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or model_type
    mobilevit = str(kind).lower().startswith("mobilevit")  # never normalises, though its files may name a mean
    flip = bool(processor.get("do_flip_channel_order", mobilevit))
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    scale = 255 * _numbers(factor, 1, f"{where}: rescale_factor", positive=True)[0]
    if mobilevit or not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif processor.get("image_mean") is None or processor.get("image_std") is None:
        _log.warning("%s: no normalisation told; taking ImageNet's. base.mean and base.std are for another one", where)
        return IMAGENET_MEAN, IMAGENET_STD, flip
    else:
        mean = _numbers(processor["image_mean"], 3, f"{where}: image_mean")
        std = _numbers(processor["image_std"], 3, f"{where}: image_std", positive=True)
    a, b, c = (m / scale for m in mean)
    d, e, f = (s / scale for s in std)
    return (a, b, c), (d, e, f), flip


def _numbers(value: Any, count: int, where: str, *, positive: bool = False) -> list[float]:
    """``count`` numbers from JSON; one alone stands for all."""
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in found)
    if not good or len(found) != count or (positive and min(found) <= 0):
        above = " above 0" if positive else ""
        raise ValueError(f"{where} = {value!r}, expected a number{above}{f' or {count}' if count > 1 else ''}")
    return [float(v) for v in found]


def _classes(loaded: Any, config: Mapping[str, Any], processor: Mapping[str, Any], where: Path) -> Classes | None:
    """Names and colours of the classes; ``None`` where the names are transformers' placeholders."""
    names = tuple(str(loaded.id2label[k]) for k in range(loaded.num_labels))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    known = dict(zip(CITYSCAPES.names, CITYSCAPES.palette, strict=True))
    palette = config.get("palette") or processor.get("palette")
    if palette is not None:
        if _is_palette(palette, len(names)):
            return Classes(names, tuple((r, g, b) for r, g, b in palette))
        _log.warning("%s: palette is not %d colours [red, green, blue] in 0..255; left out", where.parent, len(names))
    if {name.lower() for name in names} == set(known):
        return Classes(names, tuple(known[name.lower()] for name in names))
    return Classes(names, tuple(wheel(k) for k in range(len(names))))


def _is_palette(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(c, list) and len(c) == 3 and all(type(v) is int and 0 <= v < 256 for v in c) for c in value)
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
