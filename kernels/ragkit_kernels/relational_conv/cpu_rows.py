"""numba loops of message passing among chosen (query, node) rows of a graph, without sorting or copying its edges.

The rows lie one after the other, [M, D], and `place` says which row a (node, query) pair is: the edges of a row are
those of its node, to rows of its query. A limit leaves out rows from there on, so that rows sorted by when they are
reached need one `place` for all layers. Sums go in the order of the graph's layout, on any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ragkit_kernels.numba_tools import flat, kernel, launch
from ragkit_kernels.relational_conv.layout import GraphLayout, Segments

GRAIN = 64  # rows per iteration


@kernel(parallel=True)
def _rows_kernel(ptr, nbr, rel, node, query, place, B, limit, x, r, multiply, add, out, count, D):
    for k in prange((count + GRAIN - 1) // GRAIN):
        for row in range(k * GRAIN, min(count, (k + 1) * GRAIN)):
            n, b = node[row], query[row]
            o = np.int64(row) * D
            acc = out[o : o + D]
            if not add:
                for d in range(D):
                    acc[d] = 0
            for e in range(ptr[n], ptr[n + 1]):
                other = place[np.int64(nbr[e]) * B + b]
                if other < 0 or other >= limit:
                    continue
                i, j = np.int64(other) * D, np.int64(rel[e]) * D
                xs, rs = x[i : i + D], r[j : j + D]
                if multiply:
                    for d in range(D):
                        acc[d] += xs[d] * rs[d]
                else:
                    for d in range(D):
                        acc[d] += xs[d]


@kernel(parallel=True)
def _relation_kernel(ptr, dst, src, place, B, before, after, x, g, out, R, D):
    for k in prange((R + GRAIN - 1) // GRAIN):
        for t in range(k * GRAIN, min(R, (k + 1) * GRAIN)):
            o = np.int64(t) * D
            acc = out[o : o + D]
            for d in range(D):
                acc[d] = 0
            for e in range(ptr[t], ptr[t + 1]):
                for b in range(B):
                    s = place[np.int64(src[e]) * B + b]
                    if s < 0 or s >= before:
                        continue
                    n = place[np.int64(dst[e]) * B + b]
                    if n < 0 or n >= after:
                        continue
                    i, j = np.int64(s) * D, np.int64(n) * D
                    xs, gs = x[i : i + D], g[j : j + D]
                    for d in range(D):
                        acc[d] += xs[d] * gs[d]


@kernel(parallel=True)
def _nodes_kernel(place, B, first, last, sign, g, out, N, D):
    for k in prange((N + GRAIN - 1) // GRAIN):
        for n in range(k * GRAIN, min(N, (k + 1) * GRAIN)):
            o = np.int64(n) * D
            acc = out[o : o + D]
            for b in range(B):
                row = place[np.int64(n) * B + b]
                if row < first or row >= last:
                    continue
                i = np.int64(row - first) * D
                gs = g[i : i + D]
                for d in range(D):
                    acc[d] += sign * gs[d]


def places(node: Tensor, query: Tensor, nodes: int, queries: int) -> Tensor:
    """[N · B] int32, the row of each (node, query) pair, or -1."""
    place = torch.full((nodes * queries,), -1, dtype=torch.int32)
    place[node * queries + query] = torch.arange(len(node), dtype=torch.int32)
    return place


def sum_rows(
    segments: Segments, node: Tensor, query: Tensor, place: Tensor, limit: int, x: Tensor, relation: Tensor | None,
    out: Tensor, add: bool = False,
) -> None:  # fmt: skip
    """out[row] = (out[row] +) Σ over the edges of the row's node of relation ⊙ x[row at the other end].

    Args:
        segments: The graph's edges by the node that the rows sum for: `by_dst`, or `by_src` for the gradient.
        node, query: [M] int64 of the rows; the first len(out) are summed.
        place: From `places`.
        limit: Rows from there on are as if they were not there.
        x: [limit or more, D] contiguous.
        relation: [R, D] contiguous; None: the sum of x alone.
        out: [count, D] contiguous.
        add: Whether to add to what is there.
    """
    count, D = out.shape
    edges = segments.edges.numpy()
    table = x if relation is None else relation
    launch(
        _rows_kernel, segments.ptr.numpy(), edges[0], edges[1], node.numpy(), query.numpy(), place.numpy(),
        len(place) // max(1, len(segments.ptr) - 1), limit, flat(x), flat(table), relation is not None, add, flat(out),
        count, D,
    )  # fmt: skip


def relation_gradient(layout: GraphLayout, place: Tensor, before: int, after: int, x: Tensor, grad: Tensor) -> Tensor:
    """[R, D]: Σ over the edges of a relation and the queries of x[source row] ⊙ grad[destination row].

    Args:
        layout: The graph.
        place: From `places`.
        before, after: Limits of the source and the destination rows.
        x, grad: [before or more, D] and [after or more, D], contiguous.
    """
    D, R = x.shape[1], layout.num_relations
    out = x.new_empty(R, D)
    edges = layout.by_rel.edges.numpy()
    launch(
        _relation_kernel, layout.by_rel.ptr.numpy(), edges[0], edges[1], place.numpy(),
        len(place) // max(1, layout.num_nodes), before, after, flat(x), flat(grad), flat(out), R, D,
    )  # fmt: skip
    return out


def add_to_nodes(out: Tensor, place: Tensor, first: int, last: int, grad: Tensor, sign: int = 1) -> None:
    """out[n] += sign · Σ grad[row - first] over the rows first ... last - 1 of node n; out [N, D], contiguous."""
    N, D = out.shape
    launch(
        _nodes_kernel, place.numpy(), len(place) // max(1, N), first, last, sign,
        flat(grad), flat(out), N, D,
    )  # fmt: skip
