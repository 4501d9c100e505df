"""Names of a graph's entities, relations and documents, and the ids behind names that a user gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ragkit.gfm.graph_view import view_of
from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.names import Names


class GraphNames:
    """Names of a graph; a PyG graph without names has numbered ones.

    Args:
        graph: `KnowledgeGraph`, or PyG `Data` with or without `entity_names` and `relation_names`.

    Attributes:
        entities: N names.
        relations: Names of the relations, without the inverse ones.
        documents: Names of the documents; empty for a PyG graph.
        half: Edges of type r >= half are the inverses of those of type r - half.

    Raises:
        GraphError: The graph has another number of names than of entities or relations, or equal or blank names.
    """

    def __init__(self, graph: Any) -> None:
        if isinstance(graph, KnowledgeGraph):
            self.entities, self.relations, self.documents = graph.entities, graph.relations, graph.documents
            self.half = graph.num_relations
            return
        view = view_of(graph)
        R = view.num_relations
        self.half = R // 2 if _doubled(graph, R) else R
        self.documents = Names((), "document")
        self.entities = _names(getattr(graph, "entity_names", None), view.num_nodes, "entity")
        given = getattr(graph, "relation_names", None)
        self.relations = _names(list(given)[: self.half] if given is not None else None, self.half, "relation")

    def entity(self, given: Any, what: str) -> int:
        """An entity's id.

        Args:
            given: Name or id.
            what: What it is, for messages.

        Raises:
            GraphError: No entity has that name; the nearest is named.
            ValueError: An id out of range.
        """
        if not isinstance(given, str):
            return _number(given, len(self.entities), what)
        place = self.entities.find(given)
        if place < 0:
            raise GraphError(f"{what}: the graph has no entity {given!r}{self.entities.hint(given)}")
        return place

    def target(self, given: Any, kind: str) -> tuple[str, int, str]:
        """What an explanation is about.

        Args:
            given: Name of an entity or a document, or number of the one that `kind` says (an entity for "auto").
            kind: "entity", "document" or "auto", what has that name.

        Returns:
            "entity" or "document", its number, and its name.

        Raises:
            GraphError: No such name (the nearest is named), or both have it, or there are no documents.
            ValueError: Another kind, or a number out of range.
        """
        if kind not in ("auto", "entity", "document"):
            raise ValueError(f'target_kind: expected "auto", "entity" or "document", found {kind!r}')
        if kind == "document" and not len(self.documents):
            raise GraphError("target: the graph has no documents; give it some, or explain an entity's score")
        if not isinstance(given, str):
            kind = "entity" if kind == "auto" else kind
            names = self.documents if kind == "document" else self.entities
            number = _number(given, len(names), "target")
            return kind, number, names[number]
        kinds = {"entity": self.entities, "document": self.documents}
        looked = {name: names for name, names in kinds.items() if kind in ("auto", name)}
        found = {name: place for name, names in looked.items() if (place := names.find(given)) >= 0}
        if len(found) == 2:
            raise GraphError(f"target: {given!r} is an entity and a document; say target_kind='entity' or 'document'")
        for name, place in found.items():
            return name, place, given
        hint = next((hint for names in looked.values() if (hint := names.hint(given))), "")
        raise GraphError(f"target: the graph has no {' or '.join(looked)} {given!r}{hint}")


def _names(given: Iterable[str] | None, count: int, what: str) -> Names:
    if given is None:
        return Names((f"{what} {number}" for number in range(count)), what)
    names = given if isinstance(given, Names) else Names(given, what)
    if len(names) != count:
        raise GraphError(f"{what}_names: {len(names)} names, expected {count}")
    return names


def _number(given: Any, size: int, what: str) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__") or not 0 <= int(given) < size:
        raise ValueError(f"{what}: expected a name or an id in 0 ... {size - 1}, found {given!r}")
    return int(given)


def _doubled(graph: Any, R: int) -> bool:
    """Whether the second half of the edges are the first half's inverses, as in GFM-RAG's graphs."""
    index, kind = graph.edge_index, graph.edge_type
    half = index.shape[1] // 2
    if R % 2 or index.shape[1] % 2:
        return False
    return torch.equal(index[:, half:], index[:, :half].flip(0)) and torch.equal(kind[half:], kind[:half] + R // 2)
