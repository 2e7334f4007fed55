"""Mean channels and probabilities of blocks of pixels. Defined by ``engines/reference/context.py``."""

import triton
import triton.language as tl

from sparserefine.engines.triton.kernels.uncertainty import _load_bilinear, _log_of_share

_VARYING = ["logits", "image", "valid", "coords", "n", "number", "level", "height", "width", "classes"]
_VARYING += ["stride_b", "stride_k", "stride_h", "stride_w", "stride_site", "stride_column"]
_VARYING += ["image_b", "image_c", "image_h", "image_w"]


@triton.jit(do_not_specialize=_VARYING)
def block_means(
    logits,
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    classes,
    row_low,
    row_high,
    row_weight,
    column_low,
    column_high,
    column_weight,
    image,
    image_b,
    image_c,
    image_h,
    image_w,
    valid,
    height,
    width,
    coords,
    stride_site,
    stride_column,
    n,
    level,
    number,
    scale,
    shift,
    result,
    SINGLE: tl.constexpr,
    SCORES: tl.constexpr,
    MASKED: tl.constexpr,
    CELLS: tl.constexpr,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """CELLS cells of one level per program, PIXELS pixels of each at once, and all classes.

    With SINGLE, ``logits`` hold only image ``number``; cells of other images are skipped. Of SUMS sums, a power of two
    above CHANNELS, the first are of the image's channels and the next is the number of pixels.
    """
    stride_k = stride_k.to(tl.int64)
    place = tl.arange(0, CELLS * PIXELS)
    first = tl.program_id(0).to(tl.int64) * CELLS
    cell = first + place // PIXELS
    used = cell < n
    batch = tl.load(coords + cell * stride_site, mask=used, other=0).to(tl.int64)
    if SINGLE:
        used = used & (batch == number)
    cell_row = tl.load(coords + cell * stride_site + stride_column, mask=used, other=0)
    cell_column = tl.load(coords + cell * stride_site + 2 * stride_column, mask=used, other=0)
    in_logits = batch * 0 if SINGLE else batch * stride_b
    k = tl.arange(0, CLASSES)[:, None]
    known = k < classes
    offset = tl.minimum(k, classes - 1) * stride_k
    channel = tl.arange(0, SUMS)[:, None]
    factor = tl.load(scale + channel, mask=channel < CHANNELS, other=0.0)
    summand = tl.load(shift + channel, mask=channel < CHANNELS, other=1.0)
    probabilities = tl.zeros([CLASSES, CELLS], tl.float32)
    colours = tl.zeros([SUMS, CELLS], tl.float32)
    for start in range(0, 1 << (2 * level), PIXELS):
        within = start + place % PIXELS
        row = (cell_row << level) + (within >> level)
        column = (cell_column << level) + (within & ((1 << level) - 1))
        counts = used & (row < height) & (column < width)
        if MASKED:
            at = (batch * height + row) * width + column
            counts = counts & (tl.load(valid + at, mask=counts, other=0) != 0)
        row = tl.where(counts, row, 0)
        column = tl.where(counts, column, 0)
        top = logits + in_logits + tl.load(row_low + row).to(tl.int64) * stride_h
        bottom = logits + in_logits + tl.load(row_high + row).to(tl.int64) * stride_h
        left = tl.load(column_low + column).to(tl.int64) * stride_w
        right = tl.load(column_high + column).to(tl.int64) * stride_w
        across = tl.load(column_weight + column)[None, :]
        down = tl.load(row_weight + row)[None, :]
        values = _load_bilinear(
            top[None, :] + offset, bottom[None, :] + offset, left[None, :], right[None, :], across, down
        )
        if SCORES:
            scores = tl.sum(tl.where(known, values, 0.0), axis=0)[None, :]
            values, _ = _log_of_share(values, scores, classes)
        else:
            values = tl.where(known, values, float("-inf"))
            values = tl.exp(values - tl.max(values, axis=0)[None, :])
        values = tl.where(known, values, 0.0)
        values = values / tl.sum(values, axis=0)[None, :]
        values = tl.where(counts[None, :], values, 0.0)
        probabilities += tl.sum(tl.reshape(values, [CLASSES, CELLS, PIXELS]), axis=2)
        pixel = image + (batch * image_b + row.to(tl.int64) * image_h + column.to(tl.int64) * image_w)[None, :]
        seen = counts[None, :] & (channel < CHANNELS)
        colour = tl.load(pixel + channel.to(tl.int64) * image_c, mask=seen, other=0).to(tl.float32)
        colour = tl.where(counts[None, :], colour * factor + summand, 0.0)
        colours += tl.sum(tl.reshape(colour, [SUMS, CELLS, PIXELS]), axis=2)
    number_of_pixels = tl.sum(tl.where(channel == CHANNELS, colours, 0.0), axis=0)[None, :]
    share = 1 / tl.maximum(number_of_pixels, 1.0)
    cell = first + tl.arange(0, CELLS)
    used = cell < n
    if SINGLE:
        used = used & (tl.load(coords + cell * stride_site, mask=used, other=-1) == number)
    out = result + (cell * (CHANNELS + classes))[None, :]
    tl.store(out + channel, colours * share, mask=used[None, :] & (channel < CHANNELS))
    tl.store(out + CHANNELS + k, probabilities * share, mask=used[None, :] & known)
