"""Triton kernels of the LSR loss: two softmaxes, their KL divergence and its gradient in one pass, in float32.

One program per question. `keep` is what is neither padding nor masked; nothing behind it is read, so nothing there
can leak. No atomics and a fixed order of sums: the same bits in every run. A factor 0 takes its term with it
(0 · log 0 = 0); NaN stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-3.0e38)  # below every logit, and finite: the difference of two of them is 0, not NaN


@triton.jit
def kept(mask, mask_b, mask_k, b, cols, K):
    """[BLOCK_K] which of a row's columns hold a passage; without mask all of them."""
    keep = cols < K
    if mask is not None:
        keep = keep & (tl.load(mask + b * mask_b + cols.to(tl.int64) * mask_k, mask=keep, other=0) != 0)
    return keep


@triton.jit
def logits(values, stride_b, stride_k, b, cols, keep, temperature):
    """[BLOCK_K] values / temperature in float32; 0 where not kept."""
    x = tl.load(values + b * stride_b + cols.to(tl.int64) * stride_k, mask=keep, other=0.0).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def log_softmax(x, keep):
    """[BLOCK_K] log-probabilities over what is kept; not meaningful elsewhere, nor in a row without any passage."""
    x = x - tl.max(tl.where(keep, x, LOW), axis=0)
    total = tl.sum(tl.where(keep, tl.exp(x), 0.0), axis=0)
    return x - tl.log(tl.where(tl.max(keep.to(tl.int32), axis=0) > 0, total, 1.0))


@triton.jit
def finite(x):
    """x, or 0 where it is +∞: what all differences are taken relative to."""
    return tl.where(x == float("inf"), 0.0, x)


@triton.jit
def divergence(s, t, keep, gamma, SEEK: tl.constexpr):
    """Loss of one row and its gradient with respect to the scores [BLOCK_K], from the logits of P and Q.

    In KL(P‖Q) = Σ P (log P − log Q) the differences are taken relative to that of the likeliest passage: where P is
    sharp, the gradient P (log P − log Q − KL) / γ would else be the small difference of large numbers.
    """
    log_p = log_softmax(s, keep)
    log_q = log_softmax(t, keep)
    p = tl.where(keep, tl.exp(log_p), 0.0)
    q = tl.where(keep, tl.exp(log_q), 0.0)
    if SEEK:
        e = log_p - log_q
        likeliest = keep & (log_p == tl.max(tl.where(keep, log_p, LOW), axis=0))
        base = finite(tl.max(tl.where(likeliest, e, LOW), axis=0))
        e = tl.where(p == 0.0, 0.0, e - base)
        mean = tl.sum(p * e, axis=0)
        loss = base + mean
        ds = p * (e - mean) / gamma
    else:
        loss = tl.sum(tl.where(q == 0.0, 0.0, q * (log_q - log_p)), axis=0)
        ds = (p - q) / gamma
    return tl.where(tl.max(keep.to(tl.int32), axis=0) > 0, loss, 0.0), ds


@triton.jit(do_not_specialize=["gamma", "beta", "K"])
def row_kernel(
    scores, scores_b, scores_k, lm_scores, lm_b, lm_k, mask, mask_b, mask_k, losses, dscores, gamma, beta, K,
    SEEK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """losses [B] and dscores [B, K] (contiguous, may be `scores` itself) of rows that fit into one block."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    keep = kept(mask, mask_b, mask_k, b, cols, K)
    s = logits(scores, scores_b, scores_k, b, cols, keep, gamma)
    t = logits(lm_scores, lm_b, lm_k, b, cols, keep, beta)
    loss, ds = divergence(s, t, keep, gamma, SEEK)
    tl.store(losses + b, loss)
    tl.store(dscores + b * K + cols, ds, mask=cols < K)


@triton.jit
def dots(
    queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d, b, cols, keep, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K] float32 products of one query with its passages; those not kept are not read."""
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        dims = d + tl.arange(0, BLOCK_D)
        at = cols.to(tl.int64)[:, None] * passages_k + dims.to(tl.int64)[None, :] * passages_d  # [K, D]
        ok = keep[:, None] & (dims < D)[None, :]
        x = tl.load(passages + b * passages_b + at, mask=ok, other=0.0).to(tl.float32)
        q = tl.load(queries + b * queries_b + dims.to(tl.int64) * queries_d, mask=dims < D, other=0.0)
        total += x * q.to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=["gamma", "beta", "K"])
def embedding_kernel(
    queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d,
    lm_scores, lm_b, lm_k, mask, mask_b, mask_k, losses, dscores, gamma, beta, K, D,
    SEEK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`row_kernel` with scores[b, k] = queries[b] · passages[b, k], which are never stored."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    keep = kept(mask, mask_b, mask_k, b, cols, K)
    s = dots(
        queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d, b, cols, keep, D, BLOCK_K,
        BLOCK_D, STAGES,
    )  # fmt: skip
    t = logits(lm_scores, lm_b, lm_k, b, cols, keep, beta)
    loss, ds = divergence(tl.div_rn(s, gamma), t, keep, gamma, SEEK)
    tl.store(losses + b, loss)
    tl.store(dscores + b * K + cols, ds, mask=cols < K)


@triton.jit(do_not_specialize=["K"])
def dot_kernel(
    queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d, mask, mask_b, mask_k, out, K, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[b, k] = queries[b] · passages[b, k] in float32, 0 where masked: for rows of more than one block.

    Grid: (questions, passages / BLOCK_K).
    """
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = kept(mask, mask_b, mask_k, b, cols, K)
    s = dots(
        queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d, b, cols, keep, D, BLOCK_K,
        BLOCK_D, STAGES,
    )  # fmt: skip
    tl.store(out + b * K + cols, s, mask=cols < K)


@triton.jit
def moved(cross, total, a, b, new_a, new_b):
    """Σ e^(x − a) ((x − a) − (y − b)) relative to new points a, b, from that sum and `total` = Σ e^(x − a)."""
    return tl.exp(a - new_a) * (cross + total * ((a - new_a) - (b - new_b)))


@triton.jit
def term(a, b):
    """e^a (a − b) for shifted logits; 0 where e^a is."""
    weight = tl.exp(a)
    return tl.where(weight == 0.0, 0.0, weight * (a - b))


@triton.jit(do_not_specialize=["gamma", "beta", "K"])
def wide_kernel(
    scores, scores_b, scores_k, lm_scores, lm_b, lm_k, mask, mask_b, mask_k, losses, dscores, gamma, beta, K,
    SEEK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`row_kernel` for rows of any length: two passes over a row, BLOCK_K columns at a time.

    With the logits (x, y) = (s, t) of P and Q for KL(P‖Q), (t, s) for KL(Q‖P), each lane keeps in the first pass its
    largest logits mx and my, the logit `other` of y where x is largest, the sums of exponentials zx and zy, and
    cross = Σ e^(x − mx) ((x − mx) − (y − other)). Then, over all lanes,

        loss = cross / zx − log zx + log zy + (my − other)

    The second pass reads the row again (it is in the cache) and writes the gradient.
    """
    b = tl.program_id(0).to(tl.int64)
    mx = tl.full([BLOCK_K], LOW, tl.float32)
    my = tl.full([BLOCK_K], LOW, tl.float32)
    other = tl.zeros([BLOCK_K], tl.float32)
    zx = tl.zeros([BLOCK_K], tl.float32)
    zy = tl.zeros([BLOCK_K], tl.float32)
    cross = tl.zeros([BLOCK_K], tl.float32)
    found = tl.zeros([BLOCK_K], tl.int32)
    for k in range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        keep = kept(mask, mask_b, mask_k, b, cols, K)
        s = tl.where(keep, logits(scores, scores_b, scores_k, b, cols, keep, gamma), float("-inf"))
        t = tl.where(keep, logits(lm_scores, lm_b, lm_k, b, cols, keep, beta), float("-inf"))
        if SEEK:
            x, y = s, t
        else:
            x, y = t, s
        new_x, new_y = tl.maximum(mx, x), tl.maximum(my, y)
        new_other = tl.where((x > mx) & (y > float("-inf")), y, other)
        cross = moved(cross, zx, mx, other, new_x, new_other) + term(x - new_x, y - new_other)
        zx = zx * tl.exp(mx - new_x) + tl.exp(x - new_x)
        zy = zy * tl.exp(my - new_y) + tl.exp(y - new_y)
        mx, my, other = new_x, new_y, new_other
        found |= keep.to(tl.int32)
    some = tl.max(found, axis=0) > 0
    top_x, top_y = tl.max(mx, axis=0), tl.max(my, axis=0)
    base = tl.max(tl.where(mx == top_x, other, LOW), axis=0)
    total_x = tl.where(some, tl.sum(zx * tl.exp(mx - top_x), axis=0), 1.0)
    total_y = tl.where(some, tl.sum(zy * tl.exp(my - top_y), axis=0), 1.0)
    log_x, log_y = tl.log(total_x), tl.log(total_y)
    mean = tl.sum(moved(cross, zx, mx, other, top_x, base), axis=0) / total_x
    loss = mean - log_x + log_y + (top_y - base)
    tl.store(losses + b, tl.where(some, loss, 0.0))
    for k in range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        keep = kept(mask, mask_b, mask_k, b, cols, K)
        s = logits(scores, scores_b, scores_k, b, cols, keep, gamma)
        t = logits(lm_scores, lm_b, lm_k, b, cols, keep, beta)
        if SEEK:
            p = tl.where(keep, tl.exp(s - top_x - log_x), 0.0)
            ds = p * (tl.where(p == 0.0, 0.0, (s - top_x) - (t - base)) - mean) / gamma
        else:
            ds = tl.where(keep, (tl.exp(s - top_y - log_y) - tl.exp(t - top_x - log_x)) / gamma, 0.0)
        tl.store(dscores + b * K + cols, ds, mask=cols < K)


@triton.jit(do_not_specialize=["K"])
def embedding_backward_kernel(
    grad, dscores, queries, queries_b, queries_d, passages, passages_b, passages_k, passages_d, dqueries, dpassages,
    K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dqueries[b] = Σ_k w[k] passages[b, k], dpassages[b, k] = w[k] queries[b], w = grad[b] · dscores[b].

    Without dqueries or dpassages (None) that one is left out; both are contiguous. Grid: (questions, columns /
    BLOCK_D). What has no gradient (masked) is not read.
    """
    b = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(grad + b).to(tl.float32)
    q = tl.load(queries + b * queries_b + dims.to(tl.int64) * queries_d, mask=dims < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        cols = k + tl.arange(0, BLOCK_K)
        ds = tl.load(dscores + b * K + cols, mask=cols < K, other=0.0)
        live = (ds != 0.0)[:, None] & (dims < D)[None, :]  # [K, D]
        w = (ds * factor)[:, None]
        if dqueries is not None:
            at = cols.to(tl.int64)[:, None] * passages_k + dims.to(tl.int64)[None, :] * passages_d
            total += w * tl.load(passages + b * passages_b + at, mask=live, other=0.0).to(tl.float32)
        if dpassages is not None:
            out = (b * K + cols)[:, None] * D + dims[None, :]
            value = tl.where(live, w * q[None, :], 0.0).to(dpassages.dtype.element_ty)
            tl.store(dpassages + out, value, mask=(cols < K)[:, None] & (dims < D)[None, :])
    if dqueries is not None:
        tl.store(dqueries + b * D + dims, tl.sum(total, axis=0).to(dqueries.dtype.element_ty), mask=dims < D)
