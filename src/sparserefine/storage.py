"""A refiner on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.bases.load import load_base
from sparserefine.files.json import read_json
from sparserefine.files.whole import written_whole
from sparserefine.images.classes import Classes
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS, _BASE = "config.json", "model.safetensors", "base.safetensors"

T = TypeVar("T")


def save_refiner(refiner: SparseRefiner, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes extractor, ensembler and configuration.

    A base that is a :class:`UNet` is written beside them, so that the folder works anywhere; any other is named, not
    copied. Each file appears under its name only when it is whole. ``config.json`` comes last and holds the digest of
    the weights, so a folder whose writing was interrupted is recognised.

    Args:
        refiner: what to store.
        folder: made if need be; files of other names in it are left alone.
        dtype: of the stored floating-point weights; loading gives float32 again.
    """
    folder = Path(folder)
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in refiner.state_dict().items()
        if not name.startswith("base.")
    }
    with written_whole(folder / _WEIGHTS) as temporary:
        save_file(weights, temporary)
        stored = load_file(temporary)
        # Compared as bytes: NaN, which differs from itself, is stored as faithfully as any number.
        if any(not torch.equal(_bytes(stored[name]), _bytes(tensor)) for name, tensor in weights.items()):
            raise OSError(f"{folder / _WEIGHTS}: what was written reads back differently; is the disk sound?")
    base = replace(refiner.base.config, runtime=None)  # of the machine, as the engine is, not of the refiner
    if isinstance(refiner.base.model, UNet):
        save_unet(refiner.base.model, folder / _BASE, dtype=dtype)
        base = replace(base, name=f"unet:{_BASE}")
    config = {
        "format_version": FORMAT_VERSION,
        "classes": list(refiner.classes.names),
        "palette": [list(colour) for colour in refiner.classes.palette],
        "selector": asdict(refiner.selector),
        "extractor": asdict(refiner.extractor_config),
        "ensembler": asdict(refiner.ensembler_config),
        "upsampling": refiner.upsampling,
        "mean": list(refiner.mean),
        "std": list(refiner.std),
        "base": asdict(base),
        "weights_sha256": _digest(folder / _WEIGHTS),
    }
    with written_whole(folder / _CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_refiner(
    name: str | Path,
    *,
    base: FrozenBase | None = None,
    trust_base: bool = False,
    engine: str = "auto",
    runtime: Literal["onnxruntime", "openvino"] | None = None,
) -> SparseRefiner:
    """Reads what :func:`save_refiner` wrote, in evaluation mode.

    Args:
        name: a folder, or a hub id such as ``user/refiner`` (needs ``pip install huggingface_hub``).
        base: the base itself, where the configuration does not name one or another one is wanted.
        trust_base: allows a base of kind ``python:``, which runs code that the configuration names.
        engine: see :class:`SparseRefiner`.
        runtime: of the base that the configuration names; see :class:`BaseConfig`.

    Raises:
        ValueError: the folder is incomplete, of another format version, or does not fit the base.
        FileNotFoundError: there is no such folder and no such hub id.
    """
    folder = _local_folder(name)
    config = read_json(folder / _CONFIG)
    where = f"{folder / _CONFIG}"
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {config.get('format_version')!r}, this sparserefine reads {FORMAT_VERSION}; "
            "update sparserefine or store the refiner again"
        )
    expected = {
        *("format_version", "classes", "palette", "selector", "extractor", "ensembler"),
        *("upsampling", "mean", "std", "base", "weights_sha256"),
    }
    if set(config) != expected:
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(sorted(set(config) ^ expected))}")
    weights = folder / _WEIGHTS
    if not weights.is_file() or _digest(weights) != config["weights_sha256"]:
        raise ValueError(
            f"{weights}: missing, or not the file that {_CONFIG} was written with; store the refiner again"
        )
    classes = _parse(Classes, {"names": config["classes"], "palette": config["palette"]}, f"{where}: classes, palette")
    if base is None:
        base_config = _parse(BaseConfig, config["base"], f"{where}: base")
        if not base_config.name:
            raise ValueError(f"{where}: names no base (it was built in Python); pass it as base=FrozenBase(...)")
        base = load_base(replace(base_config, runtime=runtime), classes, folder=folder, trust_base=trust_base)
    elif runtime is not None:
        raise ValueError(f"runtime {runtime!r} and a base: give the runtime to the base, BaseConfig(runtime=...)")
    elif base.num_classes != len(classes):
        raise ValueError(f"{where}: {len(classes)} classes, the base given has {base.num_classes}")
    selector = _parse(Selector, config["selector"], f"{where}: selector")
    extractor = _parse(ExtractorConfig, config["extractor"], f"{where}: extractor")
    ensembler = _parse(EnsemblerConfig, config["ensembler"], f"{where}: ensembler")
    try:
        refiner = SparseRefiner(
            base,
            selector=selector,
            extractor=extractor,
            ensembler=ensembler,
            classes=classes,
            upsampling=config["upsampling"],
            mean=_tuples(config["mean"]),
            std=_tuples(config["std"]),
            engine=engine,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    load_weights(refiner, folder)
    return refiner.eval()


def load_weights(refiner: SparseRefiner, folder: Path) -> None:
    """Reads extractor and ensembler of a stored refiner into one of the same shape.

    Raises:
        ValueError: no such file, or weights of another shape.
    """
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; expected a folder written by save_pretrained")
    try:
        missing, unexpected = refiner.load_state_dict(load_file(weights), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: does not fit this refiner: {error}") from error
    missing = [key for key in missing if not key.startswith("base.")]
    if missing or unexpected:
        raise ValueError(f"{weights}: does not fit this refiner: missing {missing[:3]}, unexpected {unexpected[:3]}")


def _local_folder(name: str | Path) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"{folder}: no {_CONFIG} in it; expected a folder written by save_pretrained")
        return folder
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no such folder; if it is a hub id, `pip install huggingface_hub` lets me fetch it"
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        base = read_json(folder / _CONFIG).get("base") if (folder / _CONFIG).is_file() else None
        file = str(base.get("name", "")).rpartition(":")[2] if isinstance(base, Mapping) else ""
        if file.endswith((".onnx", ".pth", ".pt")):  # of the base, where it lies beside the refiner
            snapshot_download(name, allow_patterns=[file, f"{file}.data", f"{file}_data"])
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name}: no such folder, and the hub gave none of that id ({error})") from error


def _parse(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from JSON values; errors name the key and the file."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r}, expected an object")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if set(values) - known:
        raise ValueError(f"{where}: unknown key {sorted(set(values) - known)[0]!r}, expected {sorted(known)}")
    try:
        return cls(**{key: _tuples(value) for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
