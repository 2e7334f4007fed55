"""HfModel wraps a model of transformers to return one tensor; :mod:`sparserefine.bases.families.hf` loads them."""

from __future__ import annotations

import json
import math
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKS = (
    "EomtDinov3ForUniversalSegmentation",
    "EomtForUniversalSegmentation",
    "Mask2FormerForUniversalSegmentation",
    "MaskFormerForInstanceSegmentation",
)
"""Models that return masks, and a class distribution for each mask."""

_MASKS_AT_ONCE = 32
"""Number of masks to enlarge at once: limits the memory at EoMT's window size."""

_NOT_SETTINGS = ("_name_or_path", "architectures", "id2label", "label2id", "transformers_version")
"""Entries of a configuration that do not change the outputs."""


class HfModel(nn.Module):
    """Wraps a segmentation model of transformers: images in, one tensor out.

    transformers chooses the attention: torch's ``scaled_dot_product_attention`` if the model supports it. It is the
    fastest on a CPU, and :func:`sparserefine.bases.macs.count_macs` counts it, since torch runs it as matrix products
    on the meta device.

    Input sizes: DPT, and BEiT since transformers 5, interpolate their position embeddings to any multiple of their
    patch size (DPT: of twice that). Data2Vec and hybrid DPT take only their own size. EoMT takes images whose shorter
    side is its own size: as in transformers' processor, square windows are placed along the longer side, their masks
    are enlarged to the window, and scores are averaged where two windows overlap. Others take any size.

    Args:
        model: one of the models that :func:`hf` supports, with its ``.config``.
        flip_channels: the model takes channels in the order blue, green, red.

    Attributes:
        settings: everything except the weights that the outputs depend on (for
            :attr:`sparserefine.bases.base.FrozenBase.identity`).

    Raises:
        ValueError: the model is an EoMT that was saved during its mask annealing, before training ended.
    """

    def __init__(self, model: nn.Module, *, flip_channels: bool = False) -> None:
        super().__init__()
        self.model, self.flip_channels = model.eval(), flip_channels
        foreign = cast(Any, model)
        self.config = foreign.config
        self.kind: str = self.config.model_type
        self.gives_masks = type(model).__name__ in MASKS
        if getattr(foreign, "auxiliary_head", None) is not None:  # only for training, and random if the file lacks it
            foreign.auxiliary_head = None
        probabilities: list[float] = []
        if self.kind == "mask2former":  # without this it returns no class scores
            self.config.use_auxiliary_loss = True
        elif self.kind == "maskformer":  # with this it computes the masks of every decoder layer
            self.config.use_auxiliary_loss = False
        elif self.kind.startswith("eomt"):  # numbers instead of a tensor, since forward branches on them
            probabilities = [float(p) for p in foreign.attn_mask_probs]
            if any(0 < p < 1 for p in probabilities):
                raise ValueError(
                    f"{self.kind}: attn_mask_probs = {probabilities}, expected 0 or 1 each; this model was saved "
                    "before its training ended and would draw attention masks at random"
                )
            del foreign.attn_mask_probs
            foreign.attn_mask_probs = probabilities
        config = {key: value for key, value in self.config.to_dict().items() if key not in _NOT_SETTINGS}
        self.settings = json.dumps([flip_channels, probabilities, config], sort_keys=True, default=str)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised RGB ``float [B, 3, h, w]`` -> logits or scores ``[B, K, h', w']``.

        Raises:
            ValueError: the model does not take this size; the message says which sizes it takes.
        """
        if self.flip_channels:
            image = image.flip(1)
        if self.kind.startswith("eomt"):
            return self._windows(image)
        if self.gives_masks:
            output = self.model(image, return_dict=True)
            return semantic_scores(output.class_queries_logits, output.masks_queries_logits)
        if self.kind in ("beit", "data2vec-vision", "dpt"):
            return self._patches(image)
        logits: Tensor = self.model(image, return_dict=True).logits
        return logits

    def _patches(self, image: Tensor) -> Tensor:
        """Runs a vision transformer with learnt position embeddings; checks that the size suits its patches."""
        h, w = image.shape[-2:]
        patch, own = int(self.config.patch_size), _pair(self.config.image_size)
        multiple = 2 * patch if self.kind == "dpt" else patch  # it halves its patch grid once and doubles it again
        if (h, w) != own and self.kind == "data2vec-vision":
            raise ValueError(self._wrong_size(h, w))
        if (h, w) != own and (h % multiple or w % multiple):
            near = tuple(max(1, round(side / multiple)) * multiple for side in (h, w))
            raise ValueError(
                f"{self.kind}: input is {h}x{w}, expected multiples of {multiple}; give base.size = {near}"
            )
        try:
            if self.kind == "dpt" and not self.config.is_hybrid:
                logits = self._dpt(image, h // patch, w // patch)
            else:
                logits = self.model(image, return_dict=True).logits
        except (RuntimeError, ValueError) as error:  # from versions that cannot interpolate embeddings to this size
            if (h, w) == own or not _is_about_size(error):
                raise
            raise ValueError(self._wrong_size(h, w)) from error
        if logits.shape[-2] * w != logits.shape[-1] * h:  # the patches were arranged in a wrong shape
            raise ValueError(self._wrong_size(h, w))
        return logits

    def _dpt(self, image: Tensor, rows: int, columns: int) -> Tensor:
        """Runs DPT part by part: its own forward assumes a square grid of patches."""
        model: Any = self.model
        states = model.dpt(image, output_hidden_states=True, return_dict=True).hidden_states[1:]
        chosen = [state for i, state in enumerate(states) if i in self.config.backbone_out_indices]
        logits: Tensor = model.head(model.neck(chosen, rows, columns))
        return logits

    def _windows(self, image: Tensor) -> Tensor:
        """Runs EoMT on square windows: scores ``[B, K, h, w]`` at the size of the image."""
        h, w = image.shape[-2:]
        side = _pair(self.config.image_size)[0]
        if min(h, w) != side:
            raise ValueError(self._wrong_size(h, w))
        axis = 2 if h > w else 3
        starts = window_starts(max(h, w), side)
        total = image.new_zeros(len(image), self.config.num_labels, h, w)
        for start in starts:
            output = self.model(image.narrow(axis, start, side), return_dict=True)
            classes, masks = output.class_queries_logits, output.masks_queries_logits
            total.narrow(axis, start, side).add_(semantic_scores(classes, masks, (side, side)))
        cover = torch.tensor([sum(s <= i < s + side for s in starts) for i in range(max(h, w))])
        return total / cover.to(total).view((-1, 1) if axis == 2 else (1, -1))

    def _wrong_size(self, h: int, w: int) -> str:
        own = _pair(self.config.image_size)
        if self.kind.startswith("eomt"):
            needed = (own[0], round(own[0] * w / h)) if h <= w else (round(own[0] * h / w), own[0])
            return f"{self.kind}: input is {h}x{w}, its shorter side has to be {own[0]}; give base.size = {needed}"
        return f"{self.kind}: input is {h}x{w}, this model takes {own[0]}x{own[1]} only; give base.size = {own}"


def semantic_scores(classes: Tensor, masks: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Class scores of each pixel: the sum over masks of P(class of the mask) times P(pixel is in the mask).

    Args:
        classes: ``float [B, Q, K + 1]``, logits of the classes, the last of them "no object".
        masks: ``float [B, Q, h, w]``, logits.
        size: height and width [px] to enlarge the masks to first (bilinear).

    Returns:
        ``[B, K, h, w]``, or at ``size``: >= 0 and proportional to probabilities (Cheng et al. 2021, MaskFormer, 3.4).
    """
    weights = classes.softmax(-1)[..., :-1]
    if size is None or size == tuple(masks.shape[-2:]):
        return torch.einsum("bqc,bqhw->bchw", weights, masks.sigmoid())
    total = masks.new_zeros(len(masks), weights.shape[-1], *size)
    for i in range(0, masks.shape[1], _MASKS_AT_ONCE):
        chunk = slice(i, i + _MASKS_AT_ONCE)
        large = F.interpolate(masks[:, chunk], size, mode="bilinear", align_corners=False)
        total = total + torch.einsum("bqc,bqhw->bchw", weights[:, chunk], large.sigmoid())
    return total


def window_starts(length: int, side: int) -> list[int]:
    """Start positions [px] of the fewest evenly spread windows of ``side`` pixels that cover ``length`` pixels.

    >>> window_starts(2048, 1024), window_starts(100, 64), window_starts(64, 64)
    ([0, 1024], [0, 36], [0])
    """
    count = math.ceil(length / side)
    return [i * (length - side) // max(1, count - 1) for i in range(count)]


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _is_about_size(error: Exception) -> bool:
    """Whether the error is about sizes that do not fit, rather than about memory, a device or a dtype."""
    message = str(error).lower()
    return bool(re.search(r"\b(size|shape)s?\b", message)) and not re.search("memory|buffer", message)
