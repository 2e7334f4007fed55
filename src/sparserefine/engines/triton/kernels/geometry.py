"""Finds the active cells of each level, numbers them (their rows), and fills the tables between them.

The cells of a level are divided into blocks of ``BLOCK`` consecutive cells of a row, ``segments`` blocks per row, in
row-major order. Two counts share one integer, so that one sum computes both. Within a block, the lower 16 bits count
even columns and the upper 16 bits odd columns. Over many blocks, the lower 32 bits of an int64 count even rows and the
upper 32 bits odd rows.
"""

import triton
import triton.language as tl

_SIZES = ["finer_height", "finer_width", "height", "width", "segments", "blocks", "capacity", "offset", "level"]


@triton.jit(do_not_specialize=[*_SIZES, "stride"])
def activity(
    finer,
    cells,
    counts,
    shapes,
    finer_height,
    finer_width,
    height,
    width,
    segments,
    blocks,
    capacity,
    offset,
    level,
    stride,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block: marks the cells with a site in their window, and counts them in even and in odd columns.

    Args:
        finer: ``uint8 [B, finer_height, finer_width]``, 0 or 1; with WINDOW 1, the cells of this level.
        cells: ``uint8 [B, height, width]``, written unless WINDOW is 1.
        counts: ``int64 [levels, 2, stride]``, written: cells in even and in odd columns of each block.
        shapes: ``int32 [levels, 6]``, written: the sizes of this level, for :func:`scan`.
        finer_height: height of ``finer``.
        finer_width: width of ``finer``.
        height: height of this level.
        width: width of this level.
        segments: blocks per row.
        blocks: blocks of this level.
        capacity: maximum number of active cells.
        offset: offset of this level's cells in the storage of all levels.
        level: 0 is the finest.
        stride: stride of ``counts``.
        WINDOW: 1: the cells are given. 2 or 3: width of a cell's window in ``finer``, at stride 2.
        BLOCK: cells per block.
    """
    STEP: tl.constexpr = 1 if WINDOW == 1 else 2
    program = tl.program_id(0)
    if program == 0:
        shape = shapes + level * 6
        tl.store(shape, blocks)
        tl.store(shape + 1, segments)
        tl.store(shape + 2, height)
        tl.store(shape + 3, width)
        tl.store(shape + 4, capacity)
        tl.store(shape + 5, offset)
    line = program // segments
    row = line % tl.maximum(height, 1)
    batch = line // tl.maximum(height, 1)
    column = (program % segments) * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.where(row < height, width, 0)
    active = tl.full([BLOCK], 0, tl.int32)
    for along in tl.static_range(WINDOW):
        source_row = row * STEP + along
        source = finer + (batch * finer_height + source_row) * finer_width
        end = tl.where(source_row < finer_height, finer_width, 0)
        for across in tl.static_range(WINDOW):
            source_column = column * STEP + across
            active |= tl.load(source + source_column, mask=inside & (source_column < end), other=0).to(tl.int32)
    if WINDOW > 1:
        tl.store(cells + line * width + column, active.to(tl.uint8), mask=inside)
    count = tl.sum(active << (column & 1) * 16, 0)
    half = (row & 1) * 32
    block = counts + level.to(tl.int64) * 2 * stride + program
    tl.store(block, (count & 0xFFFF).to(tl.int64) << half)
    tl.store(block + stride, (count >> 16).to(tl.int64) << half)


@triton.jit(do_not_specialize=["stride"])
def scan(
    mask,
    cells,
    shapes,
    counts,
    before,
    totals,
    kept,
    parities,
    stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per level: counts the active cells before each block and in the whole level.

    Args:
        mask: ``uint8 [B, H, W]``, cells of level 0; read only if they exceed the capacity.
        cells: storage of the other levels' cells.
        shapes: ``int32 [levels, 6]``: blocks, blocks per row, height, width, capacity, offset in ``cells``.
        counts: ``int64 [levels, 2, stride]``: active cells in even and in odd columns of each block.
        before: same shape, written: the sum of ``counts`` over all earlier blocks.
        totals: ``int32 [levels]``, written: active cells.
        kept: ``int32 [levels, 4]``, column 0 written: active cells, at most the capacity.
        parities: ``int32 [levels, 4]``, written: the kept cells by parity of row and column.
        stride: stride of ``counts``.
        CAPPED: whether there may be more cells than the capacity.
        BLOCK: cells per block.
        CHUNK: blocks read at once.
    """
    level = tl.program_id(0)
    shape = shapes + level * 6
    blocks = tl.load(shape)
    capacity = tl.load(shape + 4)
    even_counts = counts + level.to(tl.int64) * 2 * stride
    even_before = before + level.to(tl.int64) * 2 * stride
    even_total = tl.full([], 0, tl.int64)
    odd_total = tl.full([], 0, tl.int64)
    # The last chunk that begins within the capacity. If the capacity is exceeded, it is in this chunk.
    last = tl.full([], 0, tl.int32)
    even_cut = tl.full([], 0, tl.int64)
    odd_cut = tl.full([], 0, tl.int64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        there = block < blocks
        even = tl.load(even_counts + block, mask=there, other=0)
        odd = tl.load(even_counts + stride + block, mask=there, other=0)
        tl.store(even_before + block, even_total + tl.cumsum(even, 0) - even, mask=there)
        tl.store(even_before + stride + block, odd_total + tl.cumsum(odd, 0) - odd, mask=there)
        if CAPPED:
            both = even_total + odd_total
            within = both.to(tl.int32) + (both >> 32).to(tl.int32) <= capacity
            last = tl.where(within, start, last)
            even_cut = tl.where(within, even_total, even_cut)
            odd_cut = tl.where(within, odd_total, odd_cut)
        even_total += tl.sum(even, 0)
        odd_total += tl.sum(odd, 0)
    both = even_total + odd_total
    total = both.to(tl.int32) + (both >> 32).to(tl.int32)
    tl.store(totals + level, total)
    if CAPPED:  # noqa: SIM102 - evaluated at compile time
        if total > capacity:
            block = last + tl.arange(0, CHUNK)
            even = tl.load(even_counts + block, mask=block < blocks, other=0)
            odd = tl.load(even_counts + stride + block, mask=block < blocks, other=0)
            even_first = even_cut + tl.cumsum(even, 0) - even
            odd_first = odd_cut + tl.cumsum(odd, 0) - odd
            first = even_first + odd_first
            end = first + even + odd
            # True for exactly one block: it begins within the capacity and ends past it.
            passed = (first.to(tl.int32) + (first >> 32).to(tl.int32) <= capacity) & (
                end.to(tl.int32) + (end >> 32).to(tl.int32) > capacity
            )
            cut = tl.sum(tl.where(passed, block, 0), 0)
            even_cut = tl.sum(tl.where(passed, even_first, 0), 0)
            odd_cut = tl.sum(tl.where(passed, odd_first, 0), 0)
            segments = tl.load(shape + 1)
            width = tl.load(shape + 3)
            line = cut // segments
            column = (cut % segments) * BLOCK + tl.arange(0, BLOCK)
            place = line * width + column
            active = tl.load(mask + place, mask=column < tl.where(level == 0, width, 0), other=0).to(tl.int32)
            others = cells + tl.load(shape + 5) + place
            active |= tl.load(others, mask=column < tl.where(level == 0, 0, width), other=0).to(tl.int32)
            both = even_cut + odd_cut
            room = capacity - both.to(tl.int32) - (both >> 32).to(tl.int32)
            active = tl.where(tl.cumsum(active, 0) <= room, active, 0)
            count = tl.sum(active << (column & 1) * 16, 0)
            half = (line % tl.load(shape + 2) & 1) * 32
            even_total = even_cut + ((count & 0xFFFF).to(tl.int64) << half)
            odd_total = odd_cut + ((count >> 16).to(tl.int64) << half)
            total = capacity
    tl.store(kept + level * 4, total)
    parity = parities + level * 4
    tl.store(parity, even_total.to(tl.int32))
    tl.store(parity + 1, odd_total.to(tl.int32))
    tl.store(parity + 2, (even_total >> 32).to(tl.int32))
    tl.store(parity + 3, (odd_total >> 32).to(tl.int32))


@triton.jit(do_not_specialize=["height", "width", "segments", "capacity", "level", "stride"])
def rows(
    cells,
    before,
    parities,
    index,
    coords,
    order,
    height,
    width,
    segments,
    capacity,
    level,
    stride,
    BLOCK: tl.constexpr,
):
    """One program per block of each row of the index image: numbers the active cells, writes coordinates and order.

    Args:
        cells: ``uint8 [B, height, width]``, 0 or 1.
        before: ``int64 [levels, 2, stride]``: active cells before each block.
        parities: ``int32 [levels, 4]``: active cells by parity of row and column.
        index: ``int32 [B, height + 2, width + 2]``, written: the number of each active cell, ``capacity`` elsewhere.
        coords: ``int32 [capacity, 3]``, written at the rows in use.
        order: ``int32 [capacity]``, written likewise: the cells grouped by parity of row and column; or ``None``.
        height: height of this level.
        width: width of this level.
        segments: blocks per row.
        capacity: maximum number of cells; later ones are left out.
        level: 0 is the finest.
        stride: stride of ``before``.
        BLOCK: cells per block.
    """
    program = tl.program_id(0)
    line = program // segments
    segment = program % segments
    batch = line // (height + 2)
    row = line % (height + 2) - 1
    inside = (row >= 0) & (row < height)
    column = segment * BLOCK + tl.arange(0, BLOCK)
    there = column < tl.where(inside, width, 0)
    cell = batch * height + row
    active = tl.load(cells + cell * width + column, mask=there, other=0).to(tl.int32)
    block = before + level.to(tl.int64) * 2 * stride + cell * segments + segment
    even_first = tl.load(block, mask=inside, other=0)
    odd_first = tl.load(block + stride, mask=inside, other=0)
    own = active << (column & 1) * 16
    nth = tl.cumsum(own, 0) - own
    even_nth = nth & 0xFFFF
    odd_nth = nth >> 16
    both = even_first + odd_first
    site = both.to(tl.int32) + (both >> 32).to(tl.int32) + even_nth + odd_nth
    kept = (active != 0) & (site < capacity)
    image_row = index + line * (width + 2)
    tl.store(image_row + 1 + column, tl.where(kept, site, capacity), mask=column < width)
    tl.store(image_row, capacity, mask=segment == 0)
    tl.store(image_row + width + 1, capacity, mask=segment == 0)

    coord = coords + site.to(tl.int64) * 3
    tl.store(coord, batch, mask=kept)
    tl.store(coord + 1, row, mask=kept)
    tl.store(coord + 2, column, mask=kept)

    if order is not None:
        half = (row & 1) * 32
        parity = parities + level * 4
        even_even = tl.load(parity)
        even_start = tl.where((row & 1) == 0, 0, even_even + tl.load(parity + 1))
        odd_start = even_start + tl.where((row & 1) == 0, even_even, tl.load(parity + 2))
        even_place = even_start + (even_first >> half).to(tl.int32) + even_nth
        odd_place = odd_start + (odd_first >> half).to(tl.int32) + odd_nth
        tl.store(order + tl.where((column & 1) == 0, even_place, odd_place), site, mask=kept)


@triton.jit(
    do_not_specialize=[
        *("level", "height", "width", "finer_height", "finer_width", "coarser_height", "coarser_width"),
        *("coarser_rows", "stride"),
    ]
)
def tables(
    coords,
    kept,
    index,
    around,
    finer_index,
    children,
    coarser_index,
    parents,
    level,
    height,
    width,
    finer_height,
    finer_width,
    coarser_height,
    coarser_width,
    coarser_rows,
    stride,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK cells per program: fills their rows in the tables of neighbours, of children and of parents.

    Args:
        coords: ``int32 [N, 3]``.
        kept: ``int32 [levels, 4]``: column 0 holds the number of rows in use.
        index: ``int32 [B, height + 2, width + 2]``: index image of this level.
        around: ``int32 [9, stride]``, written at the rows in use, as are the other tables.
        finer_index: index image of the finer level, or ``None`` at the finest.
        children: ``int32 [KERNEL^2, stride]``: finer cell ``2 o + tap`` of each cell ``o``.
        coarser_index: index image of the coarser level, or ``None`` at the coarsest.
        parents: ``int32 [KERNEL^2, stride]``: coarser cell ``o`` with ``2 o + tap`` = cell.
        level: 0 is the finest.
        height: height of this level.
        width: width of this level.
        finer_height: height of the finer level.
        finer_width: width of the finer level.
        coarser_height: height of the coarser level.
        coarser_width: width of the coarser level.
        coarser_rows: entry of ``parents`` where there is no parent.
        stride: stride of the tables.
        KERNEL: 3 or 2, width of a cell's window.
        BLOCK: rows per program.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = n < tl.load(kept + level * 4)
    batch = tl.load(coords + n * 3, mask=there, other=0)
    row = tl.load(coords + n * 3 + 1, mask=there, other=0)
    column = tl.load(coords + n * 3 + 2, mask=there, other=0)
    step = stride.to(tl.int64)
    # Index images have a border of one cell, so this is the upper left neighbour.
    corner = (batch * (height + 2) + row) * (width + 2) + column
    for along in tl.static_range(3):
        for across in tl.static_range(3):
            neighbour = tl.load(index + corner + along * (width + 2) + across, mask=there, other=0)
            tl.store(around + (along * 3 + across) * step + n, neighbour, mask=there)
    if finer_index is not None:
        first = (batch * (finer_height + 2) + row * 2 + 1) * (finer_width + 2) + column * 2 + 1
        for along in tl.static_range(KERNEL):
            for across in tl.static_range(KERNEL):
                child = tl.load(finer_index + first + along * (finer_width + 2) + across, mask=there, other=0)
                tl.store(children + (along * KERNEL + across) * step + n, child, mask=there)
    if coarser_index is not None:
        for along in tl.static_range(KERNEL):
            # Cells -1 and those past the last lie in the border: there is no such cell.
            line = (batch * (coarser_height + 2) + ((row - along) >> 1) + 1) * (coarser_width + 2)
            for across in tl.static_range(KERNEL):
                fits = there & (((row - along) & 1) + ((column - across) & 1) == 0)
                place = line + ((column - across) >> 1) + 1
                parent = tl.load(coarser_index + place, mask=fits, other=coarser_rows)
                tl.store(parents + (along * KERNEL + across) * step + n, parent, mask=there)
