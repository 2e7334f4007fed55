"""What loaders of models return, and what models return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class LoadedModel:
    """A model and what its files tell of it; doors such as :func:`sparserefine.bases.families.hf.hf` return one.

    Attributes:
        model: ``float32 [B, 3, h, w]``, normalised -> coarse outputs.
        num_classes: of the model; ``None``: not known before it runs.
        classes: names and colours, where the files have them.
        mean: the normalisation that it was trained with, for pixels in 0..1.
        std: likewise.
        outputs: ``logits`` or ``scores``.
    """

    model: Callable[..., Any]
    num_classes: int | None = None
    classes: Classes | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    outputs: Literal["logits", "scores"] = "logits"


def tensor_of(output: Any, label: str) -> Tensor:
    """The coarse outputs in what a model returned: see :class:`sparserefine.bases.base.FrozenBase`.

    Raises:
        TypeError: it is none of those forms.
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
