"""A refiner on disk: a folder with ``config.json`` and ``model.safetensors``. No pickle.

This file reads and writes values and tensors; :class:`sparserefine.SparseRefiner` builds a refiner from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, unet_tensors
from sparserefine.bases.load import load_base
from sparserefine.bases.refined import RefinedModel, RefinerReader
from sparserefine.files.digest import sha256_of
from sparserefine.files.hub import hub_snapshot
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.json import read_json
from sparserefine.files.tensors import WEIGHT_DTYPES, check_finite, write_tensors
from sparserefine.files.text import printable
from sparserefine.files.typed import from_json, shown
from sparserefine.files.whole import NEXT, folder_written_whole
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import MAX_CLASSES
from sparserefine.stages.config import RefinerConfig

FORMAT_VERSION = 1
CONFIG, WEIGHTS, BASE = "config.json", "model.safetensors", "base.safetensors"
DEMO = Path(__file__).parent / "assets" / "demo" / "refiner"
"""The refiner in this package and its base, trained on HRF subjects 06-13 (``examples/hrf``)."""

_OPTIONAL = ("class_map", "runtime", "bands")
"""Keys of the base that files of the first weeks of version 0.1.0 lack, or that are only written if they are set."""
_OPTIONAL_SETTINGS = ("context", "images", *(field.name for field in fields(ImageConfig)))
"""Keys of the settings that are written only where they say something."""


@dataclass(frozen=True)
class StoredRefiner:
    """Contents of a folder's ``config.json``. The weights file was checked to belong to it.

    Attributes:
        folder: the folder; for a hub id, its local copy in the cache.
        weights: the weights file. After an interrupted save it may lie in a folder inside ``folder``.
        config: settings of the refiner.
        classes: names and colours.
        base: name and input settings of the base, as stored; :meth:`load_base` checks them.
        base_folder: where relative names of the base's files are looked up.
        base_sha256: digest of the base's weights, as stored; ``None``: they are not in the folder, or an older version
            stored them.
        base_identity: identity of a base that is itself a refiner, as stored; ``None``: it is another one.
    """

    folder: Path
    weights: Path
    config: RefinerConfig
    classes: Classes
    base: Any
    base_folder: Path
    base_sha256: Any
    base_identity: Any

    def load_base(
        self,
        *,
        trust_base: bool = False,
        runtime: Literal["onnxruntime", "openvino"] | None = None,
        refiners: RefinerReader | None = None,
    ) -> FrozenBase:
        """Loads the base that ``config.json`` names.

        Args:
            trust_base: allows a base ``python:<module>:<callable>``, which runs that code.
            runtime: runtime of the base; see :class:`BaseConfig`.
            refiners: reads a base ``refiner:<folder>``.

        Raises:
            ValueError: no base is named, its settings are wrong, it cannot be loaded, or its stored weights, or the
                refiner that it is, are not those that ``config.json`` was written with.
            FileNotFoundError: the base's files are neither in the refiner's folder nor where its name says.
        """
        where = self.folder / CONFIG
        stored = from_json(BaseConfig, self.base, f"{where}", "base", optional=_OPTIONAL)
        if not stored.name:
            raise ValueError(f"{where}: names no base (it was built in Python); pass it as base=FrozenBase(...)")
        file = self.base_folder / BASE
        if self.base_sha256 is not None and file.exists() and sha256_of(file) != self.base_sha256:
            raise ValueError(f"{file}: not the file that {CONFIG} was written with; save the refiner again")
        config = replace(stored, runtime=runtime)
        try:
            base = load_base(config, self.classes, folder=self.base_folder, trust_base=trust_base, refiners=refiners)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{where}: base {printable(stored.name)}: {error}; files of a base are looked for in the refiner's "
                "folder, and then in the current one"
            ) from error
        if self.base_identity is not None and base.identity != self.base_identity:
            raise ValueError(
                f"{where}: base {printable(stored.name)} has changed since: its identity was "
                f"{printable(str(self.base_identity))[:80]}, it is {base.identity} now; put the former one back, or "
                "pass the base to use as base=..."
            )
        return base


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
    by name only. The files of a former refiner there are replaced together: whenever this is interrupted,
    :func:`read_refiner` finds the former refiner or the new one.

    Args:
        folder: created if missing; other files in it are left alone.
        config: settings of the refiner.
        classes: names and colours.
        base: the frozen model.
        weights: weights of extractor and ensembler, by name.
        dtype: dtype of the stored floating-point weights; loading converts them back to float32.

    Raises:
        ValueError: weights are NaN or infinite, or not within the range of ``dtype``; nothing is written.
        OSError: a file cannot be written, or the weights read back differ; ``folder`` then has its old files.
    """
    if folder == "":
        raise ValueError("the name of the folder is empty, expected one for the refiner")
    folder = Path(folder)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype = {dtype}, expected {', '.join(map(str, WEIGHT_DTYPES))}")
    stored = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()
    }
    check_finite(stored, f"{folder}: not saved, in {dtype}")
    base_config = replace(base.config, runtime=None)  # belongs to the machine, not to the refiner
    beside = None
    if isinstance(base.model, UNet):
        beside = unet_tensors(base.model, dtype)
        base_config = replace(base_config, name=f"unet:{BASE}")
    values = {
        "format_version": FORMAT_VERSION,
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        **asdict(config),
        "base": asdict(base_config),
    }
    if not config.extractor.context:  # versions that do not know it can still read the refiner
        del values["extractor"]["context"]
    if base_config.bands is None:
        del values["base"]["bands"]
    del values["images"]["max_megapixels"]  # belongs to the machine, not to the refiner
    if replace(config.images, max_megapixels=None) == ImageConfig():
        del values["images"]
    if isinstance(base.model, RefinedModel):
        values["base_identity"] = base.identity
    with folder_written_whole(folder, last=CONFIG) as temporary:
        write_tensors(temporary / WEIGHTS, stored)
        values["weights_sha256"] = sha256_of(temporary / WEIGHTS)
        if beside is not None:
            write_tensors(temporary / BASE, *beside)
            values["base_sha256"] = sha256_of(temporary / BASE)
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_refiner(name: str | Path) -> StoredRefiner:
    """Reads the ``config.json`` that :func:`write_refiner` wrote, and checks that the weights file belongs to it.

    Args:
        name: a folder, or a hub id such as ``user/refiner`` (needs ``pip install huggingface_hub``).

    Raises:
        ValueError: the folder is incomplete, has another format version, or a setting is wrong; the message names it.
        FileNotFoundError: ``name`` is neither a folder nor a hub id.
    """
    folder = _local_folder(name)
    files = _files_in(folder)
    values = read_json(files.config)
    fits = files.have_weights_of(values)
    if not fits:  # a training run may have stored a better refiner there since its configuration was read
        files = _files_in(folder)
        values = read_json(files.config)
        fits = files.have_weights_of(values)
    where = f"{files.config}"
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {shown(version)}, this sparserefine reads {FORMAT_VERSION}; "
            "update sparserefine, or save the refiner again with this version"
        )
    config_keys = [field.name for field in fields(RefinerConfig) if field.name != "images" or "images" in values]
    expected = {"format_version", "classes", "palette", *config_keys, "base", "weights_sha256"}
    found = set(values) - {"base_sha256", "base_identity"}
    if found != expected:
        wrong = sorted(found ^ expected)
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(map(printable, wrong[:5]))}")
    if not fits:
        raise ValueError(
            f"{files.weights}: missing, or not the file that {CONFIG} was written with; save the refiner again"
        )
    config = from_json(RefinerConfig, {name: values[name] for name in config_keys}, where, optional=_OPTIONAL_SETTINGS)
    classes = _classes(values, where)
    try:
        config.selector.check(len(classes))
    except ValueError as error:
        raise ValueError(f"{where}: selector: {error}") from error
    return StoredRefiner(
        folder,
        files.weights,
        config,
        classes,
        values["base"],
        files.base.parent,
        values.get("base_sha256"),
        values.get("base_identity"),
    )


def weights_of(folder: str | Path) -> Path:
    """The file with the weights of extractor and ensembler, in a folder that :func:`write_refiner` wrote.

    Raises:
        ValueError: there is no such file.
    """
    file = _files_in(Path(folder)).weights
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a folder written by save_pretrained")
    return file


@dataclass(frozen=True)
class _Files:
    """Where the files of a stored refiner lie."""

    config: Path
    weights: Path
    base: Path

    def have_weights_of(self, values: Mapping[str, Any]) -> bool:
        """Whether the weights file is the one that a ``config.json`` was written with."""
        return self.weights.is_file() and sha256_of(self.weights) == values.get("weights_sha256")

    def are_whole(self) -> bool:
        """Whether all of them were certainly written together."""
        try:
            values = read_json(self.config)
        except ValueError:
            return False
        base = values.get("base")
        stored = isinstance(base, Mapping) and base.get("name") == f"unet:{BASE}"
        # Older files have no digest of the base, so a base that was written later cannot be told from theirs.
        if stored and not (self.base.is_file() and sha256_of(self.base) == values.get("base_sha256")):
            return False
        return self.have_weights_of(values)


def _files_in(folder: Path) -> _Files:
    """The files of a refiner, also of one whose saving was interrupted while files got their final names."""
    here, staged = folder, folder / NEXT
    files = _Files(here / CONFIG, here / WEIGHTS, here / BASE)
    if not staged.is_dir() or files.are_whole():
        return files
    newer = _Files(*(staged / name if (staged / name).is_file() else here / name for name in (CONFIG, WEIGHTS, BASE)))
    return newer if newer.are_whole() else files


@dataclass(frozen=True)
class _ClassList:
    """Two keys of ``config.json``."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"classes: {len(self.classes)} names, expected 2 to {MAX_CLASSES}")
        bad = next((colour for colour in self.palette if not all(0 <= value <= 255 for value in colour)), None)
        if bad is not None:
            raise ValueError(f"palette: {shown(list(bad))}, expected red, green and blue of 0 to 255")


def _classes(values: Mapping[str, Any], where: str) -> Classes:
    found = from_json(_ClassList, {name: values[name] for name in ("classes", "palette")}, where)
    try:
        return Classes(found.classes, found.palette)
    except ValueError as error:
        raise ValueError(f"{where}: classes, palette: {error}") from error


def _local_folder(name: str | Path) -> Path:
    if name == "":
        raise ValueError("the name of the refiner is empty, expected a folder written by save_pretrained, or a hub id")
    folder = Path(name)
    if folder.is_dir():
        if not _files_in(folder).config.is_file():
            raise ValueError(f"{folder}: no {CONFIG} in it; expected a folder written by save_pretrained")
        return folder
    folder = hub_snapshot(name, "*.json", "*.safetensors")
    base = read_json(folder / CONFIG).get("base") if (folder / CONFIG).is_file() else None
    file = str(base.get("name", "")).rpartition(":")[2] if isinstance(base, Mapping) else ""
    if file.endswith((".onnx", ".pth", ".pt")):  # the base's own weights, if they are in the same repository
        hub_snapshot(name, file, f"{file}.data", f"{file}_data")
    return folder
