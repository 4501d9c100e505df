"""The static side of message passing: a graph's edges sorted three ways, with work lists, built once per graph.

Sorting is the expensive part that GFM-RAG v1 repeats in every call of every layer. Here the edges are sorted once
by destination (forward), by source (gradient of the node states) and by relation (gradient of the relation table),
as int32, and every kernel walks these arrays. Within a segment the order is canonical (relation, then the other end),
so that the order in which edges are given never changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

UNIT_EDGES = 64
"""Edges per work unit: runs of tiny rows are packed up to it, rows above it are split."""

MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Segments:
    """Edges sorted by one key, so that each segment (a row) is a contiguous range.

    Attributes:
        ptr: [S + 1] int32, edges of segment s are `ptr[s] : ptr[s + 1]`.
        edges: [3, E] int32 in this order; what the rows hold is said in `GraphLayout`.
        units: [U, 5] int32 work units (segment_begin, segment_end, edge_begin, edge_end, slot), most edges first.
            slot < 0: a run of whole segments with about `UNIT_EDGES` edges in all (or one with up to that many).
            slot >= 0: a slice of at most `UNIT_EDGES` edges of one heavy segment; `slot` places its partial sum.
        heavy: [H, 3] int32 (segment, slot_begin, slot_end): the partial sums that make up each split segment.
    """

    ptr: Tensor
    edges: Tensor
    units: Tensor
    heavy: Tensor

    @property
    def slots(self) -> int:
        """Number of partial sums, over all split segments."""
        return int(self.heavy[-1, 2]) if len(self.heavy) else 0


@dataclass(frozen=True)
class GraphLayout:
    """A graph of E edges `src --rel--> dst` on N nodes, laid out for the kernels. Messages flow from src to dst.

    Attributes:
        num_nodes: N.
        num_relations: R, number of relation ids (inverse relations included where the graph has them).
        by_dst: Segments per destination (N); edges = (src, rel, position). Position counts edges in this order.
        by_src: Segments per source (N); edges = (dst, rel, position in `by_dst`).
        by_rel: Segments per relation (R); edges = (dst, src, position in `by_dst`).
        order: [E] int32; the edge at position p of `by_dst` was given as edge `order[p]`.

    A layout may be rectangular: `num_dst` rows receive messages of N others.
    """

    num_nodes: int
    num_relations: int
    by_dst: Segments
    by_src: Segments
    by_rel: Segments
    order: Tensor

    @property
    def num_edges(self) -> int:
        return len(self.order)

    @property
    def num_dst(self) -> int:
        """Rows that receive messages (all N, for a graph)."""
        return len(self.by_dst.ptr) - 1

    @property
    def max_degree(self) -> int:
        """Largest number of edges into one node."""
        return int(self.by_dst.ptr.diff().max()) if self.num_dst else 0

    @property
    def device(self) -> torch.device:
        return self.order.device

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name (`by_dst.ptr`, ..., `order`), for saving."""
        out = {f"{part}.{f.name}": getattr(getattr(self, part), f.name) for part in PARTS for f in fields(Segments)}
        return {**out, "order": self.order}

    def flat(self) -> list[Tensor]:
        """The same tensors as a list, as the registered ops take them."""
        d, s, r = self.by_dst, self.by_src, self.by_rel
        return [
            *(d.ptr, d.edges, d.units, d.heavy),
            *(s.ptr, s.edges, s.units, s.heavy),
            *(r.ptr, r.edges, r.units, r.heavy),
            self.order,
        ]

    @classmethod
    def from_flat(cls, tensors: list[Tensor]) -> GraphLayout:
        """The layout that `flat()` came from, unchecked."""
        by_dst, by_src, by_rel = (Segments(*tensors[i : i + 4]) for i in (0, 4, 8))
        return cls(len(by_src.ptr) - 1, len(by_rel.ptr) - 1, by_dst, by_src, by_rel, tensors[12])

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], num_nodes: int, num_relations: int) -> GraphLayout:
        """The layout that `tensors()` came from.

        Raises:
            ValueError: A tensor is missing, or its size does not fit the others.
        """
        names = [f"{part}.{f.name}" for part in PARTS for f in fields(Segments)] + ["order"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the layout lacks {', '.join(missing)}")
        by_dst, by_src, by_rel = (Segments(*(tensors[f"{p}.{f.name}"] for f in fields(Segments))) for p in PARTS)
        edges = len(tensors["order"])
        sizes = (len(by_dst.ptr) - 1, num_nodes, num_relations)
        for part, segments, size in zip(PARTS, (by_dst, by_src, by_rel), sizes, strict=True):
            if len(segments.ptr) != size + 1 or segments.edges.shape != (3, edges):
                raise ValueError(
                    f"{part} has {len(segments.ptr) - 1} segments and edges {list(segments.edges.shape)}; expected "
                    f"{size} segments and edges [3, {edges}]"
                )
        return cls(num_nodes, num_relations, by_dst, by_src, by_rel, tensors["order"])

    def to(self, device: torch.device | str) -> GraphLayout:
        """The same layout on another device (itself if it is there already)."""
        device = torch.device(device)
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        by_dst, by_src, by_rel = (
            Segments(*(getattr(p, f.name).to(device) for f in fields(Segments))) for p in self.parts()
        )
        return GraphLayout(self.num_nodes, self.num_relations, by_dst, by_src, by_rel, self.order.to(device))

    def parts(self) -> tuple[Segments, Segments, Segments]:
        return self.by_dst, self.by_src, self.by_rel


PARTS = ("by_dst", "by_src", "by_rel")


def build_layout(
    dst: Tensor, src: Tensor, rel: Tensor, num_nodes: int, num_relations: int, num_dst: int | None = None
) -> GraphLayout:
    """Sorts a graph's edges for the kernels.

    Args:
        dst: [E] integer, node that each edge's message goes to (`edge_index[0]` of GFM-RAG's graphs: the head).
        src: [E] integer, node that it comes from (`edge_index[1]`: the tail).
        rel: [E] integer relation ids.
        num_nodes: N > every id in `dst` and `src`.
        num_relations: R > every id in `rel`.
        num_dst: Rows that can receive messages, where they are not the N nodes; None: N.

    Returns:
        The layout, on the device of the inputs.

    Raises:
        ValueError: Lengths differ, an id is out of range (the edge and the limit are named), or there are more edges
            than int32 can count.
    """
    num_dst = num_nodes if num_dst is None else num_dst
    for name, ids, limit in (("dst", dst, num_dst), ("src", src, num_nodes), ("rel", rel, num_relations)):
        if ids.ndim != 1 or len(ids) != len(dst):
            raise ValueError(f"{name} must be [E] with E = {len(dst)}, found {list(ids.shape)}")
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(f"{name} must hold integer ids, found {ids.dtype}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            edge = int(((ids < 0) | (ids >= limit)).nonzero()[0])
            raise ValueError(f"{name}[{edge}] is {int(ids[edge])}; ids must be in 0 ... {limit - 1}")
    if len(dst) > MAX_INT32 or num_nodes > MAX_INT32:
        raise ValueError(f"{len(dst)} edges on {num_nodes} nodes: more than int32 can count ({MAX_INT32})")
    dst, src, rel = dst.long(), src.long(), rel.long()
    order = _sort(dst, rel, src, (num_dst, num_relations, num_nodes))
    dst, src, rel = dst[order], src[order], rel[order]  # from here on, positions of by_dst
    position = torch.arange(len(dst), dtype=torch.int32, device=dst.device)
    by_dst = segments(pointers(dst, num_dst), (src, rel, position))
    p = _sort(src, rel, dst, (num_nodes, num_relations, num_dst))
    by_src = segments(pointers(src[p], num_nodes), (dst[p], rel[p], p))
    p = _sort(rel, dst, src, (num_relations, num_dst, num_nodes))
    by_rel = segments(pointers(rel[p], num_relations), (dst[p], src[p], p))
    return GraphLayout(num_nodes, num_relations, by_dst, by_src, by_rel, order.int())


def _sort(a: Tensor, b: Tensor, c: Tensor, limits: tuple[int, int, int]) -> Tensor:
    """[E] permutation that sorts by a, then b, then c, then the order given."""
    if max(limits[0], 1) * max(limits[1], 1) * max(limits[2], 1) < 2**63:
        return torch.argsort((a * limits[1] + b) * limits[2] + c, stable=True)
    order = torch.argsort(c, stable=True)
    for key in (b, a):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def pointers(key: Tensor, count: int) -> Tensor:
    """[count + 1] int64: where each id's run begins in `key`, [E] sorted ids below `count`."""
    ptr = torch.zeros(count + 1, dtype=torch.int64, device=key.device)
    torch.cumsum(torch.bincount(key, minlength=count), 0, out=ptr[1:])
    return ptr


def segments(ptr: Tensor, edges: Iterable[Tensor]) -> Segments:
    """Segments with their work lists, of edges (three [E] columns) that are sorted already."""
    return Segments(ptr.int(), torch.stack([e.int() for e in edges]), *work_lists(ptr))


def work_lists(ptr: Tensor, unit_edges: int = UNIT_EDGES) -> tuple[Tensor, Tensor]:
    """Cuts segments into units of about equal work.

    Args:
        ptr: [S + 1] integer, edges of segment s are `ptr[s] : ptr[s + 1]`.
        unit_edges: Most edges of a slice; a packed run has at most twice as many.

    Returns:
        `units` [U, 5] and `heavy` [H, 3], int32, as in `Segments`. Every segment is in exactly one run, or is split.
    """
    device = ptr.device
    ptr = ptr.long()
    degree = ptr.diff()  # [S]
    is_heavy = degree > unit_edges
    # Runs: neighbours whose work (edges, one for the row itself) starts in the same bucket; a split row ends a run.
    cost = torch.where(is_heavy, torch.zeros_like(degree), degree + 1)
    bucket = (cost.cumsum(0) - cost) // unit_edges + is_heavy.cumsum(0) * (int(cost.sum()) // unit_edges + 2)
    light = (~is_heavy).nonzero().squeeze(1)
    group = bucket[light]
    first = torch.ones(len(light), dtype=torch.bool, device=device)
    first[1:] = group[1:] != group[:-1]
    begin = light[first]
    last = torch.ones_like(first)
    last[:-1] = first[1:]
    end = light[last] + 1
    runs = torch.stack([begin, end, ptr[begin], ptr[end], torch.full_like(begin, -1)], 1)
    rows = is_heavy.nonzero().squeeze(1)
    pieces = (degree[rows] + unit_edges - 1) // unit_edges  # [H]
    slot_end = pieces.cumsum(0)
    slot = torch.arange(int(pieces.sum()), device=device)
    row = rows.repeat_interleave(pieces)
    piece = slot - (slot_end - pieces).repeat_interleave(pieces)
    edge_begin = ptr[row] + piece * unit_edges
    edge_end = torch.minimum(edge_begin + unit_edges, ptr[row + 1])
    slices = torch.stack([row, row + 1, edge_begin, edge_end, slot], 1)
    units = torch.cat([slices, runs])
    units = units[torch.argsort(units[:, 3] - units[:, 2], descending=True, stable=True)]
    heavy = torch.stack([rows, slot_end - pieces, slot_end], 1)
    return units.int().contiguous(), heavy.int().contiguous()


def kept_degree(layout: GraphLayout, keep: Tensor | None) -> Tensor:
    """[N] number of edges into each node that are kept, int64."""
    ptr = layout.by_dst.ptr.long()
    if keep is None:
        return ptr.diff()
    running = torch.zeros(len(keep) + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(keep, 0, out=running[1:])
    return running[ptr].diff()
