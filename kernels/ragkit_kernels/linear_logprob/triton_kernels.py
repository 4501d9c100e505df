"""Triton kernels of `token_logprobs`: the fused product and log-sum-exp, and the passes over rows of given logits.

Logits are z = outer · tanh(inner · a), or outer · a without a cap, for a = hidden · weight + bias; everything after
the products is float32. The vocabulary is split: a program keeps the largest logit and Σ exp(z - largest) of its rows
over its columns and stores one pair per row, [S, T]; `merge_kernel` puts the S pairs together in order. No locks, no
atomics: the same bits in every run. Whatever is multiplied by a stride is a 64-bit number.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # where a maximum begins: finite, so that a difference to it is never inf - inf


@triton.jit
def tanh(x):
    """In float32, with an absolute error of 1e-7; Triton has none that its interpreter knows."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def finish(product, inner, outer, CAPPED: tl.constexpr):
    """Logits of products."""
    if CAPPED:
        product = tanh(product * inner)
    return product * outer


@triton.jit(do_not_specialize=["T", "V", "span"])
def fused_kernel(
    hidden, hn, hd, weight, wv, wd, targets, bias, top, total, picked, T, V, D, span, inner, outer,
    CAPPED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """top, total [S, T] of split s = columns s · span .. (s + 1) · span of the vocabulary; picked [T].

    hidden [T, D], weight [V, D] with any strides. Grid: (T / BLOCK_T, S), rows fastest, so that the programs that run
    at the same time share their piece of the weight in the L2 cache. A program multiplies BLOCK_T rows by BLOCK_V
    columns at a time and keeps the two numbers per row in registers. `picked`, the target's logit, is written by the
    one program whose columns have the target. span is a multiple of BLOCK_V; EVEN: D is one of BLOCK_D.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    begin = split * span
    end = tl.minimum(begin + span, V)
    known = tl.minimum(rows, T - 1)  # beyond the last row (or column), the last is read again: no mask in the loop
    target = tl.load(targets + known).to(tl.int32)  # `merge_kernel` looks whether it is one
    dims = tl.arange(0, BLOCK_D)
    left = hidden + known[:, None] * hn + dims.to(tl.int64)[None, :] * hd  # [T, D]
    m = tl.full([BLOCK_T], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    found = tl.zeros([BLOCK_T], tl.float32)
    for first in range(begin, end, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        right = weight + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * wv + dims.to(tl.int64)[:, None] * wd  # [D, V]
        z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        if bias is not None:  # the sum begins with it: after the products there would be no registers for it
            z += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            at = tl.cast(d, tl.int64)
            if EVEN:
                a = tl.load(left + at * hd)
                b = tl.load(right + at * wd)
            else:
                a = tl.load(left + at * hd, mask=(dims < D - d)[None, :], other=0.0)
                b = tl.load(right + at * wd, mask=(dims < D - d)[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision=PRECISION)
        z = finish(z, inner, outer, CAPPED)
        places = tl.arange(0, BLOCK_V)[None, :]  # constants, unlike `cols`
        found += tl.sum(tl.where((target - first)[:, None] == places, z, 0.0), axis=1)
        if first + BLOCK_V > V:
            z = tl.where(places < V - first, z, float("-inf"))
        new = tl.maximum(m, tl.max(z, axis=1))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new[:, None]), axis=1)
        m = new
    place = split.to(tl.int64) * T + rows
    tl.store(top + place, m, mask=rows < T)
    tl.store(total + place, s, mask=rows < T)
    tl.store(picked + rows, found, mask=(rows < T) & (target >= begin) & (target < end))


@triton.jit(do_not_specialize=["T", "V", "splits", "ignore"])
def merge_kernel(
    top, total, picked, targets, logprob, lse, T, V, splits, ignore, ROWS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """logprob, lse [T] of the pairs [splits, T]; 0 for targets = ignore, NaN for those outside the vocabulary."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = rows < T
    m = tl.full([ROWS], LOWEST, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    for split in tl.range(0, splits, num_stages=STAGES):
        place = tl.cast(split, tl.int64) * T + rows
        one = tl.load(top + place, mask=ok, other=LOWEST)
        new = tl.maximum(m, one)
        s = s * tl.exp(m - new) + tl.load(total + place, mask=ok, other=0.0) * tl.exp(one - new)
        m = new
    target = tl.load(targets + rows, mask=ok, other=0)
    valid = (target >= 0) & (target < V)
    ignored = target == ignore
    chosen = tl.load(picked + rows, mask=ok & valid, other=float("nan"))
    rest = tl.log(s)
    tl.store(logprob + rows, tl.where(ignored, 0.0, chosen - m - rest), mask=ok)
    tl.store(lse + rows, tl.where(valid | ignored, m + rest, float("nan")), mask=ok)


@triton.jit(do_not_specialize=["C", "first"])
def reduce_kernel(
    products, bias, targets, top, total, picked, C, first, inner, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """top, total [R] of contiguous products [R, C] for columns first..first + C; picked [R] where the target is there.

    A program takes one row in one pass, BLOCK columns at a time; each lane keeps a pair of its own until the end, so
    that the loop has no reduction.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row) - first
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, C, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        ok = cols < C
        z = tl.load(products + row * C + cols, mask=ok, other=0.0).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
        z = tl.where(ok, finish(z, inner, outer, CAPPED), float("-inf"))
        found = tl.where(target == cols, z, found)
        new = tl.maximum(m, z)
        s = s * tl.exp(m - new) + tl.exp(z - new)
        m = new
    largest = tl.max(m, axis=0)
    tl.store(top + row, largest)
    tl.store(total + row, tl.sum(s * tl.exp(m - largest), axis=0))
    tl.store(picked + row, tl.sum(found, axis=0), mask=(target >= 0) & (target < C))


@triton.jit(do_not_specialize=["C", "first", "ignore"])
def gradient_kernel(
    products, bias, targets, lse, grad, out, C, first, ignore, inner, outer, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [R, C] = grad · (1[column is target] - exp(z - lse)) · dz / da, which may take the place of the products.

    Grid: (R, C / BLOCK); 0 for rows whose target is ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < C
    target = tl.load(targets + row)
    a = tl.load(products + row * C + cols, mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        a += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    slope = outer
    if CAPPED:
        a = tanh(a * inner)
        slope = (1.0 - a * a) * (inner * outer)
    p = tl.exp(a * outer - tl.load(lse + row))
    g = tl.load(grad + row)
    value = (tl.where(target - first == cols, 1.0, 0.0) - p) * slope * g
    value = tl.where(target == ignore, 0.0, value)
    tl.store(out + row * C + cols, value.to(out.dtype.element_ty), mask=ok)
