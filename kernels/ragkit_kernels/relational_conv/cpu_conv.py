"""numba loops of relational message passing on a CPU: parallel over rows, no [E, B, D] temporary.

Work per iteration: a slab of 128 columns of one unit of the layout's work list (a run of rows with about 64 edges, or
one heavy row). Slabs are the outer order, so that a slab of all states stays in the cache. A row is summed edge by
edge in the layout's order, so the result does not depend on the number of threads.

Tensors come as flat views with strides: nothing is copied, only the last dimension must be contiguous. Inner loops run
over slices, which numba vectorises (it cannot where an index might be negative). Arguments: `x, sxn, sxb` states and
their strides per node and batch row; `r, srr, srb` relation table, per relation and batch row (srb 0: shared); `w`,
`keep` edge weights and mask in by_dst order; `g, sgn, sgb` incoming gradient; `won` winning edges, [N, B, D].
"""

from __future__ import annotations

import numpy as np
from numba import prange

from ragkit_kernels.numba_tools import kernel

SLAB = 128  # columns per iteration
MULTIPLY, ADD, COPY = 0, 1, 2  # what a message makes of a state and its relation
SUM, MAX, PNA = 0, 1, 2


@kernel
def _rows(unit, ptr):
    """Rows of a work unit; of a heavy row's slices only the first works, on the whole row."""
    if unit[4] >= 0 and unit[2] != ptr[unit[0]]:
        return np.int64(0), np.int64(0)
    return np.int64(unit[0]), np.int64(unit[1])


@kernel
def _start(acc, n, b, lo, base, sbn, sbb, has_base, mask, smn, smb, query, sqb, has_query):
    """acc = the boundary of row (n, b): a dense one, or mask[n, b] · query[b], or zero."""
    S = len(acc)
    if has_base:
        i = n * sbn + b * sbb + lo
        start = base[i : i + S]
        for d in range(S):
            acc[d] = start[d]
        return
    m = mask[n * smn + b * smb] if has_query else mask.dtype.type(0)
    if m != 0:
        i = b * sqb + lo
        question = query[i : i + S]
        for d in range(S):
            acc[d] = m * question[d]
    else:
        for d in range(S):
            acc[d] = 0


@kernel(parallel=True)
def sum_kernel(
    ptr, nbr, rel, pos, units, x, sxn, sxb, r, srr, srb, w, has_w, keep, has_keep, code, mean,
    base, sbn, sbb, has_base, mask, smn, smb, query, sqb, has_query, out, son, sob, B, D,
):  # fmt: skip
    """out[n] = boundary[n] + Σ_e message_e over the edges of segment n; divided by (edges + 1) for the mean."""
    for k in prange(len(units) * ((D + SLAB - 1) // SLAB)):
        lo = k // len(units) * SLAB
        S = min(SLAB, D - lo)
        first, last = _rows(units[k % len(units)], ptr)
        for n in range(first, last):
            for b in range(B):
                o = n * son + b * sob + lo
                _start(out[o : o + S], n, b, lo, base, sbn, sbb, has_base, mask, smn, smb, query, sqb, has_query)
            count = 0
            for e in range(ptr[n], ptr[n + 1]):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                count += 1
                scale = w[p] if has_w else w[0]
                for b in range(B):
                    i = np.int64(nbr[e]) * sxn + b * sxb + lo
                    j = np.int64(rel[e]) * srr + b * srb + lo
                    o = n * son + b * sob + lo
                    acc, xs, rs = out[o : o + S], x[i : i + S], r[j : j + S]
                    if code == MULTIPLY:
                        if has_w:
                            for d in range(S):
                                acc[d] += scale * xs[d] * rs[d]
                        else:
                            for d in range(S):
                                acc[d] += xs[d] * rs[d]
                    elif code == ADD:
                        for d in range(S):
                            acc[d] += scale * (xs[d] + rs[d])
                    else:
                        for d in range(S):
                            acc[d] += scale * xs[d]
            if mean:
                factor = out.dtype.type(1) / out.dtype.type(count + 1)
                for b in range(B):
                    o = n * son + b * sob + lo
                    acc = out[o : o + S]
                    for d in range(S):
                        acc[d] *= factor


@kernel
def _message(code, x, r):
    return x * r if code == MULTIPLY else x + r


@kernel(parallel=True)
def max_kernel(
    ptr, nbr, rel, pos, units, x, sxn, sxb, r, srr, srb, w, has_w, keep, has_keep, code, sign,
    base, sbn, sbb, has_base, mask, smn, smb, query, sqb, has_query, out, son, sob, won, B, D,
):  # fmt: skip
    """out[n] = max (sign 1) or min (sign -1) of the boundary and the messages; won = edge within the row, or -1."""
    for k in prange(len(units) * ((D + SLAB - 1) // SLAB)):
        lo = k // len(units) * SLAB
        S = min(SLAB, D - lo)
        first, last = _rows(units[k % len(units)], ptr)
        for n in range(first, last):
            for b in range(B):
                o = n * son + b * sob + lo
                _start(out[o : o + S], n, b, lo, base, sbn, sbb, has_base, mask, smn, smb, query, sqb, has_query)
                v = (n * B + b) * D + lo
                winner = won[v : v + S]
                for d in range(S):
                    winner[d] = -1
            for e in range(ptr[n], ptr[n + 1]):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                scale = w[p] if has_w else w[0]
                local = e - ptr[n]
                for b in range(B):
                    i = np.int64(nbr[e]) * sxn + b * sxb + lo
                    j = np.int64(rel[e]) * srr + b * srb + lo
                    o = n * son + b * sob + lo
                    v = (n * B + b) * D + lo
                    acc, winner, xs, rs = out[o : o + S], won[v : v + S], x[i : i + S], r[j : j + S]
                    for d in range(S):
                        m = scale * _message(code, xs[d], rs[d])
                        if sign * m > sign * acc[d]:
                            acc[d] = m
                            winner[d] = local


@kernel(parallel=True)
def squares_kernel(ptr, nbr, rel, pos, units, x, sxn, sxb, r, srr, srb, w, has_w, keep, has_keep, code, out, B, D):
    """out[n] += Σ_e w_e · message_e² (out holds the boundary's square), for the deviation of PNA."""
    for k in prange(len(units) * ((D + SLAB - 1) // SLAB)):
        lo = k // len(units) * SLAB
        S = min(SLAB, D - lo)
        first, last = _rows(units[k % len(units)], ptr)
        for n in range(first, last):
            for e in range(ptr[n], ptr[n + 1]):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                scale = w[p] if has_w else w[0]
                for b in range(B):
                    i = np.int64(nbr[e]) * sxn + b * sxb + lo
                    j = np.int64(rel[e]) * srr + b * srb + lo
                    o = (n * B + b) * D + lo
                    acc, xs, rs = out[o : o + S], x[i : i + S], r[j : j + S]
                    for d in range(S):
                        m = _message(code, xs[d], rs[d])
                        acc[d] += scale * m * m


@kernel
def _edge_gradient(kind, message, total, largest, smallest, square, won, won2, local, scale):
    """d loss / d message of one edge and column: what the aggregate of the edge's destination passes back to it."""
    if kind == MAX:
        return scale * total if won == local else total * 0
    v = total + 2 * message * square
    if won == local:
        v += largest
    if won2 == local:
        v += smallest
    return scale * v


@kernel(parallel=True)
def select_dx_kernel(
    ptr, dst, rel, pos, units, dst_ptr, x, sxn, sxb, r, srr, srb, w, has_w, keep, has_keep, code, kind,
    g, sgn, sgb, won, won2, base, sbn, sbb, has_base, out, son, sob, B, D,
):  # fmt: skip
    """Gradient of the node states for max and PNA, gathered per source: each edge compares the stored winner."""
    plane = D if kind == PNA else 0  # g of PNA: four planes, of the sum, largest, smallest, squares
    for k in prange(len(units) * ((D + SLAB - 1) // SLAB)):
        lo = k // len(units) * SLAB
        S = min(SLAB, D - lo)
        first, last = _rows(units[k % len(units)], ptr)
        for s in range(first, last):
            for b in range(B):
                o = s * son + b * sob + lo
                acc = out[o : o + S]
                if has_base:
                    i = s * sbn + b * sbb + lo
                    start = base[i : i + S]
                    for d in range(S):
                        acc[d] = start[d]
                else:
                    for d in range(S):
                        acc[d] = 0
            for e in range(ptr[s], ptr[s + 1]):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                scale = w[p] if has_w else w[0]
                n = np.int64(dst[e])
                local = p - dst_ptr[n]
                for b in range(B):
                    i = s * sxn + b * sxb + lo
                    j = np.int64(rel[e]) * srr + b * srb + lo
                    q = n * sgn + b * sgb + lo
                    v = (n * B + b) * D + lo
                    o = s * son + b * sob + lo
                    acc, xs, rs = out[o : o + S], x[i : i + S], r[j : j + S]
                    g0, g1 = g[q : q + S], g[q + plane : q + plane + S]
                    g2, g3 = g[q + 2 * plane : q + 2 * plane + S], g[q + 3 * plane : q + 3 * plane + S]
                    v0, v1 = won[v : v + S], won2[v : v + S]
                    for d in range(S):
                        m = _message(code, xs[d], rs[d])
                        u = _edge_gradient(kind, m, g0[d], g1[d], g2[d], g3[d], v0[d], v1[d], local, scale)
                        acc[d] += u * rs[d] if code == MULTIPLY else u


@kernel(parallel=True)
def drel_kernel(
    ptr, dst, src, pos, units, dst_ptr, x, sxn, sxb, r, srr, srb, w, has_w, keep, has_keep, code, kind,
    g, sgn, sgb, won, won2, out, sor, sob, B, D,
):  # fmt: skip
    """Gradient of the relation table, per relation: Σ_e Σ_b; kept apart per b only if the table is (sob > 0)."""
    plane = D if kind == PNA else 0
    for k in prange(len(units) * ((D + SLAB - 1) // SLAB)):
        lo = k // len(units) * SLAB
        S = min(SLAB, D - lo)
        first, last = _rows(units[k % len(units)], ptr)
        for t in range(first, last):
            for b in range(B if sob > 0 else 1):
                o = t * sor + b * sob + lo
                acc = out[o : o + S]
                for d in range(S):
                    acc[d] = 0
            for e in range(ptr[t], ptr[t + 1]):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                scale = w[p] if has_w else w[0]
                n = np.int64(dst[e])
                local = p - dst_ptr[n]
                for b in range(B):
                    i = np.int64(src[e]) * sxn + b * sxb + lo
                    q = n * sgn + b * sgb + lo
                    o = t * sor + b * sob + lo
                    acc, xs, g0 = out[o : o + S], x[i : i + S], g[q : q + S]
                    if kind == SUM:
                        if code == MULTIPLY:
                            if has_w:
                                for d in range(S):
                                    acc[d] += scale * xs[d] * g0[d]
                            else:
                                for d in range(S):
                                    acc[d] += xs[d] * g0[d]
                        else:
                            for d in range(S):
                                acc[d] += scale * g0[d]
                        continue
                    j = t * srr + b * srb + lo
                    v = (n * B + b) * D + lo
                    rs, g1 = r[j : j + S], g[q + plane : q + plane + S]
                    g2, g3 = g[q + 2 * plane : q + 2 * plane + S], g[q + 3 * plane : q + 3 * plane + S]
                    v0, v1 = won[v : v + S], won2[v : v + S]
                    for d in range(S):
                        m = _message(code, xs[d], rs[d])
                        u = _edge_gradient(kind, m, g0[d], g1[d], g2[d], g3[d], v0[d], v1[d], local, scale)
                        acc[d] += u * xs[d] if code == MULTIPLY else u


@kernel(parallel=True, fastmath={"reassoc", "contract"})
def dweight_kernel(
    ptr, src, rel, pos, units, x, sxn, sxb, r, srr, srb, keep, has_keep, code, kind, g, sgn, sgb, won, won2, out, B, D
):
    """Gradient of the edge weights in by_dst order: Σ_b Σ_d of message and square, times what they pass back."""
    plane = D if kind == PNA else 0
    for k in prange(len(units)):
        for e in range(units[k, 2], units[k, 3]):
            out[e] = 0
        for n in range(units[k, 0], units[k, 1]):
            for e in range(max(units[k, 2], ptr[n]), min(units[k, 3], ptr[n + 1])):
                p = pos[e]
                if has_keep and keep[p] == 0:
                    continue
                local = e - ptr[n]
                total = x.dtype.type(0)
                for b in range(B):
                    i = np.int64(src[e]) * sxn + b * sxb
                    j = np.int64(rel[e]) * srr + b * srb
                    q = np.int64(n) * sgn + b * sgb
                    v = (np.int64(n) * B + b) * D
                    xs, rs, g0 = x[i : i + D], r[j : j + D], g[q : q + D]
                    if kind == SUM:
                        for d in range(D):
                            total += g0[d] * _message(code, xs[d], rs[d])
                        continue
                    g1, g2, g3 = (
                        g[q + plane : q + plane + D],
                        g[q + 2 * plane : q + 2 * plane + D],
                        g[q + 3 * plane : q + 3 * plane + D],
                    )
                    v0, v1 = won[v : v + D], won2[v : v + D]
                    for d in range(D):
                        m = _message(code, xs[d], rs[d])
                        if kind == MAX:
                            if v0[d] == local:
                                total += g0[d] * m
                        else:
                            u = g0[d] + m * g3[d]
                            if v0[d] == local:
                                u += g1[d]
                            if v1[d] == local:
                                u += g2[d]
                            total += u * m
                out[e] = total
