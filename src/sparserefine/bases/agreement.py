"""What the files of a model, the configuration of a base, and the data say of classes and channels; they must agree."""

from __future__ import annotations

import logging

from sparserefine.bases.class_map import check_class_map, read_class_map
from sparserefine.bases.loaded import LoadedModel
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import MAX_CLASSES
from sparserefine.images.normalisation import channels_text, default_normalisation

_log = logging.getLogger(__name__)

USE_CLASS_MAP = (
    "give a class map (base.class_map, or for a dense model teacher.class_map or --dense_class_map), which assigns "
    "each class of the model to a class of the data"
)


def class_map_of(
    given: tuple[int, ...] | str | None, loaded: LoadedModel, data: Classes | int | None, label: str
) -> tuple[int, ...] | None:
    """Reads and checks the class map of a configuration; ``None`` if it has none."""
    if given is None:
        return None
    if isinstance(given, str):
        return read_class_map(given, loaded.classes or loaded.num_classes, data)
    where = f"base {label}: class_map"
    if loaded.num_classes not in (None, len(given)):
        raise ValueError(f"{where} has {len(given)} entries, expected {loaded.num_classes}: one per class of the model")
    check_class_map(given, data, where)
    return given


def check_order(model: Classes | None, data: Classes | None, label: str) -> None:
    """Raises ``ValueError`` if the model has the data's classes in another order; warns if the names differ."""
    if model is None or data is None:
        return
    model_names, data_names = ([name.strip().lower() for name in classes.names] for classes in (model, data))
    first = next((k for k, (a, b) in enumerate(zip(model_names, data_names, strict=True)) if a != b), None)
    if first is None:
        return
    pair = f"class {first} is {model.names[first]!r} in the model and {data.names[first]!r} in the data"
    if sorted(model_names) == sorted(data_names):
        raise ValueError(f"base {label}: the model has the data's classes in another order ({pair}); {USE_CLASS_MAP}")
    _log.warning(
        "base %s: its class names differ from the data's (%s); if their meanings differ, %s",
        label,
        pair,
        USE_CLASS_MAP,
    )


def class_count(
    loaded: LoadedModel,
    num_classes: int | None,
    classes: Classes | None,
    class_map: tuple[int, ...] | None,
    label: str,
) -> int:
    """K of the data: the given count, else the highest class of the class map + 1, else the model's own."""
    if classes is not None and num_classes not in (None, len(classes)):
        raise ValueError(f"base {label}: num_classes = {num_classes}, but {len(classes)} class names are given")
    count = num_classes if classes is None else len(classes)
    if count is None:
        count = loaded.num_classes if class_map is None else max(class_map) + 1
    if count is None:
        raise ValueError(
            f"base {label}: num_classes is missing, and the model does not state its class count; give num_classes"
        )
    if count > MAX_CLASSES:
        raise ValueError(f"base {label}: num_classes = {count}, expected at most {MAX_CLASSES}")
    if count < 2:
        raise ValueError(
            f"base {label}: num_classes = {count}, expected at least 2; a model with one foreground channel z gives "
            "two classes if it returns torch.cat([torch.zeros_like(z), z], 1)"
        )
    if class_map is None and loaded.num_classes not in (None, count):
        raise ValueError(f"base {label}: {loaded.num_classes} classes, the data has {count}; {USE_CLASS_MAP}")
    return count


def normalisation_of(
    loaded: LoadedModel,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    bands: tuple[int, ...] | None,
    label: str,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that the model takes.

    Args:
        loaded: the model and what its files say.
        mean: of the configuration, as are the next two.
        std: as many as ``mean``, if both are given.
        bands: the channels of the image that the model sees; as many, too.
        label: name of the base.

    Raises:
        ValueError: the configuration says another number of channels than the model's files.
    """
    stated = next((len(given) for given in (mean, std, bands) if given is not None), None)
    if loaded.channels is not None and stated not in (None, loaded.channels):
        raise ValueError(
            f"base {label}: takes {channels_text(loaded.channels)}, but base.mean, base.std or base.bands have "
            f"{stated}; expected as many (for a dense model, teacher.bands or --dense_bands)"
        )
    channels = stated or loaded.channels or len(loaded.mean)
    usual = loaded.mean, loaded.std
    if len(loaded.mean) != channels:
        usual = default_normalisation(channels)
    return mean or usual[0], std or usual[1]
