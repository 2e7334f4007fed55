"""A refiner on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle.

This file reads and writes values and tensors; :class:`sparserefine.SparseRefiner` builds a refiner from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.bases.load import load_base
from sparserefine.files.hub import hub_snapshot
from sparserefine.files.json import read_json
from sparserefine.files.whole import written_whole
from sparserefine.images.classes import Classes
from sparserefine.stages.config import RefinerConfig

FORMAT_VERSION = 1
CONFIG, WEIGHTS, BASE = "config.json", "model.safetensors", "base.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class StoredRefiner:
    """Contents of a folder's ``config.json``. The weights file beside it was checked to belong to it.

    Attributes:
        folder: the folder; for a hub id, its local copy in the cache.
        config: settings of the refiner.
        classes: names and colours.
        base: name and input settings of the base, as stored; :meth:`load_base` checks them.
    """

    folder: Path
    config: RefinerConfig
    classes: Classes
    base: Any

    def load_base(
        self, *, trust_base: bool = False, runtime: Literal["onnxruntime", "openvino"] | None = None
    ) -> FrozenBase:
        """Loads the base that ``config.json`` names.

        Args:
            trust_base: allows a base ``python:<module>:<callable>``, which runs that code.
            runtime: runtime of the base; see :class:`BaseConfig`.

        Raises:
            ValueError: no base is named, its settings are wrong, or it cannot be loaded.
        """
        where = self.folder / CONFIG
        stored = _parse(BaseConfig, self.base, f"{where}: base")
        if not stored.name:
            raise ValueError(f"{where}: names no base (it was built in Python); pass it as base=FrozenBase(...)")
        config = replace(stored, runtime=runtime)
        return load_base(config, self.classes, folder=self.folder, trust_base=trust_base)


def write_refiner(
    folder: str | Path,
    config: RefinerConfig,
    classes: Classes,
    base: FrozenBase,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a refiner to a folder.

    If the base is a :class:`UNet`, its weights are written too, so the folder works anywhere. Any other base is stored
    by name only. A file gets its name only once it is complete. ``config.json`` is written last and holds the digest of
    the weights, so :func:`read_refiner` detects an interrupted write.

    Args:
        folder: created if missing; other files in it are left alone.
        config: settings of the refiner.
        classes: names and colours.
        base: the frozen model.
        weights: weights of extractor and ensembler, by name.
        dtype: dtype of the stored floating-point weights; loading converts them back to float32.

    Raises:
        OSError: a file cannot be written, or the weights read back differ.
    """
    folder = Path(folder)
    stored = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(stored, temporary)
        read = load_file(temporary)
        # Compare bytes, since NaN != NaN.
        if any(not torch.equal(_as_bytes(read[name]), _as_bytes(tensor)) for name, tensor in stored.items()):
            raise OSError(f"{folder / WEIGHTS}: reads back differently; check the disk, then save again")
    base_config = replace(base.config, runtime=None)  # belongs to the machine, not to the refiner
    if isinstance(base.model, UNet):
        save_unet(base.model, folder / BASE, dtype=dtype)
        base_config = replace(base_config, name=f"unet:{BASE}")
    values = {
        "format_version": FORMAT_VERSION,
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        **asdict(config),
        "base": asdict(base_config),
        "weights_sha256": _digest(folder / WEIGHTS),
    }
    with written_whole(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_refiner(name: str | Path) -> StoredRefiner:
    """Reads the ``config.json`` that :func:`write_refiner` wrote, and checks that the weights file belongs to it.

    Args:
        name: a folder, or a hub id such as ``user/refiner`` (needs ``pip install huggingface_hub``).

    Raises:
        ValueError: the folder is incomplete, or has another format version.
        FileNotFoundError: ``name`` is neither a folder nor a hub id.
    """
    folder = _local_folder(name)
    values = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}"
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {values.get('format_version')!r}, this sparserefine reads {FORMAT_VERSION}; "
            "update sparserefine, or save the refiner again with this version"
        )
    config_keys = {field.name for field in fields(RefinerConfig)}
    expected = {"format_version", "classes", "palette", *config_keys, "base", "weights_sha256"}
    if set(values) != expected:
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(sorted(set(values) ^ expected))}")
    weights = folder / WEIGHTS
    if not weights.is_file() or _digest(weights) != values["weights_sha256"]:
        raise ValueError(f"{weights}: missing, or not the file that {CONFIG} was written with; save the refiner again")
    classes = _parse(Classes, {"names": values["classes"], "palette": values["palette"]}, f"{where}: classes, palette")
    config = _parse(RefinerConfig, {name: values[name] for name in config_keys}, where)
    try:
        config.selector.check(len(classes))
    except ValueError as error:
        raise ValueError(f"{where}: selector: {error}") from error
    return StoredRefiner(folder, config, classes, values["base"])


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Weights of extractor and ensembler by name, on the CPU, from a folder that :func:`write_refiner` wrote.

    Raises:
        ValueError: there is no weights file, or it is not a safetensors file.
    """
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; expected a folder written by save_pretrained")
    try:
        return load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a safetensors file, or cut short ({error})") from error


def _local_folder(name: str | Path) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder}: no {CONFIG} in it; expected a folder written by save_pretrained")
        return folder
    folder = hub_snapshot(name, "*.json", "*.safetensors")
    base = read_json(folder / CONFIG).get("base") if (folder / CONFIG).is_file() else None
    file = str(base.get("name", "")).rpartition(":")[2] if isinstance(base, Mapping) else ""
    if file.endswith((".onnx", ".pth", ".pt")):  # the base's own weights, if they are in the same repository
        hub_snapshot(name, file, f"{file}.data", f"{file}_data")
    return folder


def _parse(cls: type[T], values: Any, where: str) -> T:
    """Builds a dataclass, and the dataclasses inside it, from JSON values. Errors name the file and the key."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r}, expected an object")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if set(values) - known:
        raise ValueError(f"{where}: unknown key {sorted(set(values) - known)[0]!r}, expected {sorted(known)}")
    types = get_type_hints(cls)
    parsed = {
        key: _parse(types[key], value, f"{where}: {key}") if is_dataclass(types[key]) else _tuples(value)
        for key, value in values.items()
    }
    try:
        return cls(**parsed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
