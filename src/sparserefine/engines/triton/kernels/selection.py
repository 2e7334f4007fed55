"""Applies the budget by a radix select over the bits of the values, 8 bits per pass. Ties are kept in row-major order.

The rank of a value is an unsigned integer. The largest values have the smallest ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

BINS = tl.constexpr(256)
PASSES = tl.constexpr(4)  # 4 digits of 8 bits make a whole rank


@triton.jit
def _ranks(values, at, candidate):
    """``uint32`` ranks, in descending order of the values. Both zeros are equal, NaN ranks as minus infinity."""
    bits = tl.load(values + at, mask=candidate, other=0.0).to(tl.int32, bitcast=True)
    # Compares bits, because a comparison of floats may treat denormal numbers as zero.
    size = bits & 0x7FFFFFFF
    rank = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF)
    rank = tl.where(size == 0, 0x7FFFFFFF, rank)
    rank = tl.where(size > 0x7F800000, -0x800000, rank)
    return rank.to(tl.uint32, bitcast=True)


@triton.jit
def _cut(counts, budget, passes):
    """The cut: the rank of the last candidate that stays. Its first ``passes`` digits are known, zeros follow.

    Also returns how many candidates with these digits stay, and whether there are at least as many candidates as the
    budget. If there are fewer, all of them stay, and the other two results agree with that.
    """
    bins = tl.arange(0, BINS)
    cut, left, enough = tl.full([], 0, tl.uint32), budget.to(tl.int32), tl.full([], 1, tl.int32)
    for i in range(passes):
        found = tl.load(counts + i * BINS + bins)
        upto = tl.cumsum(found, 0)
        digit = tl.minimum(tl.sum((upto < left).to(tl.int32), 0), BINS - 1)
        enough = (tl.sum(found, 0) >= left).to(tl.int32)
        left -= tl.sum(tl.where(bins < digit, found, 0), 0)
        cut |= digit.to(tl.uint32) << (24 - 8 * i)
    return cut, left, enough


@triton.jit
def _blocks(size, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Number of blocks of this program: CHUNKS, or fewer at the end of an image."""
    return tl.minimum(tl.cdiv(size, BLOCK) - tl.program_id(0) * CHUNKS, CHUNKS)


@triton.jit(do_not_specialize=["budget", "passes"])
def count_digits(values, mask, counts, size, budget, passes, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Counts the values of the next digit, among the candidates that agree with the known digits of the cut.

    Args:
        values: ``float32 [B, size]``.
        mask: ``uint8 [B, size]``, the candidates.
        counts: ``int32 [B, PASSES, BINS]``, zeros at first. Reads the counts before ``passes``, writes that one.
        size: pixels per image.
        budget: how many candidates stay per image.
        passes: digits known so far.
        BLOCK: pixels processed at once.
        CHUNKS: blocks per program. Grid axis 0: parts of an image; axis 1: images.
    """
    image = tl.program_id(1).to(tl.int64)
    values += image * size
    mask += image * size
    counts += image * PASSES * BINS
    cut, _, enough = _cut(counts, budget, passes)
    shift = (24 - 8 * passes).to(tl.uint32)
    bins = tl.arange(0, BINS)
    found = tl.zeros([BINS], tl.int32)
    left_out = tl.full([], 0, tl.int32)
    for chunk in range(_blocks(size, BLOCK, CHUNKS) * enough):
        at = (tl.program_id(0) * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
        candidate = tl.load(mask + at, mask=at < size, other=0) != 0
        # The earlier digits agree if their XOR is zero, so that the rest is a single digit.
        digit = (_ranks(values, at, candidate) ^ cut) >> shift
        counted = candidate & (digit < BINS)
        found += tl.histogram(tl.where(counted, digit, 0).to(tl.int32), BINS)
        left_out += tl.sum(1 - counted.to(tl.int32), 0)
    found -= tl.where(bins == 0, left_out, 0)
    tl.atomic_add(counts + passes * BINS + bins, found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["budget"])
def count_ties(values, mask, counts, ties, size, budget, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Counts the candidates equal to the cut, in ``ties int32 [B, parts]``. See :func:`count_digits`."""
    image = tl.program_id(1).to(tl.int64)
    values += image * size
    mask += image * size
    cut, _, enough = _cut(counts + image * PASSES * BINS, budget, PASSES)
    found = tl.full([], 0, tl.int32)
    for chunk in range(_blocks(size, BLOCK, CHUNKS) * enough):
        at = (tl.program_id(0) * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
        candidate = tl.load(mask + at, mask=at < size, other=0) != 0
        tie = candidate & (_ranks(values, at, candidate) == cut)
        found += tl.sum(tie.to(tl.int32), 0)
    tl.store(ties + image * tl.num_programs(0) + tl.program_id(0), found)


@triton.jit(do_not_specialize=["budget"])
def clear_rest(values, mask, counts, ties, size, budget, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Clears the candidates that do not stay. The grid must be that of :func:`count_ties`."""
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    values += image * size
    mask += image * size
    ties += image * tl.num_programs(0)
    cut, left, enough = _cut(counts + image * PASSES * BINS, budget, PASSES)
    for start in range(0, part * enough, BLOCK):
        before = start + tl.arange(0, BLOCK)
        left -= tl.sum(tl.load(ties + before, mask=before < part, other=0), 0)
    for chunk in range(_blocks(size, BLOCK, CHUNKS) * enough):
        at = (part * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
        candidate = tl.load(mask + at, mask=at < size, other=0) != 0
        rank = _ranks(values, at, candidate)
        tie = (candidate & (rank == cut)).to(tl.int32)
        stays = (rank < cut) | ((tie != 0) & (tl.cumsum(tie, 0) <= left))
        left -= tl.sum(tie, 0)
        tl.store(mask + at, tl.zeros([BLOCK], tl.uint8), mask=candidate & (stays == 0))
