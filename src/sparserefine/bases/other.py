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
        bands: the same.
    """
    config = replace(base, name=name, ratio=ratio, size=size)
    if name.partition(":")[0] != base.name.partition(":")[0]:
        config = replace(config, mean=None, std=None, outputs=None, class_map=None, bands=None)
    if class_map is not None:
        config = replace(config, class_map=class_map)
    return config if bands is None else replace(config, bands=bands)
