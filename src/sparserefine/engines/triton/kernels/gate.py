"""The gated ensembler; :class:`sparserefine.stages.ensembler.GatedEnsembler` defines the results."""

import triton
import triton.language as tl


@triton.jit
def _spread(logits, inside, K: tl.constexpr, CLASSES: tl.constexpr):
    """Largest logit, sum of exp(logit - largest), and entropy of each row. ``logits`` are pointers ``[rows, 1]``."""
    k = tl.arange(0, CLASSES)[None, :]
    largest = tl.load(logits, mask=inside, other=0.0)
    for start in range(0, K, CLASSES):
        values = tl.load(logits + (start + k), mask=inside & (start + k < K), other=float("-inf"))
        largest = tl.maximum(largest, tl.max(values, axis=1)[:, None])
    total = tl.zeros_like(largest)
    weighted = tl.zeros_like(largest)
    for start in range(0, K, CLASSES):
        used = inside & (start + k < K)
        shifted = tl.where(used, tl.load(logits + (start + k), mask=used, other=0.0) - largest, 0.0)
        exponential = tl.where(used, tl.exp(shifted), 0.0)
        total += tl.sum(exponential, axis=1)[:, None]
        weighted += tl.sum(shifted * exponential, axis=1)[:, None]
    total = tl.where(inside, total, 1.0)
    return largest, total, tl.log(total) - weighted / total


@triton.jit
def _positive(values):
    return tl.where(values < 0, 0.0, values)  # tl.maximum would turn NaN into 0


@triton.jit
def _blend(coarse, sparse, gate, mask):
    return gate * tl.load(coarse, mask=mask, other=0.0) + (1 - gate) * tl.load(sparse, mask=mask, other=0.0)


@triton.jit
def _share(logits, largest, total, mask):
    """Softmax of each row, for the classes that ``logits`` points to."""
    return tl.exp(tl.load(logits, mask=mask, other=float("-inf")) - largest) / total


@triton.jit
def _gate(
    coarse,
    sparse,
    inside,
    weight1,
    bias1,
    weight2,
    bias2,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    CLASSES: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight of the coarse logits per row. Splits the first matrix by columns, so inputs need no concatenation."""
    k = tl.arange(0, CLASSES)
    largest1, total1, entropy1 = _spread(coarse, inside, K, CLASSES)
    largest2, total2, entropy2 = _spread(sparse, inside, K, CLASSES)
    score = tl.load(bias2) + tl.zeros_like(entropy1)
    for first in range(0, HIDDEN, UNITS):
        unit = first + tl.arange(0, UNITS)[None, :]
        there = unit < HIDDEN
        column = unit * (2 * K + 2)
        values = tl.load(bias1 + unit, mask=there, other=0.0)
        values += entropy1 * tl.load(weight1 + (column + 2 * K), mask=there, other=0.0)
        values += entropy2 * tl.load(weight1 + (column + 2 * K + 1), mask=there, other=0.0)
        for start in range(0, K, CLASSES):
            at, row = start + k[None, :], start + k[:, None]
            read, used = inside & (at < K), there & (row < K)
            weight = tl.load(weight1 + (column + row), mask=used, other=0.0)
            values = tl.dot(_share(coarse + at, largest1, total1, read), weight, values, input_precision=PRECISION)
            weight = tl.load(weight1 + (column + K + row), mask=used, other=0.0)
            values = tl.dot(_share(sparse + at, largest2, total2, read), weight, values, input_precision=PRECISION)
        values = _positive(values) * tl.load(weight2 + unit, mask=there, other=0.0)
        score += tl.sum(values, axis=1)[:, None]
    return 1 / (1 + tl.exp(-score))


@triton.jit(do_not_specialize=["n"])
def gated(
    coarse,
    sparse,
    n,
    gate_weight1,
    gate_bias1,
    gate_weight2,
    gate_bias2,
    fuser_weight1,
    fuser_bias1,
    fuser_weight2,
    fuser_bias2,
    refined,
    K: tl.constexpr,
    GATE_HIDDEN: tl.constexpr,
    FUSER_HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SITES: tl.constexpr,
    CLASSES: tl.constexpr,
    UNITS: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Refines SITES sites. Products run over CLASSES classes or UNITS hidden units at once; OUT holds all classes.

    Numbers of classes and hidden units are constexpr; otherwise the weights' addresses would fill the registers.
    """
    first = tl.program_id(0).to(tl.int64) * SITES
    site = tl.arange(0, SITES)[:, None]
    inside = site < n - first
    coarse = coarse + first * K + site * K
    sparse = sparse + first * K + site * K
    gate = _gate(
        coarse,
        sparse,
        inside,
        gate_weight1,
        gate_bias1,
        gate_weight2,
        gate_bias2,
        K,
        GATE_HIDDEN,
        CLASSES,
        UNITS,
        PRECISION,
    )
    k = tl.arange(0, CLASSES)
    out = tl.arange(0, OUT)[None, :]
    values = tl.zeros([SITES, OUT], tl.float32) + tl.load(fuser_bias2 + out, mask=out < K, other=0.0)
    for first_unit in range(0, FUSER_HIDDEN, UNITS):
        unit = first_unit + tl.arange(0, UNITS)[None, :]
        there = unit < FUSER_HIDDEN
        hidden = tl.zeros([SITES, UNITS], tl.float32) + tl.load(fuser_bias1 + unit, mask=there, other=0.0)
        for start in range(0, K, CLASSES):
            at, row = start + k[None, :], start + k[:, None]
            blend = _blend(coarse + at, sparse + at, gate, inside & (at < K))
            weight = tl.load(fuser_weight1 + (unit * K + row), mask=there & (row < K), other=0.0)
            hidden = tl.dot(blend, weight, hidden, input_precision=PRECISION)
        row = first_unit + tl.arange(0, UNITS)[:, None]
        weight = tl.load(fuser_weight2 + (out * FUSER_HIDDEN + row), mask=(row < FUSER_HIDDEN) & (out < K), other=0.0)
        values = tl.dot(_positive(hidden), weight, values, input_precision=PRECISION)
    used = inside & (out < K)
    if RESIDUAL:
        values += _blend(coarse + out, sparse + out, gate, used)
    tl.store(refined + first * K + (site * K + out), values, mask=used)
