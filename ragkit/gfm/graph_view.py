"""A graph as the model walks it: layout and relation embeddings, checked once and kept as long as the graph."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from ragkit_kernels.relational_conv import GraphLayout, build_layout
from torch import Tensor

from ragkit.gfm.easy_edges import EdgeIndex
from ragkit.graph import GraphError, KnowledgeGraph


class Stamp:
    """Tells whether a tensor is still the one that was seen, with the same numbers in it.

    A tensor made in inference mode counts no changes; its stamp never fits, so what depends on it is made anew.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._ref = weakref.ref(tensor)
        self._state = None if tensor.is_inference() else (tensor._version, tensor.data_ptr())

    @property
    def alive(self) -> bool:
        """Whether the tensor still exists."""
        return self._ref() is not None

    def fits(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is that tensor, unchanged."""
        if tensor is None or self._state is None or self._ref() is not tensor:
            return False
        return self._state == (tensor._version, tensor.data_ptr())


class GraphView:
    """What the model needs of one graph.

    Attributes:
        num_nodes: N.
        num_relations: R, inverse relations included.
    """

    def __init__(self, layout: GraphLayout, stamps: tuple[Stamp, ...] = ()) -> None:
        self.num_nodes, self.num_relations = layout.num_nodes, layout.num_relations
        self.stamps = stamps
        self._layouts = {layout.device: layout}
        self._edges: dict[torch.device, EdgeIndex] = {}
        self._checked: Stamp | None = None

    def layout(self, device: torch.device) -> GraphLayout:
        """The layout on a device; moved there once."""
        if device not in self._layouts:
            self._layouts[device] = next(iter(self._layouts.values())).to(device)
        return self._layouts[device]

    def edges(self, device: torch.device) -> EdgeIndex:
        """The look-up of edges by (head, relation, tail); made once for a device."""
        if device not in self._edges:
            self._edges[device] = EdgeIndex(self.layout(device))
        return self._edges[device]

    def check_rel_emb(self, rel_emb: Any, width: int) -> Tensor:
        """The graph's [R, F] relation embeddings, if they are right.

        Raises:
            GraphError: They are missing, no floats, of another size than R × `width`, or hold NaN or infinity.
        """
        if not isinstance(rel_emb, Tensor):
            raise GraphError(
                "the graph has no relation embeddings; set graph.rel_emb "
                f"([{self.num_relations}, {width}]), for example with ragkit.gfm.embed_relations(graph, encoder)"
            )
        if rel_emb.ndim != 2 or len(rel_emb) != self.num_relations or not rel_emb.is_floating_point():
            raise GraphError(
                f"rel_emb is {rel_emb.dtype} {list(rel_emb.shape)}, expected floats [{self.num_relations}, {width}]: "
                "a row for each relation, inverse relations included"
            )
        if rel_emb.shape[1] != width:
            raise GraphError(
                f"rel_emb: the encoder gives {rel_emb.shape[1]} numbers for a text, the model wants {width}; embed "
                "the relations with the encoder that the model was trained with"
            )
        if self._checked is None or not self._checked.fits(rel_emb):
            bad = ~torch.isfinite(rel_emb).all(1)
            if bad.any():
                raise GraphError(
                    f"rel_emb: {int(bad.sum())} of {len(rel_emb)} rows hold NaN or infinity "
                    f"(first: row {int(bad.nonzero()[0])})"
                )
            self._checked = Stamp(rel_emb)
        return rel_emb


_views: dict[int, tuple[weakref.ref[Any], GraphView]] = {}


def view_of(graph: Any) -> GraphView:
    """The graph's view; made once, and again only if a PyG graph's edges have changed.

    Args:
        graph: `KnowledgeGraph`, or anything with the attributes of GFM-RAG's PyG `Data`: edge_index [2, E] (messages
            go from `edge_index[1]` to `edge_index[0]`), edge_type [E], num_nodes, num_relations.

    Raises:
        GraphError: A field is missing, or an id is out of range.
    """
    key = id(graph)
    ref, view = _views.get(key, (None, None))
    if view is not None and ref is not None and ref() is graph and _unchanged(view, graph):
        return view
    view = GraphView(graph.layout) if isinstance(graph, KnowledgeGraph) else _from_data(graph)
    _views[key] = (weakref.ref(graph, lambda _: _views.pop(key, None)), view)
    return view


def _unchanged(view: GraphView, graph: Any) -> bool:
    if isinstance(graph, KnowledgeGraph):
        return True
    if (view.num_nodes, view.num_relations) != (graph.num_nodes, int(graph.num_relations)):
        return False
    return all(stamp.fits(t) for stamp, t in zip(view.stamps, (graph.edge_index, graph.edge_type), strict=True))


def _from_data(data: Any) -> GraphView:
    wanted = ("edge_index", "edge_type", "num_nodes", "num_relations")
    missing = [name for name in wanted if getattr(data, name, None) is None]
    if missing:
        raise GraphError(
            f"the {type(data).__name__} has no {', '.join(missing)}; the model takes a KnowledgeGraph, or a graph "
            f"with {', '.join(wanted)} and rel_emb"
        )
    index, kind = data.edge_index, data.edge_type
    if index.ndim != 2 or len(index) != 2 or kind.shape != index.shape[1:]:
        raise GraphError(
            f"edge_index must be [2, E] and edge_type [E], found {list(index.shape)} and {list(kind.shape)}"
        )
    N, R = int(data.num_nodes), int(data.num_relations)
    for name, ids, limit, count in (
        ("edge_index[0]", index[0], N, "num_nodes"),
        ("edge_index[1]", index[1], N, "num_nodes"),
        ("edge_type", kind, R, "num_relations"),
    ):
        wrong = (ids < 0) | (ids >= limit)
        if wrong.any():
            edge = int(wrong.nonzero()[0])
            raise GraphError(f"{name}, edge {edge}: id {int(ids[edge])} is out of range for {count} = {limit}")
    return GraphView(build_layout(index[0], index[1], kind, N, R), (Stamp(index), Stamp(kind)))
