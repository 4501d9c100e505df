"""Triton kernels of relational message passing: the gather that is forward and backward of sums, and its combine.

A program walks one unit of the layout's work list on a tile of LANES edges x BLOCK_B queries x BLOCK_D columns. Short
rows are handled LANES at a time, one per lane; the edges of a longer row are dealt out to all lanes, which are added
up at the end (`deal`). A slice of a heavy row leaves its sums in a slot of float32; `combine_kernel` adds the slots
in order. The way from edges to sums depends on the layout and the tile alone, there are no atomics: the same inputs
give the same bits. Ids are widened to 64 bits before a stride multiplies them.

Common arguments (strides in elements, the last dimension is contiguous): `units` [U, 5], `ptr` [S + 1] and `edges`
[3, E] as in `layout.Segments`; a tensor `t` [rows, B, D] comes with `tn`, `tb`, its strides per row and query;
`weight` [E] float32, `keep` [E] uint8, by position, or None; `degree` [S] kept edges of each row, or None for all;
`base` [S, B, D], or `mask` [S, B] float32 and `query` [B, D]: the boundary, or None; `part`, `part_won` partial sums
and winners, [planes, slots, B, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_EDGE = tl.constexpr(2**31 - 1)  # winner of a lane that has seen no edge
VARIANCE_FLOOR = tl.constexpr(1e-6)  # reference.PNA_EPS


@triton.jit
def deal(row, row_end, edge_begin, edge_end, ptr, LANES: tl.constexpr):
    """Which rows and edges the lanes take next, from `row` on.

    Returns:
        rows [L] int64, live [L]: each lane's row (one of the unit's), and whether it stores a result.
        first, last [L], step: lane l walks edges first, first + step, ... below last; steps: how many at most.
        alone: all lanes share one row; taken: how many rows are done.
    """
    lane = tl.arange(0, LANES)
    within = row + lane < row_end
    begin = tl.maximum(tl.load(ptr + row + lane, mask=within, other=0), edge_begin)  # [L]
    end = tl.minimum(tl.load(ptr + row + lane + 1, mask=within, other=0), edge_end)  # [L]; 0 where there is no row
    longest = tl.max(end - begin, axis=0)
    head = tl.maximum(tl.load(ptr + row), edge_begin)
    tail = tl.minimum(tl.load(ptr + row + 1), edge_end)
    alone = (longest > 2 * LANES) | (row + 1 == row_end)
    rows = tl.minimum(row + tl.where(alone, 0, lane), row_end - 1).to(tl.int64)
    live = tl.where(alone, lane == 0, within)
    first = tl.where(alone, head + lane, begin)
    last = tl.where(alone, tail, end)
    step = tl.where(alone, LANES, 1)
    steps = tl.where(alone, tl.cdiv(tail - head, LANES), longest)
    return rows, live, first, last, step, steps, alone, tl.where(alone, 1, LANES)


@triton.jit
def edge_at(e, last, edges, E, keep):
    """The three ids of edges e [L] as int64, and which of them exist and are kept."""
    valid = e < last
    count = E.to(tl.int64)
    one = tl.load(edges + e, mask=valid, other=0).to(tl.int64)
    two = tl.load(edges + count + e, mask=valid, other=0).to(tl.int64)
    position = tl.load(edges + 2 * count + e, mask=valid, other=0).to(tl.int64)
    if keep is not None:
        valid = valid & (tl.load(keep + position, mask=valid, other=0) != 0)
    return one, two, position, valid


@triton.jit
def tile(base, rows, row_stride, batch, batch_stride, cols, ok):
    """[L, B, D] of base[rows, batch, cols] in float32, zero where not ok; rows and batch are int64."""
    at = rows[:, None, None] * row_stride + batch[None, :, None] * batch_stride + cols[None, None, :]
    return tl.load(base + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def table_tile(base, rows, row_stride, batch, batch_stride, cols, D, valid, ok, SHARED: tl.constexpr):
    """As `tile`; of a table that the queries share, [L, 1, D]."""
    if SHARED:
        one = tl.zeros([1], tl.int64)
        found = tile(base, rows, row_stride, one, 0, cols, valid[:, None, None] & (cols < D)[None, None, :])
    else:
        found = tile(base, rows, row_stride, batch, batch_stride, cols, ok)
    return found


@triton.jit
def scale_of(weight, position, valid):
    """[L, 1, 1] edge weights, 1 where there are none."""
    if weight is not None:
        scale = tl.load(weight + position, mask=valid, other=0.0).to(tl.float32)[:, None, None]
    else:
        scale = tl.where(valid, 1.0, 0.0)[:, None, None]
    return scale


@triton.jit
def better(value, winner, best, won):
    """Where value beats the best so far; NaN never does, and of equals the earlier stays."""
    wins = value > best
    return tl.where(wins, value, best), tl.where(wins, winner, won)


@triton.jit
def fold_sum(total, alone):
    """The lanes' sums in every lane, if they share a row."""
    return tl.where(alone, tl.sum(total, axis=0, keep_dims=True), total)


@triton.jit
def fold_best(best, won, alone):
    """The lanes' largest value and its first edge in every lane, if they share a row."""
    top = tl.where(alone, tl.max(best, axis=0, keep_dims=True), best)
    first = tl.min(tl.where(best == top, won, NO_EDGE), axis=0, keep_dims=True)
    return top, tl.where(alone, first, won)


@triton.jit
def finish(
    total, squares, largest, top, smallest, bottom, rows, live, batch, cols,
    ptr, degree, base, base_n, base_b, mask, mask_n, mask_b, query, query_b, out, out_n, out_b, won, N, B, D,
    AGGREGATE: tl.constexpr,
):  # fmt: skip
    """Adds the boundary to rows' sums [L, B, D] (or compares it with their extremes); stores out and the winners."""
    inner = live[:, None, None] & (batch < B)[None, :, None]  # [L, B, 1]
    ok = inner & (cols < D)[None, None, :]  # [L, B, D]
    if base is not None:
        start = tile(base, rows, base_n, batch, base_b, cols, ok)
    elif mask is not None:
        m = tl.load(mask + (rows[:, None, None] * mask_n + batch[None, :, None] * mask_b), mask=inner, other=0.0)
        start = m * tile(query, tl.zeros_like(rows), 0, batch, query_b, cols, ok & (m != 0.0))
    else:
        start = tl.zeros_like(total)
    place = out + (rows[:, None, None] * out_n + batch[None, :, None] * out_b + cols[None, None, :])  # [L, B, D]
    winner = ((rows * B)[:, None, None] + batch[None, :, None]) * D + cols[None, None, :]
    kind = out.dtype.element_ty
    if AGGREGATE == "sum":
        tl.store(place, (total + start).to(kind), mask=ok)
    if AGGREGATE == "mean" or AGGREGATE == "pna":
        if degree is not None:
            edges = tl.load(degree + rows, mask=live, other=0)
        else:
            edges = tl.load(ptr + rows + 1, mask=live, other=0) - tl.load(ptr + rows, mask=live, other=0)
        count = (edges + 1).to(tl.float32)[:, None, None]  # the boundary counts as one
        mean = (total + start) / count
        tl.store(place, mean.to(kind), mask=ok)
        if AGGREGATE == "pna":
            variance = (squares + start * start) / count - mean * mean
            variance = tl.where(variance < VARIANCE_FLOOR, VARIANCE_FLOOR, variance)
            tl.store(place + 3 * D, tl.sqrt_rn(variance).to(kind), mask=ok)
            place += D
    if AGGREGATE == "max" or AGGREGATE == "pna":
        value, index = better(largest, top, start, tl.full(top.shape, -1, tl.int32))
        tl.store(place, value.to(kind), mask=ok)
        tl.store(won + winner, index, mask=ok)
    if AGGREGATE == "pna":
        value, index = better(smallest, bottom, -start, tl.full(bottom.shape, -1, tl.int32))
        tl.store(place + D, (-value).to(kind), mask=ok)
        tl.store(won + N.to(tl.int64) * B * D + winner, index, mask=ok)


@triton.jit(do_not_specialize=["E", "N", "slots", "B"])
def gather_kernel(
    units, ptr, edges, E, a, an, ab, c, cn, cb, weight, keep, degree, base, base_n, base_b, mask, mask_n, mask_b,
    query, query_b, out, out_n, out_b, won, part, part_won, N, slots, B, D,
    MESSAGE: tl.constexpr, AGGREGATE: tl.constexpr, SHARED: tl.constexpr, REDUCE: tl.constexpr,
    LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[s] = boundary[s] + sum over the edges of segment s of w_e · (a[one_e] ⊙ c[two_e]), or its mean, max, PNA.

    MESSAGE "distmult" multiplies a and c, "transe" adds them, "copy" takes a. Forward: by_dst with a = states, c =
    relations. Gradient of the states: by_src with a = gradient, c = relations. Gradient of the relations: by_rel with
    a = gradient, c = states; REDUCE sums it over the queries (out [R, 1, D]).

    Grid: (units, columns / BLOCK_D, queries / BLOCK_B, or 1 with REDUCE); units are the fastest, so that a slab of
    columns of `a` stays in the L2 cache. SHARED: c has no query dimension. Saved: for "max" and "pna" the winning edge
    within the row, -1 for the boundary, [N, B, D] int32 (two planes for PNA: largest, smallest). PNA needs one pass:
    sum, squares, largest and negated smallest together; N rows of `won` and `slots` place the planes.
    """
    unit = units + tl.program_id(0).to(tl.int64) * 5
    row = tl.load(unit)
    row_end = tl.load(unit + 1)
    edge_begin = tl.load(unit + 2)
    edge_end = tl.load(unit + 3)
    slot = tl.load(unit + 4).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    block = tl.program_id(2)
    blocks = tl.cdiv(B, BLOCK_B) if REDUCE else block + 1
    while row < row_end:
        rows, live, first, last, step, steps, alone, taken = deal(row, row_end, edge_begin, edge_end, ptr, LANES)
        begin = tl.load(ptr + rows)  # [L] winners are counted from here
        total = tl.zeros([LANES, BLOCK_B, BLOCK_D], tl.float32)
        squares = tl.zeros([LANES, BLOCK_B, BLOCK_D], tl.float32)
        largest = tl.full([LANES, BLOCK_B, BLOCK_D], float("-inf"), tl.float32)
        smallest = tl.full([LANES, BLOCK_B, BLOCK_D], float("-inf"), tl.float32)  # of the negated messages
        top = tl.full([LANES, BLOCK_B, BLOCK_D], NO_EDGE, tl.int32)
        bottom = tl.full([LANES, BLOCK_B, BLOCK_D], NO_EDGE, tl.int32)
        for b in range(block, blocks):
            batch = (b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
            inside = (batch < B)[None, :, None] & (cols < D)[None, None, :]  # [1, B, D]
            for k in tl.range(0, steps, num_stages=STAGES):
                e = first + k * step  # [L]
                one, two, position, valid = edge_at(e, last, edges, E, keep)
                ok = valid[:, None, None] & inside  # [L, B, D]
                scale = scale_of(weight, position, valid)
                plain = tile(a, one, an, batch, ab, cols, ok)
                if MESSAGE != "copy":
                    factor = table_tile(c, two, cn, batch, cb, cols, D, valid, ok, SHARED)
                    plain = plain * factor if MESSAGE == "distmult" else plain + factor
                message = plain if weight is None else plain * scale
                if AGGREGATE != "max":
                    total += message
                if AGGREGATE == "pna":
                    squares += plain * message
                    down, local = tl.where(ok, -message, float("-inf")), (e - begin)[:, None, None]
                    smallest, bottom = better(down, local, smallest, bottom)
                if AGGREGATE == "max" or AGGREGATE == "pna":
                    up, local = tl.where(ok, message, float("-inf")), (e - begin)[:, None, None]
                    largest, top = better(up, local, largest, top)
        total = fold_sum(total, alone)
        if AGGREGATE == "max" or AGGREGATE == "pna":
            largest, top = fold_best(largest, top, alone)
        if AGGREGATE == "pna":
            squares = fold_sum(squares, alone)
            smallest, bottom = fold_best(smallest, bottom, alone)
        if REDUCE:
            total = tl.sum(total, axis=1, keep_dims=True)  # [L, 1, D]
            batch = tl.zeros([1], tl.int64)
            queries = 1
        else:
            batch = (block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
            queries = B
        if slot >= 0:
            ok = live[:, None, None] & (batch < queries)[None, :, None] & (cols < D)[None, None, :]
            lane_slot = slot + tl.zeros_like(rows)  # [L]
            place = ((lane_slot * queries)[:, None, None] + batch[None, :, None]) * D + cols[None, None, :]
            plane = slots.to(tl.int64) * queries * D  # of `part`: sums, squares, largest, smallest; or one alone
            peak = 2 if AGGREGATE == "pna" else 0
            if AGGREGATE != "max":
                tl.store(part + place, total, mask=ok)
            if AGGREGATE == "max" or AGGREGATE == "pna":
                tl.store(part + peak * plane + place, largest, mask=ok)
                tl.store(part_won + place, top, mask=ok)
            if AGGREGATE == "pna":
                tl.store(part + plane + place, squares, mask=ok)
                tl.store(part + 3 * plane + place, smallest, mask=ok)
                tl.store(part_won + plane + place, bottom, mask=ok)
        else:
            finish(
                total, squares, largest, top, smallest, bottom, rows, live, batch, cols,
                ptr, degree, base, base_n, base_b, mask, mask_n, mask_b, query, query_b, out, out_n, out_b, won,
                N, queries, D, AGGREGATE,
            )  # fmt: skip
        row += taken


@triton.jit(do_not_specialize=["N", "slots", "B"])
def combine_kernel(
    heavy, ptr, degree, base, base_n, base_b, mask, mask_n, mask_b, query, query_b, out, out_n, out_b,
    won, part, part_won, N, slots, B, D,
    AGGREGATE: tl.constexpr, LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Finishes the heavy rows: out[s] as in `gather_kernel`, from the partial sums and winners of its slots.

    Grid: (heavy rows, columns / BLOCK_D, queries / BLOCK_B). A program adds LANES slots at a time, in order.
    """
    unit = heavy + tl.program_id(0).to(tl.int64) * 3
    lane = tl.arange(0, LANES)
    rows = tl.load(unit).to(tl.int64) + tl.zeros([LANES], tl.int64)
    begin = tl.load(unit + 1)
    end = tl.load(unit + 2)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = (tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    inside = (batch < B)[None, :, None] & (cols < D)[None, None, :]  # [1, B, D]
    plane = slots.to(tl.int64) * B * D
    peak = 2 if AGGREGATE == "pna" else 0
    total = tl.zeros([LANES, BLOCK_B, BLOCK_D], tl.float32)
    squares = tl.zeros([LANES, BLOCK_B, BLOCK_D], tl.float32)
    largest = tl.full([LANES, BLOCK_B, BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([LANES, BLOCK_B, BLOCK_D], float("-inf"), tl.float32)
    top = tl.full([LANES, BLOCK_B, BLOCK_D], NO_EDGE, tl.int32)
    bottom = tl.full([LANES, BLOCK_B, BLOCK_D], NO_EDGE, tl.int32)
    for s in tl.range(begin, end, LANES, num_stages=STAGES):
        slot = (s + lane).to(tl.int64)
        ok = (slot < end)[:, None, None] & inside  # [L, B, D]
        place = ((slot * B)[:, None, None] + batch[None, :, None]) * D + cols[None, None, :]
        if AGGREGATE != "max":
            total += tl.load(part + place, mask=ok, other=0.0)
        if AGGREGATE == "max" or AGGREGATE == "pna":
            up = tl.load(part + peak * plane + place, mask=ok, other=float("-inf"))
            won_up = tl.load(part_won + place, mask=ok, other=NO_EDGE)
            largest, top = better(up, won_up, largest, top)
        if AGGREGATE == "pna":
            squares += tl.load(part + plane + place, mask=ok, other=0.0)
            down = tl.load(part + 3 * plane + place, mask=ok, other=float("-inf"))
            won_down = tl.load(part_won + plane + place, mask=ok, other=NO_EDGE)
            smallest, bottom = better(down, won_down, smallest, bottom)
    largest, top = fold_best(largest, top, True)
    smallest, bottom = fold_best(smallest, bottom, True)
    finish(
        fold_sum(total, True), fold_sum(squares, True), largest, top, smallest, bottom, rows, lane == 0, batch, cols,
        ptr, degree, base, base_n, base_b, mask, mask_n, mask_b, query, query_b, out, out_n, out_b, won, N, B, D,
        AGGREGATE,
    )  # fmt: skip
