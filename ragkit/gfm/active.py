"""Which rows a query changes, and the small graphs through which the change spreads.

With a zero boundary the whole network knows nothing of the query: that is the background, one state per node and
layer. A query adds its boundary at its seeds, and a message travels one edge per layer, so after layer l its states
differ from the background only within l hops of the seeds. Those are its active rows; all others are the background's.
The split is exact; on graphs that come from text, where most nodes have one or two neighbours, few rows are active.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from ragkit_kernels.relational_conv.layout import GraphLayout, pointers, segments
from torch import Tensor


@dataclass(frozen=True)
class ActiveRows:
    """The rows that B queries change within L layers, and the edges between them.

    A row is a pair (query, node). Rows are sorted by hop: seeds first, then what is one edge away, and so on, so that
    the rows that differ from the background after layer l are the first `counts[l]`.

    Attributes:
        query: [M] int64 query of each row.
        node: [M] int64 node of each row.
        counts: L + 1 numbers: rows within l hops; the last is M.
        ptr: [M + 1] int64; the edges into row r are `ptr[r] : ptr[r + 1]` of `edges`.
        edges: [2, E] int64 (source row, relation), each row's in the order of the whole graph's layout.
        num_relations: R.
    """

    query: Tensor
    node: Tensor
    counts: list[int]
    ptr: Tensor
    edges: Tensor
    num_relations: int

    def layout(self, layer: int, backward: bool) -> GraphLayout:
        """The edges of layer `layer` (1 ... L), from the `counts[layer - 1]` rows active before to `counts[layer]`.

        Args:
            layer: Which layer.
            backward: Whether gradients are wanted; without them the sorted copies that they need are left empty.
        """
        rows, sources = self.counts[layer], self.counts[layer - 1]
        ptr = self.ptr[: rows + 1]
        kept = self.edges[0] < sources
        kept[int(ptr[-1]) :] = False
        place = torch.zeros(len(kept) + 1, dtype=torch.int64, device=ptr.device)  # an edge's position among the kept
        torch.cumsum(kept, 0, out=place[1:])
        chosen = kept.nonzero().squeeze(1)
        position = torch.arange(len(chosen), device=ptr.device)
        by_dst = segments(place[ptr], (*self.edges[:, chosen], position))
        if backward:
            by_src, by_rel = (
                segments(pointers(key[order], size), (self._destination[order], other[order], place[order]))
                for key, other, order, size in (
                    (self.edges[0], self.edges[1], _among(self._by_source, kept), sources),
                    (self.edges[1], self.edges[0], _among(self._by_relation, kept), self.num_relations),
                )
            )
        else:
            nothing = (position[:0],) * 3
            by_src, by_rel = (segments(ptr.new_zeros(size + 1), nothing) for size in (sources, self.num_relations))
        return GraphLayout(sources, self.num_relations, by_dst, by_src, by_rel, position.int())

    @cached_property
    def _destination(self) -> Tensor:
        """[E] row that each edge goes to."""
        return torch.arange(self.counts[-1], device=self.ptr.device).repeat_interleave(self.ptr.diff())

    @cached_property
    def _by_source(self) -> Tensor:
        return torch.argsort(self.edges[0], stable=True)

    @cached_property
    def _by_relation(self) -> Tensor:
        return torch.argsort(self.edges[1], stable=True)


def _among(order: Tensor, kept: Tensor) -> Tensor:
    """The kept edges, in this order."""
    return order[kept[order]]


def active_rows(
    layout: GraphLayout, query: Tensor, node: Tensor, queries: int, layers: int, most: float = float("inf")
) -> ActiveRows | None:
    """Finds the rows within `layers` hops of the seeds, along the messages.

    Args:
        layout: The graph.
        query: [S] integer, query of each seed. Pairs may repeat.
        node: [S] integer, node of each seed.
        queries: B.
        layers: L.
        most: Gives up (returns None) once the active rows, summed over the layers, are more than this.

    Returns:
        The rows, or None.
    """
    N = layout.num_nodes
    device = layout.device
    place = torch.full((queries * N,), -1, dtype=torch.int64, device=device)  # row of (query, node), -1: not active
    new = torch.unique(query.long() * N + node.long())
    found, counts, total = [new], [len(new)], 0
    place[new] = torch.arange(len(new), device=device)
    out_ptr, out_dst = layout.by_src.ptr.long(), layout.by_src.edges[0]
    for _ in range(layers):
        reached, _ = _expand(new, out_ptr, out_dst, N)
        new = torch.unique(reached[place[reached] < 0])
        place[new] = torch.arange(len(new), device=device) + counts[-1]
        found.append(new)
        counts.append(counts[-1] + len(new))
        total += counts[-1]
        if total > most:
            return None
    rows = torch.cat(found)
    source, edge = _expand(rows, layout.by_dst.ptr.long(), layout.by_dst.edges[0], N)
    source = place[source]
    between = source >= 0
    running = torch.zeros(len(source) + 1, dtype=torch.int64, device=device)
    torch.cumsum(between, 0, out=running[1:])
    degree = layout.by_dst.ptr.diff().long()[rows % N]
    ptr = torch.zeros(len(rows) + 1, dtype=torch.int64, device=device)
    torch.cumsum(degree, 0, out=ptr[1:])
    edges = torch.stack([source[between], layout.by_dst.edges[1][edge[between]].long()])
    return ActiveRows(rows // N, rows % N, counts, running[ptr], edges, layout.num_relations)


def _expand(keys: Tensor, ptr: Tensor, other: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """For (query, node) keys [K], the keys at the other ends of the node's edges, and those edges' positions."""
    node = keys % N
    begin, degree = ptr[node], ptr[node + 1] - ptr[node]
    start = degree.cumsum(0) - degree
    edge = torch.arange(int(degree.sum()), device=keys.device) + (begin - start).repeat_interleave(degree)
    return (keys - node).repeat_interleave(degree) + other[edge], edge
