"""The configuration of another base for the same data: a dense model to compare with, or a teacher."""

from __future__ import annotations

from dataclasses import replace

from sparserefine.bases.base import BaseConfig


def other_config(
    base: BaseConfig,
    name: str,
    *,
    ratio: float | None = None,
    size: tuple[int, int] | None = None,
    class_map: tuple[int, ...] | str | None = None,
    bands: tuple[int, ...] | None = None,
) -> BaseConfig:
    """The base's settings if both are of the same kind, else those in the other's own files.

    Args:
        base: configuration of the base.
        name: of the other one.
        ratio: its input size relative to the image; give either this or ``size``.
        size: its input height and width [px].
        class_map: of the other one; default: the base's if both are of the same kind.
        bands: the same; mean and std are then those in the other's files, if the base's are of another number.
    """
    config = replace(base, name=name, ratio=ratio, size=size)
    if name.partition(":")[0] != base.name.partition(":")[0]:
        config = replace(config, mean=None, std=None, outputs=None, class_map=None, bands=None)
    if class_map is not None:
        config = replace(config, class_map=class_map)
    if bands is None:
        return config
    given = [len(values) for values in (config.mean, config.std) if values is not None]
    if any(count != len(bands) for count in given):  # they are of the base's own channels
        config = replace(config, mean=None, std=None, bands=None)
    return replace(config, bands=bands)
