"""Weights of a trained refiner as the start of another one, which may have other classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import ExtractorConfig

_STEM, _CONTEXT, _FUSER = "extractor.stem.weight", "extractor.context", "ensembler.fuser"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What decides the names, shapes and meanings of a refiner's weights: its settings and its class count K."""

    config: RefinerConfig
    num_classes: int


@dataclass(frozen=True)
class WarmStart:
    """What a refiner took over from a trained one.

    Attributes:
        name: the trained refiner.
        taken: number of tensors that were taken over whole.
        total: number of tensors of the refiner.
        new: the parts that begin anew, with the reason.
    """

    name: str
    taken: int
    total: int
    new: tuple[str, ...]

    def __str__(self) -> str:
        if not self.new:
            return f"init {self.name}: all {self.total} tensors taken"
        return f"init {self.name}: {self.taken} of {self.total} tensors taken; new: {', '.join(self.new)}"


def weights_to_start(
    name: str, stored: Mapping[str, Tensor], former: Shape, own: Mapping[str, Tensor], shape: Shape
) -> tuple[dict[str, Tensor], WarmStart]:
    """Weights for a refiner, from those of a trained one where they fit.

    What depends on the classes begins anew if their number differs: the head, the gate and the fuser, the layers that
    see probabilities; so does what sees the channels of images, if their number differs; and what the trained refiner
    lacks, or has in another kind.

    Args:
        name: of the trained refiner, for messages.
        stored: weights of the trained refiner, which fit ``former``.
        former: shape of the trained refiner.
        own: the weights of the new refiner as they were initialised.
        shape: shape of the new refiner.

    Returns:
        The weights by name, all of ``own``, and what was taken.

    Raises:
        ValueError: the extractors differ in more than what follows from the classes and the channels.
    """
    _check_extractor(name, former.config.extractor, shape.config.extractor)
    for field in ("mean", "std"):
        there, here = getattr(former.config, field), getattr(shape.config, field)
        if there != here and len(there) == len(here):
            _log.warning(
                "%s: was trained with %s = %s, this configuration has %s; set %s to the former value, unless the "
                "images are of another kind",
                *(name, field, list(there), list(here), field),
            )
    parts = {part: [key for key in own if _part(key) == part] for part in dict.fromkeys(map(_part, own))}
    weights, new = dict(own), list[str]()
    for part, keys in parts.items():
        reason = _why_new(part, keys, stored, former, own, shape)
        if reason is None:
            weights.update({key: stored[key] for key in keys})
        else:
            new += [f"{part.rpartition('.')[2]} ({reason})"]
            if part == _part(_STEM):
                weights[_STEM] = _stem(stored[_STEM], former, own[_STEM], shape)
    taken = sum(weights[key] is stored.get(key) for key in own)
    return weights, WarmStart(name, taken, len(own), tuple(new))


def _part(key: str) -> str:
    """``extractor.head`` of ``extractor.head.weight``: what begins anew as a whole."""
    return ".".join(key.split(".")[:2])


def _why_new(
    part: str,
    keys: list[str],
    stored: Mapping[str, Tensor],
    former: Shape,
    own: Mapping[str, Tensor],
    shape: Shape,
) -> str | None:
    """Why a part begins anew; ``None`` if it is taken over."""
    if any(key not in stored for key in keys):
        return "not there before"
    if any(stored[key].shape != own[key].shape for key in keys):
        counts = [("classes", former.num_classes, shape.num_classes)]
        if part in (_part(_STEM), _CONTEXT):
            counts.insert(0, ("channels", former.config.channels, shape.config.channels))
        return ", ".join(f"{before} -> {now} {what}" for what, before, now in counts if before != now)
    fusers = former.config.ensembler.fuser, shape.config.ensembler.fuser
    if part == _FUSER and fusers[0] != fusers[1]:  # of the same shapes, but one is added to the blend
        return f"{fusers[0]} -> {fusers[1]}"
    return None


def _check_extractor(name: str, there: ExtractorConfig, here: ExtractorConfig) -> None:
    """Raises ``ValueError`` if the extractors differ; only context may be added to one that has none."""
    for field in fields(ExtractorConfig):
        before, now = getattr(there, field.name), getattr(here, field.name)
        if before != now and (field.name, before, now) != ("context", False, True):
            values = [list(value) if isinstance(value, tuple) else value for value in (before, now)]
            raise ValueError(
                f"{name}: was trained with extractor.{field.name} = {values[0]}, this configuration has {values[1]}; "
                "give the same value (and the same preset, if there is one), or another training.init"
            )


def _stem(stored: Tensor, former: Shape, own: Tensor, shape: Shape) -> Tensor:
    """First layer ``[T, C_in, C_out]``: the stored weights of each input feature, new ones where its width differs."""
    result = own.clone()
    for before, now in zip(_channels(former), _channels(shape), strict=True):
        if before.stop - before.start == now.stop - now.start:
            result[:, now] = stored[:, before]
    return result


def _channels(shape: Shape) -> Iterator[slice]:
    """The channels of each input feature."""
    end = 0
    for feature in shape.config.extractor.features:
        start, end = end, end + ExtractorConfig(features=(feature,)).channels(shape.num_classes, shape.config.channels)
        yield slice(start, end)
