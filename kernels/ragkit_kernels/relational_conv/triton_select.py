"""Triton kernels of the gradients that look at single edges: of "max" and PNA, and of the edge weights.

They walk the work lists like `triton_conv.gather_kernel`; see there for the common arguments. What an edge receives is
found by comparing its place in the row with the stored winner: nothing is scattered, and there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ragkit_kernels.relational_conv.triton_conv import deal, edge_at, finish, fold_sum, scale_of, table_tile, tile


@triton.jit
def passed(
    message, nodes, local, batch, cols, ok, grad, grad_n, grad_b, won, N, B, D,
    TIMES: tl.constexpr, AGGREGATE: tl.constexpr,
):  # fmt: skip
    """[L, B, D] gradient that nodes [L] pass back to their edges number `local` [L], for unweighted messages.

    With PNA, the sum, the largest, the smallest and the squares (planes of `grad`) each add a part; that of the
    squares is TIMES · message.
    """
    total = tile(grad, nodes, grad_n, batch, grad_b, cols, ok)
    if AGGREGATE == "max" or AGGREGATE == "pna":
        place = ((nodes * B)[:, None, None] + batch[None, :, None]) * D + cols[None, None, :]
        first = tl.load(won + place, mask=ok, other=-1) == local[:, None, None]
        if AGGREGATE == "max":
            total = tl.where(first, total, 0.0)
        else:
            last = tl.load(won + N.to(tl.int64) * B * D + place, mask=ok, other=-1) == local[:, None, None]
            total += TIMES * message * tile(grad + 3 * D, nodes, grad_n, batch, grad_b, cols, ok)
            total += tl.where(first, tile(grad + D, nodes, grad_n, batch, grad_b, cols, ok), 0.0)
            total += tl.where(last, tile(grad + 2 * D, nodes, grad_n, batch, grad_b, cols, ok), 0.0)
    return total


@triton.jit(do_not_specialize=["E", "N", "slots", "B"])
def select_kernel(
    units, ptr, edges, E, dst_ptr, x, xn, xb, r, rn, rb, weight, keep, grad, grad_n, grad_b, won,
    base, base_n, base_b, out, out_n, out_b, part, N, slots, B, D,
    MESSAGE: tl.constexpr, AGGREGATE: tl.constexpr, SHARED: tl.constexpr, OF_TABLE: tl.constexpr,
    LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[s] = base[s] + sum over the edges of s of w_e · passed(e) ⊙ (the other factor): gradients for max and PNA.

    Of the states (by_src, edges = (dst, rel, position), other factor = relation) or, OF_TABLE, of the relations
    (by_rel, edges = (dst, src, position), other factor = state; summed over the queries if the table is SHARED).
    `grad` [N, B, D] or, for PNA, [N, B, 4 D]; `won` as the forward pass stored it; `dst_ptr` of by_dst.
    Grid and order of the sums as in `gather_kernel`; nothing is saved.
    """
    unit = units + tl.program_id(0).to(tl.int64) * 5
    row = tl.load(unit)
    row_end = tl.load(unit + 1)
    edge_begin = tl.load(unit + 2)
    edge_end = tl.load(unit + 3)
    slot = tl.load(unit + 4).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    REDUCE: tl.constexpr = OF_TABLE and SHARED
    block = tl.program_id(2)
    blocks = tl.cdiv(B, BLOCK_B) if REDUCE else block + 1
    while row < row_end:
        rows, live, first, last, step, steps, alone, taken = deal(row, row_end, edge_begin, edge_end, ptr, LANES)
        total = tl.zeros([LANES, BLOCK_B, BLOCK_D], tl.float32)
        for b in range(block, blocks):
            batch = (b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
            inside = (batch < B)[None, :, None] & (cols < D)[None, None, :]  # [1, B, D]
            for k in tl.range(0, steps, num_stages=STAGES):
                nodes, other, position, valid = edge_at(first + k * step, last, edges, E, keep)
                ok = valid[:, None, None] & inside  # [L, B, D]
                local = (position - tl.load(dst_ptr + nodes, mask=valid, other=0)).to(tl.int32)
                state = tile(x, other if OF_TABLE else rows, xn, batch, xb, cols, ok)
                factor = table_tile(r, rows if OF_TABLE else other, rn, batch, rb, cols, D, valid, ok, SHARED)
                message = state * factor if MESSAGE == "distmult" else state + factor
                back = passed(message, nodes, local, batch, cols, ok, grad, grad_n, grad_b, won, N, B, D, 2, AGGREGATE)
                if weight is not None:
                    back = back * scale_of(weight, position, valid)
                if MESSAGE == "distmult":
                    back = back * (state if OF_TABLE else factor)
                total += back
        total = fold_sum(total, alone)
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
            tl.store(part + place, total, mask=ok)
        else:
            finish(
                total, total, total, total, total, total, rows, live, batch, cols,
                ptr, None, base, base_n, base_b, None, 0, 0, None, 0, out, out_n, out_b, None, N, queries, D, "sum",
            )  # fmt: skip
        row += taken


@triton.jit(do_not_specialize=["E", "N", "B"])
def weight_kernel(
    units, ptr, edges, E, x, xn, xb, r, rn, rb, keep, grad, grad_n, grad_b, won, out, N, B, D,
    MESSAGE: tl.constexpr, AGGREGATE: tl.constexpr, SHARED: tl.constexpr,
    LANES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[tile, e] = Σ over a tile's queries and columns of message_e ⊙ passed(e); the caller adds the tiles.

    Over by_dst. Grid: (units, columns / BLOCK_D, queries / BLOCK_B); out [number of tiles, E] float32, 0 for removed
    edges. Each edge is in one lane of one unit, so nothing is shared between programs.
    """
    unit = units + tl.program_id(0).to(tl.int64) * 5
    row = tl.load(unit)
    row_end = tl.load(unit + 1)
    edge_begin = tl.load(unit + 2)
    edge_end = tl.load(unit + 3)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = (tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    inside = (batch < B)[None, :, None] & (cols < D)[None, None, :]  # [1, B, D]
    out += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * E.to(tl.int64)
    while row < row_end:
        rows, live, first, last, step, steps, alone, taken = deal(row, row_end, edge_begin, edge_end, ptr, LANES)
        begin = tl.load(ptr + rows)  # [L]
        for k in tl.range(0, steps, num_stages=STAGES):
            e = first + k * step  # [L]
            src, rel, position, valid = edge_at(e, last, edges, E, keep)
            ok = valid[:, None, None] & inside  # [L, B, D]
            state = tile(x, src, xn, batch, xb, cols, ok)
            factor = table_tile(r, rel, rn, batch, rb, cols, D, valid, ok, SHARED)
            message = state * factor if MESSAGE == "distmult" else state + factor
            back = passed(message, rows, e - begin, batch, cols, ok, grad, grad_n, grad_b, won, N, B, D, 1, AGGREGATE)
            tl.store(out + e, tl.sum(tl.sum(message * back, axis=2), axis=1), mask=e < last)
        row += taken
