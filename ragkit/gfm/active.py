"""Which rows a query changes, and the small graph on which only those are computed.

With a zero boundary the whole network knows nothing of the query: that is the background, one state per node and layer.
A query adds its boundary at its seeds, and a message travels one edge per layer, so after layer l its states differ from
the background only within l hops of the seeds. Those are its active rows; all others are the background's. The split is
exact, and on graphs that come from text (most nodes have one or two neighbours) it leaves a tenth of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from ragkit_kernels.relational_conv.layout import GraphLayout, Segments, work_lists
from torch import Tensor


@dataclass(frozen=True)
class ActiveRows:
    """The rows that B queries change within L layers, and the edges into them.

    A row is a pair (query, node). Rows are sorted by hop: seeds first, then what is one edge away, and so on, so that
    the rows to compute at layer l are the first `counts[l]`; the halo, which is never computed but sends messages, is
    last.

    Attributes:
        query: [M] int64 query of each row, `node` [M] int64 its node.
        counts: L + 1 numbers: rows within l hops.
        ptr: [counts[L] + 1] int64; the edges into row r are `ptr[r] : ptr[r + 1]` of `edges`.
        edges: [2, E] int64 (source row, relation), each row's in the order of the whole graph's layout.
        num_relations: R.
    """

    query: Tensor
    node: Tensor
    counts: list[int]
    ptr: Tensor
    edges: Tensor
    num_relations: int

    @property
    def num_layers(self) -> int:
        return len(self.counts) - 1

    @cached_property
    def needed(self) -> list[int]:
        """L numbers: at layer l + 1, the states of the first `needed[l]` rows are read."""
        out = []
        for count in self.counts[1:]:
            sources = self.edges[0, : int(self.ptr[count])]
            out.append(max(count, int(sources.max()) + 1 if len(sources) else 0))
        return out

    def layout(self, layer: int, backward: bool) -> GraphLayout:
        """The rectangular graph of layer `layer` (1 ... L): `counts[layer]` rows hear `needed[layer - 1]` rows.

        Args:
            layer: Which layer.
            backward: Whether gradients are wanted; without them the sorted copies that they need are left empty.
        """
        rows, sources = self.counts[layer], self.needed[layer - 1]
        ptr = self.ptr[: rows + 1]
        count = int(ptr[-1])
        position = torch.arange(count, device=ptr.device)
        edges = torch.cat([self.edges[:, :count], position[None]])  # [3, E_l]
        by_dst = Segments(ptr.int(), edges.int(), *work_lists(ptr))
        if backward:
            by_src = self._filtered(*self._by_source, sources, count)
            by_rel = self._filtered(*self._by_relation, self.num_relations, count)
        else:
            nothing = ptr.new_empty(3, 0)
            by_src, by_rel = (_segments(ptr.new_zeros(n), nothing) for n in (sources, self.num_relations))
        return GraphLayout(sources, self.num_relations, by_dst, by_src, by_rel, position.int())

    @cached_property
    def _destination(self) -> Tensor:
        """[E] row that each edge goes to."""
        return torch.arange(self.counts[-1], device=self.ptr.device).repeat_interleave(self.ptr.diff())

    @cached_property
    def _by_source(self) -> tuple[Tensor, Tensor]:
        """Edges sorted by source: key [E] and (dst, rel, position) [3, E]."""
        order = torch.argsort(self.edges[0], stable=True)
        return self.edges[0, order], torch.stack([self._destination[order], self.edges[1, order], order])

    @cached_property
    def _by_relation(self) -> tuple[Tensor, Tensor]:
        """Edges sorted by relation: key [E] and (dst, src, position) [3, E]."""
        order = torch.argsort(self.edges[1], stable=True)
        return self.edges[1, order], torch.stack([self._destination[order], self.edges[0, order], order])

    @staticmethod
    def _filtered(key: Tensor, edges: Tensor, segments: int, count: int) -> Segments:
        """The sorted edges whose position is below `count`, in their order."""
        kept = edges[2] < count
        return _segments(torch.bincount(key[kept], minlength=segments), edges[:, kept])


def _segments(degree: Tensor, edges: Tensor) -> Segments:
    ptr = degree.new_zeros(len(degree) + 1)
    torch.cumsum(degree, 0, out=ptr[1:])
    return Segments(ptr.int(), edges.int(), *work_lists(ptr))


def active_rows(
    layout: GraphLayout, query: Tensor, node: Tensor, queries: int, layers: int, most: float = float("inf")
) -> ActiveRows | None:
    """Finds the rows within `layers` hops of the seeds, along the messages.

    Args:
        layout: The graph.
        query: [S] integer, query of each seed; `node` [S] integer, its node. Pairs may repeat.
        queries: B.
        layers: L.
        most: Gives up (returns None) once the rows to compute, summed over the layers, are more than this.

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
        reached = reached[place[reached] < 0]
        new = torch.unique(reached)
        place[new] = torch.arange(len(new), device=device) + counts[-1]
        found.append(new)
        counts.append(counts[-1] + len(new))
        total += counts[-1]
        if total > most:
            return None
    rows = torch.cat(found)
    source, edge = _expand(rows, layout.by_dst.ptr.long(), layout.by_dst.edges[0], N)
    halo = torch.unique(source[place[source] < 0])
    place[halo] = torch.arange(len(halo), device=device) + len(rows)
    node_of = rows % N
    degree = layout.by_dst.ptr.diff().long()[node_of]
    ptr = degree.new_zeros(len(rows) + 1)
    torch.cumsum(degree, 0, out=ptr[1:])
    edges = torch.stack([place[source], layout.by_dst.edges[1][edge].long()])
    every = torch.cat([rows, halo])
    return ActiveRows(every // N, every % N, counts, ptr, edges, layout.num_relations)


def _expand(keys: Tensor, ptr: Tensor, other: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """For (query, node) keys [K], the keys at the other ends of the node's edges, and those edges' positions."""
    node = keys % N
    begin, degree = ptr[node], ptr[node + 1] - ptr[node]
    start = degree.cumsum(0) - degree
    edge = torch.arange(int(degree.sum()), device=keys.device) + (begin - start).repeat_interleave(degree)
    return (keys - node).repeat_interleave(degree) + other[edge], edge
