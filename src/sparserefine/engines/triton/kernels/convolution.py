"""The primitive as an implicit matrix product, and the gradient of its weight."""

import triton
import triton.language as tl

RESIDUAL = tl.constexpr(1)
BIAS = tl.constexpr(2)
RAW = tl.constexpr(4)
FIRST = tl.constexpr(8)
SECOND = tl.constexpr(16)


@triton.jit
def _relu(v):
    return tl.where(v < 0, 0.0, v)  # not tl.maximum, which would hide NaN


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
    """The epilogue: what becomes of ``total [ROWS, COLUMNS]``; arguments are those of :func:`convolve`."""
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
    """``v[n] = sum_t x[table[n, t]] @ weight[t]``, and what is done with v while it is still in registers.

    Grid: blocks of rows times blocks of columns, those of one block of rows side by side: they read the same inputs.
    With SHARED, each program along a second axis adds a part of the taps and channels, and stores that in ``raw``,
    ``raw_share`` after that of the program before; :func:`finish` adds them up. Accumulates in float32.

    Args:
        x: ``[n_in, c_in]``, rows ``x_row`` apart.
        weight: ``[taps, c_in, c_out]`` of any strides.
        table: ``int32 [n_out, taps]`` of any strides; what is not less than ``n_in`` reads as zero.
        order: ``int32 [n_out]``, for READ = 2 or 3: the outputs, parity by parity.
        parities: ``int32 [4]``: how many of each.
        count: ``int32 [1]``, if PADDED: outputs in use.
        residual: added to v.
        bias: ``[c_out]``, added to v.
        raw: gets v.
        first: gets ``relu(v * first_scale + first_shift)``.
        second: the same with a normalisation of its own.
        parts: bit mask of the optional operands in use. Not constants: that would be a compilation for each choice.
        raw_share: see above.
        READ: 0: row n reads row n. 1: the table. 2: outputs by parity, of a transposed 2x2 convolution, where one tap
            of four reaches each. 3: the same of 3x3, where 4, 2, 2 or 1 taps of nine do. 4: the table, all taps and
            channels in one block: for inputs of hardly any channels.
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
        # Which parity this block belongs to: each begins with a block of its own.
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
        # One loop over taps and channels, not one in the other: loads are issued ahead across its whole length.
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
                # Outside, 0 and not a row that reads as zero: with that, Triton before 3.3 does not compile.
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

    if SHARED:  # only this is compiled then: with an epilogue too, the largest blocks would run out of registers
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
    """Adds up, in order, what the programs of :func:`convolve` have shared out, and does what that kernel does else.

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

    Grid: blocks of ``c_in`` times blocks of ``c_out``, taps, parts of ``chunk`` rows each. The parts are added up
    afterwards, in order: adding them as they come would not give the same bits twice.

    Args:
        x: ``[n_in, c_in]``, rows ``x_row`` apart.
        grad: ``[n_out, c_out]``, rows ``grad_row`` apart.
        table: ``int32 [n_out, taps]`` of any strides; what is not less than ``n_in`` reads as zero.
        partial: ``float32 [parts, taps, c_in, c_out]``, contiguous.
        ROWS: of the result: input channels.
        COLUMNS: of the result: output channels.
        DEPTH: rows n that are multiplied at once.
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
