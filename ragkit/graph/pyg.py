"""To and from `torch_geometric.data.Data`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragkit.graph.names import Names
from ragkit.graph.parts import GraphParts
from ragkit.graph.report import GraphError, LoadReport
from ragkit.optional import require


def parts_from_pyg(data: Any, entities: Sequence[str] | None, relations: Sequence[str] | None) -> GraphParts:
    """See `KnowledgeGraph.from_pyg`."""
    if hasattr(data, "indices") and hasattr(data, "get"):  # a torch_geometric Dataset has all its graphs' edges in one
        if len(data) != 1:
            raise GraphError(f"a data set of {len(data)} graphs: give one of them, such as dataset[0]")
        data = data[0]
    if hasattr(data, "to_homogeneous"):
        data, entities, relations = _homogeneous(data, entities, relations)
    if not isinstance(getattr(data, "edge_index", None), Tensor):
        raise GraphError(f"expected a graph with edge_index, found {type(data).__name__}")
    index, kind, num_relations = _triples(data)
    named = getattr(data, "entity_names", None) if entities is None else entities
    num_entities = _count(data, index, named)
    named_relations = getattr(data, "relation_names", None) if relations is None else relations
    if named_relations is not None and len(named_relations) != num_relations:
        if len(named_relations) < num_relations or int(kind.max(initial=-1)) >= len(named_relations):
            raise GraphError(f"{len(named_relations)} relation names for {num_relations} relations")
        num_relations = len(named_relations)
    report = LoadReport(f"the {type(data).__name__} graph", unit="row", rows=index.shape[1])
    return GraphParts(
        _names(named, num_entities, "entity"),
        _names(named_relations, num_relations, "relation"),
        index[0],
        kind,
        index[1],
        report=report,
    )


def _triples(data: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """([2, T] ids, [T] relation ids, R) without the inverse edges, where the graph is seen to have them."""
    given = getattr(data, "num_relations", None)
    given = None if given is None else int(given)
    target = getattr(data, "target_edge_index", None)
    if isinstance(target, Tensor) and isinstance(getattr(data, "target_edge_type", None), Tensor):
        index, kind = _index(target, "target_edge_index"), _kind(data.target_edge_type, target, "target_edge_type")
        if given is None or given % 2:
            raise GraphError(f"a graph with target_edge_index has an even num_relations (2R), found {given}")
        return index, kind, given // 2
    index = _index(data.edge_index, "edge_index")
    if not isinstance(getattr(data, "edge_type", None), Tensor):
        return index, np.zeros(index.shape[1], np.int64), 1
    kind = _kind(data.edge_type, data.edge_index, "edge_type")
    half = len(kind) // 2
    if half and len(kind) % 2 == 0:
        shift = int(kind[half] - kind[0]) if given is None else given // 2
        fits = shift > int(kind[:half].max()) and (given is None or given == 2 * shift)
        if fits and (index[:, half:] == index[::-1, :half]).all() and (kind[half:] == kind[:half] + shift).all():
            return index[:, :half], kind[:half], shift
    found = int(kind.max(initial=-1)) + 1
    if given is not None and given < found:
        raise GraphError(f"edge_type holds the id {found - 1}, but num_relations is {given}")
    return index, kind, found if given is None else given


def _index(index: Tensor, name: str) -> np.ndarray:
    if index.ndim != 2 or len(index) != 2 or index.is_floating_point() or index.dtype == torch.bool:
        raise GraphError(f"{name}: expected [2, E] integer ids, found {index.dtype} {list(index.shape)}")
    return index.detach().cpu().numpy()


def _kind(kind: Tensor, index: Tensor, name: str) -> np.ndarray:
    if kind.ndim == 2 and kind.shape[1] == 1:
        kind = kind.squeeze(1)  # [E, 1] -> [E]
    if kind.ndim != 1 or len(kind) != index.shape[1] or kind.is_floating_point() or kind.dtype == torch.bool:
        raise GraphError(
            f"{name}: expected [{index.shape[1]}] integer ids, one an edge, found {kind.dtype} {list(kind.shape)}"
        )
    return kind.detach().cpu().numpy()


def _count(data: Any, index: np.ndarray, names: Sequence[str] | None) -> int:
    least = int(index.max(initial=-1)) + 1
    given = getattr(data, "num_nodes", None)
    count = int(given) if given is not None else len(names) if names is not None else least
    if names is not None and len(names) != count:
        raise GraphError(f"{len(names)} entity names for {count} nodes")
    return count


def _names(given: Sequence[str] | None, count: int, what: str) -> Names:
    if given is None:
        return Names((f"{what} {number}" for number in range(count)), what)
    return given if isinstance(given, Names) else Names(given, what)


def _homogeneous(
    data: Any, entities: Sequence[str] | None, relations: Sequence[str] | None
) -> tuple[Any, Sequence[str], Sequence[str]]:
    """A HeteroData as one graph; nodes are called "author 0", relations by their name or by the whole edge type."""
    flat = data.to_homogeneous(add_node_type=True, add_edge_type=True)
    if entities is None:
        entities = [f"{kind} {i}" for kind in data.node_types for i in range(data[kind].num_nodes)]
    if relations is None:
        middle = [kind[1] for kind in data.edge_types]
        relations = middle if len(set(middle)) == len(middle) else [" ".join(kind) for kind in data.edge_types]
    return flat, entities, relations


def to_pyg(parts: GraphParts, edge_index: Tensor, edge_type: Tensor, rel_emb: Tensor | None, names: bool) -> Any:
    """See `KnowledgeGraph.to_pyg`."""
    half = len(parts.head)
    data = require("torch_geometric.data", "pyg").Data(
        edge_index=edge_index,
        edge_type=edge_type,
        num_nodes=len(parts.entities),
        target_edge_index=edge_index[:, :half],
        target_edge_type=edge_type[:half],
        num_relations=2 * len(parts.relations),
    )
    if rel_emb is not None:
        data.rel_emb = rel_emb
    if names:
        data.entity_names, data.relation_names = list(parts.entities), list(parts.relations)
    return data
