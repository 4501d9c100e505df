"""Triton kernels of what follows the matrix products: LayerNorm + ReLU + residual, and the scoring head's ReLU + dot.

Rows are numbered m = n · B + b. Statistics and sums are float32. Gradients of shared vectors are summed per strip of
rows in one program, stored as [strips, ...] float32 and added by the caller: no atomics, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(h, cols, D, EPS: tl.constexpr):
    """(h - mean) / sqrt(variance + EPS) of rows [M, D], and the second factor [M, 1]; 0 outside the columns."""
    mean = tl.sum(h, axis=1, keep_dims=True) / D
    centred = tl.where((cols < D)[None, :], h - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1, keep_dims=True) / D + EPS)
    return centred * scale, scale


@triton.jit
def vector(base, cols, D):
    """[1, D] of a vector, in float32."""
    return tl.load(base + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M", "B"])
def norm_kernel(
    h, x, xn, xb, weight, bias, out, out_n, out_b, M, B, D,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = relu(LayerNorm(h) · weight + bias) + x; no LayerNorm without weight, no residual without x.

    h [M, D] contiguous; x and out with strides per node and query. A program takes ROWS whole rows. Nothing is saved:
    the backward pass computes the statistics anew, which costs less than reading them.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ok = (rows < M)[:, None] & (cols < D)[None, :]  # [M, D]
    y = tl.load(h + rows[:, None] * D + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    if weight is not None:
        y, scale = normalise(y, cols, D, EPS)
        y = y * vector(weight, cols, D) + vector(bias, cols, D)
    y = tl.where(y < 0.0, 0.0, y)  # keeps NaN
    node, query = (rows // B)[:, None], (rows % B)[:, None]
    if x is not None:
        y += tl.load(x + node * xn + query * xb + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(out + node * out_n + query * out_b + cols[None, :], y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "B", "strip"])
def norm_backward_kernel(
    grad, grad_n, grad_b, h, weight, bias, dh, dweight, dbias, M, B, D, strip,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dh = (v − mean(v) − y · mean(v · y)) / sqrt(variance + eps), v = grad · weight where relu is open, y = norm(h).

    A program takes `strip` rows, ROWS at a time, and stores its sums for the vectors in dweight, dbias [strips, D].
    """
    cols = tl.arange(0, BLOCK_D)
    begin = tl.program_id(0).to(tl.int64) * strip
    gain = tl.zeros([ROWS, BLOCK_D], tl.float32)
    shift = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, strip, ROWS):
        local = start + tl.arange(0, ROWS)
        rows = begin + local
        ok = ((rows < M) & (local < strip))[:, None] & (cols < D)[None, :]  # [M, D]
        y = tl.load(h + rows[:, None] * D + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        at = (rows // B)[:, None] * grad_n + (rows % B)[:, None] * grad_b + cols[None, :]
        v = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        if weight is not None:
            y, scale = normalise(y, cols, D, EPS)
            factor = vector(weight, cols, D)
            v = tl.where(y * factor + vector(bias, cols, D) > 0.0, v, 0.0)
            gain += v * y
            shift += v
            v *= factor
            first = tl.sum(v, axis=1, keep_dims=True) / D  # [M, 1]
            second = tl.sum(v * y, axis=1, keep_dims=True) / D
            v = scale * (v - first - y * second)
        else:
            v = tl.where(y > 0.0, v, 0.0)
        tl.store(dh + rows[:, None] * D + cols[None, :], v.to(dh.dtype.element_ty), mask=ok)
    if weight is not None:
        place = tl.program_id(0).to(tl.int64) * D + cols
        tl.store(dweight + place, tl.sum(gain, axis=0), mask=cols < D)
        tl.store(dbias + place, tl.sum(shift, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=["M", "B"])
def dot_kernel(
    h, hn, hb, c, w, out, M, B, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """out[m] = Σ_j relu(h[n, b, j] + c[b, j]) · w[j] in float32; c [B, H] and w [H] contiguous.

    A program takes ROWS rows and walks their columns BLOCK_H at a time. Nothing is saved.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    node, query = (rows // B)[:, None], (rows % B)[:, None]
    total = tl.zeros([ROWS, BLOCK_H], tl.float32)
    for j in tl.range(0, H, BLOCK_H, num_stages=STAGES):
        cols = j + tl.arange(0, BLOCK_H)
        ok = (rows < M)[:, None] & (cols < H)[None, :]  # [M, H]
        y = tl.load(h + node * hn + query * hb + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        y += tl.load(c + query * H + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        total += tl.where(y < 0.0, 0.0, y) * vector(w, cols, H)
    tl.store(out + rows, tl.sum(total, axis=1), mask=rows < M)


@triton.jit(do_not_specialize=["N", "B", "strip"])
def dot_backward_kernel(
    grad, h, hn, hb, c, w, dh, dc, dw, N, B, H, strip,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dh[n, b] = grad[n, b] · w where relu is open; dc, dw: the sums of that, and of grad · relu, per strip and query.

    Grid: (strips, columns / BLOCK_H, queries); a program takes `strip` nodes of one query. dc, dw [strips, B, H].
    Without dh (None, where the queries share h) `dot_shared_kernel` computes that.
    """
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    query = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * strip
    bias = vector(c + query * H, cols, H)
    factor = vector(w, cols, H)
    offset = tl.zeros([ROWS, BLOCK_H], tl.float32)
    gain = tl.zeros([ROWS, BLOCK_H], tl.float32)
    for start in tl.range(0, strip, ROWS, num_stages=STAGES):
        local = start + tl.arange(0, ROWS)
        nodes = begin + local
        within = (nodes < N) & (local < strip)
        ok = within[:, None] & (cols < H)[None, :]  # [M, H]
        y = tl.load(h + nodes[:, None] * hn + query * hb + cols[None, :], mask=ok, other=0.0).to(tl.float32) + bias
        g = tl.load(grad + nodes * B + query, mask=within, other=0.0).to(tl.float32)[:, None]
        v = tl.where(y > 0.0, g, 0.0)
        gain += v * y
        v *= factor
        offset += v
        if dh is not None:
            tl.store(dh + (nodes * B + query)[:, None] * H + cols[None, :], v.to(dh.dtype.element_ty), mask=ok)
    place = (tl.program_id(0).to(tl.int64) * B + query) * H + cols
    tl.store(dc + place, tl.sum(offset, axis=0), mask=cols < H)
    tl.store(dw + place, tl.sum(gain, axis=0), mask=cols < H)


@triton.jit(do_not_specialize=["N", "B"])
def dot_shared_kernel(
    grad, h, hn, c, w, dh, N, B, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """dh[n] = Σ_b grad[n, b] · w where relu(h[n] + c[b]) is open: h [N, 1, H] is shared by the queries.

    Grid: (nodes / ROWS, columns / BLOCK_H); a program adds the queries in order.
    """
    nodes = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok = (nodes < N)[:, None] & (cols < H)[None, :]  # [M, H]
    y = tl.load(h + nodes[:, None] * hn + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_H], tl.float32)
    for b in tl.range(0, B, num_stages=STAGES):
        g = tl.load(grad + nodes * B + b, mask=nodes < N, other=0.0).to(tl.float32)[:, None]
        bias = vector(c + tl.cast(b, tl.int64) * H, cols, H)
        total += tl.where(y + bias > 0.0, g, 0.0)
    total *= vector(w, cols, H)
    tl.store(dh + nodes[:, None] * H + cols[None, :], total.to(dh.dtype.element_ty), mask=ok)
