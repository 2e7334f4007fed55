"""Weights that two environments make alike without exchanging them: from the name and shape of each tensor.

Needs numpy only. The random bits come from a bit generator, whose stream numpy promises to keep, not from its
distributions, which may change.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def uniform(name: str, shape: Sequence[int], low: float, high: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``float32 [*shape]`` in ``low <= x < high``; the same for the same name, on every machine."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    fractions = (bits >> 40).astype(np.float32) / np.float32(2**24)  # 24 bits: exact in float32
    return (fractions * np.float32(high - low) + np.float32(low)).reshape(shape)


def tensor(name: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """The tensor of that name in a state dict of mmsegmentation.

    The ranges keep the signal of the same size through all layers of the networks here, so that every layer shows in
    the logits: ``reference.py`` checks that.
    """
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "bases":  # of the matrix decomposition: positive, columns of length 1
        columns = uniform(name, shape, 0.0, 1.0).astype(np.float64)
        return (columns / np.sqrt((columns**2).sum(axis=1, keepdims=True))).astype(np.float32)
    if kind == "running_var":
        return uniform(name, shape, 0.6, 1.4)
    if kind in ("bias", "running_mean"):
        return uniform(name, shape, -0.2, 0.2)
    if kind.startswith("layer_scale"):
        return uniform(name, shape, 0.05, 0.15)
    if len(shape) == 1:  # the weight of a normalisation
        return uniform(name, shape, 0.3, 0.6)
    limit = math.sqrt(6 / math.prod(shape[1:]))  # He et al. 2015: variance 2 / fan-in
    return uniform(name, shape, -limit, limit)
