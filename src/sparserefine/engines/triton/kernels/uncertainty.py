"""Labels and entropy of upsampled coarse logits, and values at the sites. Defined by ``images/uncertainty.py``."""

import triton
import triton.language as tl

# Arguments that vary between images or models. Kernels are not specialised, and so not recompiled, for their values.
_VARYING = ["logits", "image", "labels", "entropies", "coords", "count", "n", "height", "width", "classes", "channels"]
_VARYING += ["stride_b", "stride_c", "stride_k", "stride_h", "stride_w", "stride_site", "stride_column"]


@triton.jit
def _lerp(start, end, weight):
    """``torch.lerp`` with the same rounding (a fused multiply-add), so that near ties give the same labels."""
    near = weight < 0.5
    return tl.where(near, weight, weight - 1) * (end - start) + tl.where(near, start, end)


@triton.jit
def _bilinear(top_left, top_right, bottom_left, bottom_right, across, down):
    """Interpolates along columns, then along rows. Arguments are broadcast to the shape of the result."""
    upper = _lerp(top_left.to(tl.float32), top_right.to(tl.float32), across)
    lower = _lerp(bottom_left.to(tl.float32), bottom_right.to(tl.float32), across)
    return _lerp(upper, lower, down)


@triton.jit
def _load_bilinear(top, bottom, left, right, across, down):
    """One class, upsampled. ``top`` and ``bottom`` are pointers to rows, ``left`` and ``right`` offsets of columns."""
    return _bilinear(
        tl.load(top + left), tl.load(top + right), tl.load(bottom + left), tl.load(bottom + right), across, down
    )


@triton.jit
def _load_margin(row, column, stride_k):
    return tl.load(row + stride_k + column).to(tl.float32) - tl.load(row + column).to(tl.float32)


@triton.jit
def _of_margin(top, bottom, left, right, across, down, stride_k):
    """Two classes: log(1 + e) + m e / (1 + e), where m is the distance between the two logits and e = exp(-m)."""
    margin = _bilinear(
        _load_margin(top, left, stride_k),
        _load_margin(top, right, stride_k),
        _load_margin(bottom, left, stride_k),
        _load_margin(bottom, right, stride_k),
        across,
        down,
    )
    certainty = tl.abs(margin)
    odds = tl.exp(-certainty)
    total = 1 + odds
    # log(1 + odds) from the rounded total, corrected for the rounding of the odds; exact for tiny odds.
    kept = total - 1
    log_total = tl.where(kept == 0, odds, tl.log(total) * (odds / tl.where(kept == 0, 1.0, kept)))
    return (margin > 0).to(tl.int32), log_total + certainty * (odds / total)


@triton.jit
def _of_logits(top, bottom, left, right, across, down, stride_k, classes):
    """One pass, two classes at a time: three exponentials for two classes; one class at a time would need four."""
    largest = _load_bilinear(top, bottom, left, right, across, down)
    label = tl.zeros_like(largest).to(tl.int32)
    total = tl.zeros_like(largest) + 1
    weighted = largest - largest  # sum of z exp(z), z the shifted logits; starts as NaN if the logit is not finite
    for k in range(1, classes, 2):
        last = tl.minimum(k + 1, classes - 1)
        first, second = k * stride_k, last * stride_k
        a = _load_bilinear(top + first, bottom + first, left, right, across, down)
        b = _load_bilinear(top + second, bottom + second, left, right, across, down)
        label = tl.where(a > largest, k, label)
        so_far = tl.maximum(largest, a)
        label = tl.where(b > so_far, last, label)
        so_far = tl.maximum(so_far, b)
        shift = largest - so_far
        largest = so_far
        kept = tl.exp(shift)
        a, b = a - largest, b - largest
        exp_a = tl.exp(a)
        exp_b = tl.where(k + 1 < classes, tl.exp(b), 0.0)  # an unpaired last class is read twice
        weighted = kept * (weighted + total * shift) + a * exp_a + b * exp_b
        total = kept * total + exp_a + exp_b
    # Never negative: the total is at least 1, and no term of the other sum is positive.
    return label, tl.log(total) - weighted / total


@triton.jit
def _log_of_share(score, sum_of_scores, classes):
    """The share of a score, at least 1e-10, and its logarithm. All shares are equal if the sum is not positive."""
    share = tl.where(sum_of_scores > 0, score / sum_of_scores, 1.0 / classes)
    share = tl.where(share < 1e-10, 1e-10, share)  # tl.maximum would hide NaN
    return share, tl.log(share)


@triton.jit
def _of_scores(top, bottom, left, right, across, down, stride_k, classes):
    """Two passes: the sum of the scores, then the entropy of their shares."""
    largest = _load_bilinear(top, bottom, left, right, across, down)
    scores = largest
    label = tl.zeros_like(largest).to(tl.int32)
    for k in range(1, classes):
        offset = k * stride_k
        score = _load_bilinear(top + offset, bottom + offset, left, right, across, down)
        label = tl.where(score > largest, k, label)
        largest = tl.maximum(largest, score)
        scores += score
    total = tl.zeros_like(largest)
    weighted = tl.zeros_like(largest)
    for k in range(0, classes):
        offset = k * stride_k
        score = _load_bilinear(top + offset, bottom + offset, left, right, across, down)
        share, log_share = _log_of_share(score, scores, classes)
        total += share
        weighted += share * log_share
    entropy = tl.log(total) - weighted / total
    return tl.where(scores > 0, label, 0), tl.where(entropy < 0, 0.0, entropy)


@triton.jit(do_not_specialize=_VARYING)
def uncertainty(
    logits,
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    classes,
    row_blocks,
    row_low,
    row_high,
    row_weight,
    column_low,
    column_high,
    column_weight,
    labels,
    entropies,
    height,
    width,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per block of rows between the same two coarse rows, COLUMNS columns and image."""
    stride_k = stride_k.to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    first = tl.load(row_blocks + 2 * tl.program_id(0))
    end = tl.load(row_blocks + 2 * tl.program_id(0) + 1)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    # All rows of the block share the interpolation along columns.
    top = logits + image * stride_b + tl.load(row_low + first).to(tl.int64) * stride_h
    bottom = logits + image * stride_b + tl.load(row_high + first).to(tl.int64) * stride_h
    left = tl.load(column_low + column, mask=inside, other=0).to(tl.int64) * stride_w
    right = tl.load(column_high + column, mask=inside, other=0).to(tl.int64) * stride_w
    across = tl.load(column_weight + column, mask=inside, other=0.0)
    down = tl.load(row_weight + row, mask=row < end, other=0.0)
    if OUTPUTS == "margin":
        label, entropy = _of_margin(top, bottom, left, right, across, down, stride_k)
    elif OUTPUTS == "scores":
        label, entropy = _of_scores(top, bottom, left, right, across, down, stride_k, classes)
    else:
        label, entropy = _of_logits(top, bottom, left, right, across, down, stride_k, classes)
    place = (image * height + row) * width + column
    inside = inside & (row < end)
    tl.store(labels + place, label, mask=inside)
    tl.store(entropies + place, entropy, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def sample(
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
    coords,
    stride_site,
    stride_column,
    n,
    image,
    result,
    SINGLE: tl.constexpr,
    SCORES: tl.constexpr,
    SITES: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """All classes of SITES sites. With SINGLE, ``logits`` hold only ``image``; sites of other images are skipped."""
    stride_k = stride_k.to(tl.int64)
    site = tl.program_id(0).to(tl.int64) * SITES + tl.arange(0, SITES)[None, :]
    batch = tl.load(coords + site * stride_site, mask=site < n, other=0)
    inside = site < n
    if SINGLE:
        inside = inside & (batch == image)
        batch = tl.zeros_like(batch)
    row = tl.load(coords + site * stride_site + stride_column, mask=inside, other=0)
    column = tl.load(coords + site * stride_site + 2 * stride_column, mask=inside, other=0)
    top = logits + batch.to(tl.int64) * stride_b + tl.load(row_low + row).to(tl.int64) * stride_h
    bottom = logits + batch.to(tl.int64) * stride_b + tl.load(row_high + row).to(tl.int64) * stride_h
    left = tl.load(column_low + column).to(tl.int64) * stride_w
    right = tl.load(column_high + column).to(tl.int64) * stride_w
    across = tl.load(column_weight + column)
    down = tl.load(row_weight + row)
    # Neighbouring threads take neighbouring sites, because those read neighbouring coarse cells.
    k = tl.arange(0, CLASSES)[:, None]
    scores = tl.zeros([1, SITES], tl.float32)
    if SCORES:
        for start in range(0, classes, CLASSES):
            offset = tl.minimum(start + k, classes - 1) * stride_k
            values = _load_bilinear(top + offset, bottom + offset, left, right, across, down)
            scores += tl.sum(tl.where(start + k < classes, values, 0.0), axis=0)[None, :]
    for start in range(0, classes, CLASSES):
        offset = tl.minimum(start + k, classes - 1) * stride_k
        values = _load_bilinear(top + offset, bottom + offset, left, right, across, down)
        if SCORES:
            _, values = _log_of_share(values, scores, classes)
        tl.store(result + site * classes + start + k, values, mask=inside & (start + k < classes))


@triton.jit(do_not_specialize=_VARYING)
def pixels(
    image,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    channels,
    coords,
    stride_site,
    stride_column,
    n,
    scale,
    shift,
    result,
    SITES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """CHANNELS channels of SITES sites per program, times ``scale`` plus ``shift``."""
    site = tl.program_id(0).to(tl.int64) * SITES + tl.arange(0, SITES)[None, :]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    inside = (site < n) & (channel < channels)
    place = coords + site * stride_site
    batch = tl.load(place, mask=site < n, other=0).to(tl.int64)
    row = tl.load(place + stride_column, mask=site < n, other=0).to(tl.int64)
    column = tl.load(place + 2 * stride_column, mask=site < n, other=0).to(tl.int64)
    offset = batch * stride_b + row * stride_h + column * stride_w + channel.to(tl.int64) * stride_c
    values = tl.load(image + offset, mask=inside, other=0).to(tl.float32)
    values *= tl.load(scale + channel, mask=channel < channels, other=0.0)
    values += tl.load(shift + channel, mask=channel < channels, other=0.0)
    tl.store(result + site * channels + channel, values, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def write_labels(
    logits,
    classes,
    coords,
    stride_site,
    stride_column,
    n,
    count,
    labels,
    stride_b,
    stride_h,
    stride_w,
    COUNTED: tl.constexpr,
    SITES: tl.constexpr,
):
    """Writes the first class of the largest logit at SITES sites; if COUNTED, only at the first ``count[0]``."""
    site = tl.program_id(0).to(tl.int64) * SITES + tl.arange(0, SITES)
    inside = site < n
    if COUNTED:
        inside = inside & (site < tl.load(count))
    logits += site * classes
    largest = tl.load(logits, mask=inside, other=0.0).to(tl.float32)
    label = tl.zeros([SITES], tl.int32)
    for k in range(1, classes):
        value = tl.load(logits + k, mask=inside, other=0.0).to(tl.float32)
        label = tl.where(value > largest, k, label)
        largest = tl.maximum(largest, value)
    place = coords + site * stride_site
    batch = tl.load(place, mask=inside, other=0).to(tl.int64)
    row = tl.load(place + stride_column, mask=inside, other=0).to(tl.int64)
    column = tl.load(place + 2 * stride_column, mask=inside, other=0).to(tl.int64)
    tl.store(labels + batch * stride_b + row * stride_h + column * stride_w, label, mask=inside)
