"""The exponential mean of the weights, which often scores higher than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparserefine.refiner import SparseRefiner


class WeightMean:
    """The mean of a refiner's weights and statistics over the steps so far, newer steps counting more.

    After step t, the mean moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)): at first it follows them.

    Args:
        refiner: the refiner that is trained.
        decay: share of the mean that stays at each step; 0: there is no mean, and nothing happens.
    """

    def __init__(self, refiner: SparseRefiner, decay: float) -> None:
        self._refiner, self._decay = refiner, decay
        self._steps = 0
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of a step in."""
        if not self._decay:
            return
        self._steps += 1
        now = self._refiner.trained_state()
        if not self._values:
            self._values = {name: value.detach().clone() for name, value in now.items()}
            return
        moved = 1 - min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, value in now.items():
            mean = self._values[name]
            if mean.device != value.device:  # from a checkpoint
                mean = self._values[name] = mean.to(value.device)
            if mean.is_floating_point():
                mean.lerp_(value, moved)
            else:  # a counter
                mean.copy_(value)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The refiner has the mean's weights inside, and its own again afterwards."""
        if not self._values:
            yield
            return
        own = {name: value.detach().clone() for name, value in self._refiner.trained_state().items()}
        self.use()
        try:
            yield
        finally:
            self._set(own)

    def use(self) -> None:
        """Gives the refiner the mean's weights, if there is a mean."""
        self._set(self._values)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        if values:
            for name, value in self._refiner.trained_state().items():
                value.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"steps": self._steps, "values": self._values}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from :meth:`state`; ``None`` and an empty one: at the start.

        Raises:
            ValueError: it is of another refiner.
        """
        self._steps, values = (state["steps"], state["values"]) if state else (0, {})
        shapes, own = ({k: v.shape for k, v in of.items()} for of in (values, self._refiner.trained_state()))
        if values and shapes != own:
            raise ValueError("the mean of the weights is of another refiner")
        self._values = dict(values)
