"""The best paths through the layers of message passing, by the weights of edges at their layers.

A layer computes x_l[n] = f(W [x_{l-1}[n] ; u]) + x_{l-1}[n] with u the messages into n and the boundary x_0[n]. A
state is carried on through W and the shortcut, and the boundary enters anew in every layer, so what starts at a
question's entity may take its hops in any layers l_1 < l_2 < ... < l_m, and wait in the others. NBFNet's own search
(Zhu et al. 2021, arXiv:2106.06935, path interpretations) knows only the first m layers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count

import numpy as np
from ragkit_kernels.relational_conv import GraphLayout

MAX_EXTENSIONS = 20_000
"""Partial paths that are extended before the search stops with what it has (some seconds)."""


@dataclass(frozen=True)
class Hops:
    """Edges by the node that they leave, equal ones (same ends, same relation) joined.

    Attributes:
        ptr: [N + 1] int64; node n is left by hops `ptr[n] : ptr[n + 1]`.
        dst: [M] int64, node that a hop goes to.
        rel: [M] int64, relation id.
        given: [E] int64, ids of the graph's edges in this order; hop i is made of `given[start[i] : start[i + 1]]`.
        start: [M + 1] int64.
    """

    ptr: np.ndarray
    dst: np.ndarray
    rel: np.ndarray
    given: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, layout: GraphLayout) -> Hops:
        """From a layout on the CPU."""
        ptr = layout.by_src.ptr.numpy().astype(np.int64)
        dst, rel, position = layout.by_src.edges.numpy().astype(np.int64)  # sorted by (source, relation, destination)
        new = np.ones(len(dst), bool)
        new[1:] = (dst[1:] != dst[:-1]) | (rel[1:] != rel[:-1])
        new[ptr[:-1][np.diff(ptr) > 0]] = True
        start = np.flatnonzero(new)
        given = layout.order.numpy().astype(np.int64)[position]
        return cls(np.searchsorted(start, ptr), dst[start], rel[start], given, np.append(start, len(dst)))

    def weights(self, of_edges: np.ndarray) -> np.ndarray:
        """[L, M] sums over each hop's edges of [L, E] numbers (in the order of the graph's edges)."""
        if not len(self.dst):
            return np.zeros((len(of_edges), 0))
        return np.add.reduceat(of_edges[:, self.given], self.start[:-1], axis=1)

    def edges(self, hop: int) -> list[int]:
        """Ids of the graph's edges that make up a hop."""
        return self.given[self.start[hop] : self.start[hop + 1]].tolist()


@dataclass(frozen=True)
class FoundPath:
    """One path.

    Attributes:
        source: Its first node.
        hops: Places in `Hops.dst`.
        layers: The layer (1 ... L) of each hop, ascending.
        weight: Mean of the hops' weights at their layers.
    """

    source: int
    hops: tuple[int, ...]
    layers: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class _Partial:
    """A path so far: nodes, hops, and sums[l] = the most that its hops add up to within the first l layers."""

    nodes: tuple[int, ...]
    hops: tuple[int, ...]
    sums: np.ndarray  # [L + 1]


@dataclass(frozen=True)
class _Children:
    """All ways to go on from a path, best first; a complete one ends at a target, an open one goes on."""

    parent: _Partial
    bounds: np.ndarray  # [C] weight of the complete, upper bound of the open ones
    complete: np.ndarray  # [C] bool
    hops: np.ndarray  # [C]
    sums: np.ndarray  # [C, L + 1]


def best_paths(
    hops: Hops,
    weights: np.ndarray,
    sources: Sequence[int],
    targets: Sequence[int],
    top: int,
    beam: int,
) -> tuple[list[FoundPath], str]:
    """The paths of greatest mean weight from a source to a target, best first; none visits a node twice.

    The weight of a path is the mean over its hops, as NBFNet's, at the layers l_1 < ... < l_m where that is greatest.
    Best-first search: a dynamic programme backwards from the targets gives what the rest of a path can add at most,
    and the partial path with the greatest possible mean is extended next. So the first complete path is the best, and
    so on; only `beam` makes it inexact.

    Args:
        hops: The graph.
        weights: [L, M] of each hop at each layer.
        sources: Nodes where paths begin.
        targets: Nodes where they end.
        top: Paths wanted.
        beam: Partial paths with the same last node and number of hops that are extended; the best ones are.

    Returns:
        The paths, and what kept the search from finding as many as wanted: "limit" (`MAX_EXTENSIONS`), "beam", or ""
        (there are no more).
    """
    L, N = len(weights), len(hops.ptr) - 1
    kept = _between(hops, sources, targets, L)
    rest = _completions(hops, weights, kept, targets)
    is_target = np.zeros(N, bool)
    is_target[list(targets)] = True
    heap: list[tuple[float, int, _Children, int]] = []
    ticket = count()  # of equal bounds the one that was found first
    found: list[FoundPath] = []
    extended: Counter[tuple[int, int]] = Counter()
    extensions, cut = 0, False

    def put(children: _Children, place: int) -> None:
        if place < len(children.hops):
            heapq.heappush(heap, (-float(children.bounds[place]), next(ticket), children, place))

    for source in sorted(set(sources)):
        put(_extend(_Partial((source,), (), np.zeros(L + 1)), hops, weights, kept, rest, is_target), 0)
    while heap and len(found) < top:
        bound, _, children, place = heapq.heappop(heap)
        put(children, place + 1)
        parent, hop = children.parent, int(children.hops[place])
        path = (*parent.hops, hop)
        if children.complete[place]:
            found.append(FoundPath(parent.nodes[0], path, _placement(weights, path), -bound))
            continue
        node = int(hops.dst[hop])
        if extended[node, len(path)] >= beam:
            cut = True
            continue
        extended[node, len(path)] += 1
        extensions += 1
        if extensions > MAX_EXTENSIONS:
            return found, "limit"
        partial = _Partial((*parent.nodes, node), path, children.sums[place])
        put(_extend(partial, hops, weights, kept, rest, is_target), 0)
    return found, "beam" if cut and len(found) < top else ""


def _extend(
    path: _Partial, hops: Hops, weights: np.ndarray, kept: np.ndarray, rest: np.ndarray, is_target: np.ndarray
) -> _Children:
    L, m = len(weights), len(path.hops) + 1
    begin, end = hops.ptr[path.nodes[-1]], hops.ptr[path.nodes[-1] + 1]
    out = np.arange(begin, end)[kept[begin:end]]  # [C]
    dst = hops.dst[out]
    new = ~np.isin(dst, path.nodes)
    out, dst = out[new], dst[new]
    sums = np.full((len(out), L + 1), -np.inf)
    for layer in range(1, L + 1):  # either the hop is in this layer, or it was before
        sums[:, layer] = np.maximum(sums[:, layer - 1], path.sums[layer - 1] + weights[layer - 1, out])
    complete = np.where(is_target[dst], sums[:, L] / m, -np.inf)
    open_ = np.full(len(out), -np.inf)
    for more in range(1, L - m + 1):
        total = (sums + rest[more][:, dst].T).max(axis=1, initial=-np.inf)
        open_ = np.maximum(open_, total / (m + more))
    bounds = np.concatenate([complete, open_])
    places = np.flatnonzero(bounds > -np.inf)
    places = places[np.argsort(-bounds[places], kind="stable")]
    which = places % max(1, len(out))
    return _Children(path, bounds[places], places < len(out), out[which], sums[which])


def _completions(hops: Hops, weights: np.ndarray, kept: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """[L, L + 1, N]: the most that r hops from a node to a target add up to in the layers after the first l.

    rest[r, l, n] = max(rest[r, l + 1, n], max over hops e from n of w[l + 1, e] + rest[r - 1, l + 1, dst_e]),
    -inf where there are none. Nodes may be visited twice here, so it bounds what paths can do.
    """
    L, N = len(weights), len(hops.ptr) - 1
    rest = np.full((L, L + 1, N), -np.inf, np.float64)
    rest[0, :, list(targets)] = 0.0
    used = np.flatnonzero(kept)
    if not len(used):
        return rest
    dst = hops.dst[used]
    src = np.searchsorted(hops.ptr, used, side="right") - 1
    start = np.flatnonzero(np.append(True, src[1:] != src[:-1]))
    for more in range(1, L):
        for layer in range(L - 1, -1, -1):
            best = np.maximum.reduceat(weights[layer, used] + rest[more - 1, layer + 1, dst], start)
            rest[more, layer] = rest[more, layer + 1]
            rest[more, layer, src[start]] = np.maximum(rest[more, layer, src[start]], best)
    return rest


def _between(hops: Hops, sources: Sequence[int], targets: Sequence[int], L: int) -> np.ndarray:
    """[M] bool, hops on some way of at most L hops from a source to a target."""
    N = len(hops.ptr) - 1
    src = np.repeat(np.arange(N), np.diff(hops.ptr))
    before = _distances(src, hops.dst, sources, N, L)
    after = _distances(hops.dst, src, targets, N, L)
    return before[src] + 1 + after[hops.dst] <= L


def _distances(src: np.ndarray, dst: np.ndarray, starts: Sequence[int], N: int, L: int) -> np.ndarray:
    """[N] hops from the nearest start; L + 1 for more than L."""
    distance = np.full(N, L + 1)
    distance[list(starts)] = 0
    for step in range(L):
        reached = dst[distance[src] == step]
        distance[reached] = np.minimum(distance[reached], step + 1)
    return distance


def _placement(weights: np.ndarray, path: tuple[int, ...]) -> tuple[int, ...]:
    """The layers, 1 ... L, at which a path's weights add up to most; of equal ones the earliest."""
    L, hops = len(weights), list(path)
    best = max(combinations(range(L), len(path)), key=lambda layers: float(weights[list(layers), hops].sum()))
    return tuple(layer + 1 for layer in best)
