"""A refiner on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle.

Values and tensors go in and come out; :class:`sparserefine.SparseRefiner` makes a refiner of them.
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
    """What the ``config.json`` of a folder says; the weights beside it are those it was written with.

    Attributes:
        folder: where it lies; a hub id's is in the cache.
        config: the refiner's choices.
        classes: names and colours.
        base: the base by name, and how it is used.
    """

    folder: Path
    config: RefinerConfig
    classes: Classes
    base: BaseConfig

    def load_base(
        self, *, trust_base: bool = False, runtime: Literal["onnxruntime", "openvino"] | None = None
    ) -> FrozenBase:
        """The base that the configuration names.

        Args:
            trust_base: allows a base of kind ``python:``, which runs code that the configuration names.
            runtime: what runs it; see :class:`BaseConfig`.

        Raises:
            ValueError: it names none, or one that cannot be loaded.
        """
        if not self.base.name:
            where = self.folder / CONFIG
            raise ValueError(f"{where}: names no base (it was built in Python); pass it as base=FrozenBase(...)")
        config = replace(self.base, runtime=runtime)
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
    """Writes a refiner.

    A base that is a :class:`UNet` is written beside it, so that the folder works anywhere; any other is named, not
    copied. Each file appears under its name only when it is whole. ``config.json`` comes last and holds the digest of
    the weights, so a folder whose writing was interrupted is recognised.

    Args:
        folder: made if need be; files of other names in it are left alone.
        config: the refiner's choices.
        classes: names and colours.
        base: the frozen model.
        weights: of extractor and ensembler, by name.
        dtype: of the stored floating-point weights; reading gives float32 again.
    """
    folder = Path(folder)
    stored = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(stored, temporary)
        read = load_file(temporary)
        # Compared as bytes: NaN, which differs from itself, is stored as faithfully as any number.
        if any(not torch.equal(_bytes(read[name]), _bytes(tensor)) for name, tensor in stored.items()):
            raise OSError(f"{folder / WEIGHTS}: what was written reads back differently; is the disk sound?")
    base_config = replace(base.config, runtime=None)  # of the machine, as the engine is, not of the refiner
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
    """Reads the configuration that :func:`write_refiner` wrote, and checks that the weights beside it belong to it.

    Args:
        name: a folder, or a hub id such as ``user/refiner`` (needs ``pip install huggingface_hub``).

    Raises:
        ValueError: the folder is incomplete, or of another format version.
        FileNotFoundError: there is no such folder and no such hub id.
    """
    folder = _local_folder(name)
    values = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}"
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {values.get('format_version')!r}, this sparserefine reads {FORMAT_VERSION}; "
            "update sparserefine or store the refiner again"
        )
    of_config = {field.name for field in fields(RefinerConfig)}
    expected = {"format_version", "classes", "palette", *of_config, "base", "weights_sha256"}
    if set(values) != expected:
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(sorted(set(values) ^ expected))}")
    weights = folder / WEIGHTS
    if not weights.is_file() or _digest(weights) != values["weights_sha256"]:
        raise ValueError(f"{weights}: missing, or not the file that {CONFIG} was written with; store the refiner again")
    classes = _parse(Classes, {"names": values["classes"], "palette": values["palette"]}, f"{where}: classes, palette")
    config = _parse(RefinerConfig, {name: values[name] for name in of_config}, where)
    try:
        config.selector.check(len(classes))
    except ValueError as error:
        raise ValueError(f"{where}: selector: {error}") from error
    return StoredRefiner(folder, config, classes, _parse(BaseConfig, values["base"], f"{where}: base"))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Weights of extractor and ensembler by name, on the CPU, from a folder that :func:`write_refiner` wrote.

    Raises:
        ValueError: there is no such file, or it is not one of safetensors.
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
    if file.endswith((".onnx", ".pth", ".pt")):  # of the base, where it lies beside the refiner
        hub_snapshot(name, file, f"{file}.data", f"{file}_data")
    return folder


def _parse(cls: type[T], values: Any, where: str) -> T:
    """A dataclass, and those inside it, from JSON values; errors name the key and the file."""
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


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
