"""What the loaders return, and how to get the coarse outputs from what a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class LoadedModel:
    """A model and what its files say about it; loaders such as :func:`sparserefine.bases.families.hf.hf` return one.

    Attributes:
        model: normalised ``float32 [B, C, h, w]`` -> coarse outputs.
        num_classes: K of the model; ``None`` if it is not known before the model runs.
        classes: names and colours, if the files have them.
        mean: per channel, of the normalisation that the model was trained with, for pixels in 0..1.
        std: the same for the standard deviation.
        outputs: ``logits`` or ``scores``.
        channels: C of the model, as many as ``mean`` has numbers; ``None``: it is not known, and the configuration of
            the base may say another number.
    """

    model: Callable[..., Any]
    num_classes: int | None = None
    classes: Classes | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    outputs: Literal["logits", "scores"] = "logits"
    channels: int | None = None


def tensor_of(output: Any, label: str) -> Tensor:
    """Gets the coarse outputs from a model's return value; forms: :class:`sparserefine.bases.base.FrozenBase`.

    Raises:
        TypeError: the value has none of those forms.
    """
    found = output
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("logits", "out") if key in found), found)
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, Sequence) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"base {label}: returned {type(output).__name__}{keys}, expected a tensor, a tuple that starts with one, a "
            "mapping with 'logits' or 'out', or an object with .logits; wrap the model in a function that returns it"
        )
    return found
