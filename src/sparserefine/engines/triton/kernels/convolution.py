"""The primitive as an implicit matrix product, and the gradient of the weight."""

import triton
import triton.language as tl

RESIDUAL = tl.constexpr(1)
BIAS = tl.constexpr(2)
RAW = tl.constexpr(4)
FIRST = tl.constexpr(8)
SECOND = tl.constexpr(16)


@triton.jit
def _relu(v):
    return tl.where(v < 0, 0.0, v)  # tl.maximum would turn NaN into 0


@triton.jit
def _store(
    total,
    rows,
    inside,
    columns,
    c_out,
    parts,
    residual,
    bias,
    raw,
    first,
    first_scale,
    first_shift,
    second,
    second_scale,
    second_shift,
    residual_row,
    raw_row,
    first_row,
    second_row,
):
    """The epilogue: stores the sums ``total [ROWS, COLUMNS]``. Arguments are those of :func:`convolve`."""
    known = columns < c_out
    inside = inside[:, None] & known[None, :]
    place = rows.to(tl.int64)[:, None]
    if parts & RESIDUAL:
        total += tl.load(residual + place * residual_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if parts & BIAS:
        total += tl.load(bias + columns, mask=known, other=0.0)[None, :]
    if parts & RAW:
        tl.store(raw + place * raw_row + columns[None, :], total.to(raw.dtype.element_ty), mask=inside)
    if parts & FIRST:
        scale = tl.load(first_scale + columns, mask=known, other=0.0)[None, :]
        shift = tl.load(first_shift + columns, mask=known, other=0.0)[None, :]
        active = _relu(total * scale + shift).to(first.dtype.element_ty)
        tl.store(first + place * first_row + columns[None, :], active, mask=inside)
    if parts & SECOND:
        scale = tl.load(second_scale + columns, mask=known, other=0.0)[None, :]
        shift = tl.load(second_shift + columns, mask=known, other=0.0)[None, :]
        active = _relu(total * scale + shift).to(second.dtype.element_ty)
        tl.store(second + place * second_row + columns[None, :], active, mask=inside)


@triton.jit(do_not_specialize=["n_out", "n_in", "taps", "parts", "raw_share"])
def convolve(
    x,
    weight,
    table,
    order,
    parities,
    count,
    residual,
    bias,
    raw,
    first,
    first_scale,
    first_shift,
    second,
    second_scale,
    second_shift,
    n_out,
    n_in,
    c_in,
    c_out,
    taps,
    parts,
    x_row,
    w_tap,
    w_in,
    w_out,
    t_row,
    t_tap,
    residual_row,
    raw_row,
    first_row,
    second_row,
    raw_share,
    READ: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes ``v[n] = sum_t x[table[n, t]] @ weight[t]`` and applies the epilogue to v while it is in registers.

    Grid axis 0: blocks of rows times blocks of columns. Blocks of the same rows are adjacent, because they read the
    same inputs. With SHARED, grid axis 1 divides the taps and channels of each sum: program s stores its partial sum at
    ``raw + s * raw_share``, and :func:`finish` adds them up. Accumulates in float32.

    Args:
        x: ``[n_in, c_in]``, rows ``x_row`` apart.
        weight: ``[taps, c_in, c_out]`` of any strides.
        table: ``int32 [n_out, taps]`` of any strides; entries of ``n_in`` or more read as a zero row.
        order: ``int32 [n_out]``, for READ = 2 or 3: the outputs, grouped by parity.
        parities: ``int32 [4]``: size of each group.
        count: ``int32 [1]``, if PADDED: number of outputs in use.
        residual: added to v.
        bias: ``[c_out]``, added to v.
        raw: receives v.
        first: receives ``relu(v * first_scale + first_shift)``.
        second: the same with its own scale and shift.
        parts: bit mask of the optional operands in use. Not constexpr, which would compile a kernel per combination.
        raw_share: see above.
        READ: which input rows are read. 0: row n reads row n. 1: through the table. 2: transposed 2x2 convolution,
            outputs by parity; each uses one tap of four. 3: transposed 3x3 convolution, outputs by parity; each uses 4,
            2, 2 or 1 taps of nine. 4: through the table, with all taps and channels in one block, for inputs of very
            few channels.
    """
    column_blocks = tl.cdiv(c_out, COLUMNS)
    block = tl.program_id(0) // column_blocks
    columns = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    end = n_out
    if PADDED:
        end = tl.minimum(end, tl.load(count))
    start = block * ROWS
    steps = taps
    row_parity = 0
    column_parity = 0
    across = 1
    if (READ == 2) | (READ == 3):
        # Find the parity of this block. The outputs of each parity start in a new block.
        begin = 0
        blocks = 0
        parity = 4
        for p in tl.static_range(4):
            inside = tl.load(parities + p)
            more = tl.cdiv(inside, ROWS)
            here = (block >= blocks) & (block < blocks + more)
            parity = tl.where(here, p, parity)
            start = tl.where(here, begin + (block - blocks) * ROWS, start)
            end = tl.where(here, begin + inside, end)
            begin += inside
            blocks += more
        if parity == 4:
            return
        row_parity = parity // 2
        column_parity = parity % 2
        across = 2 - column_parity if READ == 3 else 1
        steps = (2 - row_parity) * across if READ == 3 else 1
    if start >= end:
        return
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    if (READ == 2) | (READ == 3):
        rows = tl.load(order + rows, mask=inside, other=0)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if READ == 4:
        both = tl.arange(0, DEPTH)
        tap = both // c_in
        channel = both % c_in
        known = tap < taps
        there = inside[:, None] & known[None, :]
        place = rows[:, None].to(tl.int64) * t_row + tap[None, :].to(tl.int64) * t_tap
        source = tl.load(table + place, mask=there, other=0)
        there = there & (source < n_in)
        a = tl.load(x + source.to(tl.int64) * x_row + channel[None, :], mask=there, other=0.0)
        b = tl.load(
            weight + (tap * w_tap + channel * w_in)[:, None] + columns[None, :] * w_out,
            mask=known[:, None] & (columns < c_out)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        # One loop over taps and channels instead of two nested ones, so that loads run ahead across all of it.
        channel_blocks = tl.cdiv(c_in, DEPTH)
        share = tl.cdiv(steps * channel_blocks, tl.num_programs(1))
        begin_step = share * tl.program_id(1)
        for i in range(begin_step, tl.minimum(begin_step + share, steps * channel_blocks)):
            step = i // channel_blocks
            channel = (i - step * channel_blocks) * DEPTH + tl.arange(0, DEPTH)
            tap = step
            if READ == 2:
                tap = 2 * row_parity + column_parity
            if READ == 3:
                down = step // across
                tap = 3 * (2 * down + row_parity) + 2 * (step - down * across) + column_parity
            source = rows
            if READ != 0:
                # Masked rows read row 0 and are never stored. With `other=n_in`, Triton before 3.3 does not compile.
                source = tl.load(table + rows.to(tl.int64) * t_row + tap.to(tl.int64) * t_tap, mask=inside, other=0)
            a = tl.load(
                x + source.to(tl.int64)[:, None] * x_row + channel[None, :],
                mask=(inside & (source < n_in))[:, None] & (channel < c_in)[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + tap.to(tl.int64) * w_tap + channel[:, None] * w_in + columns[None, :] * w_out,
                mask=(channel < c_in)[:, None] & (columns < c_out)[None, :],
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)

    if SHARED:  # no epilogue is compiled then: with it, the largest blocks would run out of registers
        place = raw + tl.program_id(1).to(tl.int64) * raw_share + rows.to(tl.int64)[:, None] * raw_row
        tl.store(place + columns[None, :], total, mask=inside[:, None] & (columns < c_out)[None, :])
    else:
        _store(
            total,
            rows,
            inside,
            columns,
            c_out,
            parts,
            residual,
            bias,
            raw,
            first,
            first_scale,
            first_shift,
            second,
            second_scale,
            second_shift,
            residual_row,
            raw_row,
            first_row,
            second_row,
        )


@triton.jit(do_not_specialize=["n_out", "shares", "parts", "share_stride"])
def finish(
    partial,
    count,
    residual,
    bias,
    raw,
    first,
    first_scale,
    first_shift,
    second,
    second_scale,
    second_shift,
    n_out,
    c_out,
    shares,
    parts,
    share_stride,
    residual_row,
    raw_row,
    first_row,
    second_row,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds up the partial sums of :func:`convolve` with SHARED, in order, and applies the epilogue.

    Grid: blocks of rows, blocks of columns.

    Args:
        partial: ``float32 [shares, n_out, c_out]``, rows contiguous, shares ``share_stride`` apart.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = n_out
    if PADDED:
        end = tl.minimum(end, tl.load(count))
    inside = rows < end
    source = partial + rows.to(tl.int64)[:, None] * c_out + columns[None, :]
    there = inside[:, None] & (columns < c_out)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, shares):
        total += tl.load(source, mask=there, other=0.0)
        source += share_stride
    _store(
        total,
        rows,
        inside,
        columns,
        c_out,
        parts,
        residual,
        bias,
        raw,
        first,
        first_scale,
        first_shift,
        second,
        second_scale,
        second_shift,
        residual_row,
        raw_row,
        first_row,
        second_row,
    )


@triton.jit(do_not_specialize=["n_out", "n_in", "taps", "chunk"])
def weight_gradient(
    x,
    grad,
    table,
    partial,
    n_out,
    n_in,
    c_in,
    c_out,
    taps,
    chunk,
    x_row,
    grad_row,
    t_row,
    t_tap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``partial[s, t] = sum over the rows n of part s of outer(x[table[n, t]], grad[n])``, float32.

    Grid: blocks of ``c_in`` times blocks of ``c_out``; taps; parts of ``chunk`` rows each. The parts are added up
    afterwards, in order. Atomic additions in any order would not give the same bits every time.

    Args:
        x: ``[n_in, c_in]``, rows ``x_row`` apart.
        grad: ``[n_out, c_out]``, rows ``grad_row`` apart.
        table: ``int32 [n_out, taps]`` of any strides; entries of ``n_in`` or more read as a zero row.
        partial: ``float32 [parts, taps, c_in, c_out]``, contiguous.
        ROWS: input channels per program.
        COLUMNS: output channels per program.
        DEPTH: rows n multiplied at once.
    """
    column_blocks = tl.cdiv(c_out, COLUMNS)
    inputs = (tl.program_id(0) // column_blocks) * ROWS + tl.arange(0, ROWS)
    outputs = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    tap = tl.program_id(1)
    start = tl.program_id(2) * chunk
    end = tl.minimum(start + chunk, n_out)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(start, end, DEPTH):
        rows = n + tl.arange(0, DEPTH)
        inside = rows < end
        source = tl.load(table + rows.to(tl.int64) * t_row + tap.to(tl.int64) * t_tap, mask=inside, other=0)
        a = tl.load(
            x + source.to(tl.int64)[:, None] * x_row + inputs[None, :],
            mask=(inside & (source < n_in))[:, None] & (inputs < c_in)[None, :],
            other=0.0,
        )
        g = tl.load(
            grad + rows.to(tl.int64)[:, None] * grad_row + outputs[None, :],
            mask=inside[:, None] & (outputs < c_out)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(a), g, total, input_precision=PRECISION)
    part = (tl.program_id(2).to(tl.int64) * taps + tap) * c_in
    place = (part + inputs)[:, None] * c_out + outputs[None, :]
    tl.store(partial + place, total, mask=(inputs < c_in)[:, None] & (outputs < c_out)[None, :])
