"""What a graph is like, in numbers."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np

from ragkit.graph.parts import GraphParts
from ragkit.tables import html_table, text_table

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
TOP = 10
NAME_WIDTH = 60


@dataclass(frozen=True)
class GraphInfo:
    """Counts and shapes of a graph.

    Attributes:
        entities: N.
        relations: R, inverse relations not counted.
        triples: T.
        documents: Number of documents.
        links: Number of (document, entity) pairs.
        isolated: Entities in no triple.
        repeated: Triples that stand there more than once, each further copy counted.
        loops: Triples whose head is their tail.
        degree_quantiles: Quantile -> degree. The degree of an entity is the number of triple ends that are on it.
        entities_per_document: Quantile -> number of entities of a document; empty where there are no documents.
        top_relations: (name, number of triples) of the most frequent relations.
        largest_relation_share: Share of all triples that have the most frequent relation; nan without triples.
        undocumented: Entities that no document tells of.
    """

    entities: int
    relations: int
    triples: int
    documents: int
    links: int
    isolated: int
    repeated: int
    loops: int
    degree_quantiles: dict[float, int]
    entities_per_document: dict[float, int]
    top_relations: list[tuple[str, int]]
    largest_relation_share: float
    undocumented: int

    def counts(self) -> list[tuple[str, str]]:
        """(name, count) of everything that is one number."""
        rows = {
            "entities": self.entities,
            "relations": self.relations,
            "triples": self.triples,
            "documents": self.documents,
            "links between documents and entities": self.links,
            "entities in no triple": self.isolated,
            "triples that repeat another": self.repeated,
            "triples from an entity to itself": self.loops,
        }
        if self.documents:
            rows["entities in no document"] = self.undocumented
        return [(name, f"{count:,}") for name, count in rows.items()]

    def _tables(self) -> list[list[tuple[str, ...]]]:
        tables: list[list[tuple[str, ...]]] = [[("graph", "count"), *self.counts()]]
        head = ("", *(_quantile_name(q) for q in QUANTILES))
        spread = [("degree of an entity", *(f"{v:,}" for v in self.degree_quantiles.values()))]
        if self.entities_per_document:
            spread.append(("entities of a document", *(f"{v:,}" for v in self.entities_per_document.values())))
        if self.degree_quantiles:
            tables.append([head, *spread])
        if self.top_relations:
            rows = [(_shorten(n), f"{c:,}", f"{100 * c / self.triples:.1f} %") for n, c in self.top_relations]
            tables.append([("most frequent relations", "triples", "share"), *rows])
        return tables

    def __str__(self) -> str:
        return "\n\n".join(text_table(table) for table in self._tables())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(html_table(table) for table in self._tables())


def graph_info(parts: GraphParts) -> GraphInfo:
    """Counts one graph; some seconds for 15 million triples."""
    n, r = len(parts.entities), len(parts.relations)
    degree = np.bincount(parts.head, minlength=n) + np.bincount(parts.tail, minlength=n)
    uses = np.bincount(parts.relation, minlength=r)
    top = np.argsort(-uses, kind="stable")[:TOP]
    per_document = np.diff(parts.documents.ptr)
    documented = np.zeros(n, bool)
    documented[parts.documents.entities] = True
    return GraphInfo(
        entities=n,
        relations=r,
        triples=len(parts.head),
        documents=len(parts.documents.names),
        links=len(parts.documents.entities),
        isolated=int((degree == 0).sum()),
        repeated=_repeated(parts),
        loops=int((parts.head == parts.tail).sum()),
        degree_quantiles=_quantiles(degree),
        entities_per_document=_quantiles(per_document),
        top_relations=[(parts.relations[int(i)], int(uses[i])) for i in top if uses[i]],
        largest_relation_share=float(uses.max() / len(parts.head)) if len(parts.head) else float("nan"),
        undocumented=int((~documented).sum()),
    )


def _repeated(parts: GraphParts) -> int:
    pair = parts.head.astype(np.int64) << 32 | parts.tail.astype(np.int64)
    order = np.lexsort((parts.relation, pair))
    pair, relation = pair[order], parts.relation[order]
    return int(((pair[1:] == pair[:-1]) & (relation[1:] == relation[:-1])).sum())


def _quantiles(values: np.ndarray) -> dict[float, int]:
    """Quantile -> the value at that place (no averages: a degree is a whole number)."""
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return {q: int(value) for q, value in zip(QUANTILES, found, strict=True)}


def _quantile_name(q: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{100 * q:.0f} %")


def _shorten(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[:NAME_WIDTH]}..."


def graph_html(parts: GraphParts) -> str:
    """The graph at a glance: counts, its first triples, and what the loader could not use.

    Plain tables without colours of their own, so that the notebook's theme decides them.
    """
    n = len(parts.entities)
    degree = np.bincount(parts.head, minlength=n) + np.bincount(parts.tail, minlength=n)
    counts = [
        ("entities", f"{n:,}"),
        ("relations", f"{len(parts.relations):,}"),
        ("triples", f"{len(parts.head):,}"),
        ("documents", f"{len(parts.documents.names):,}"),
        ("median degree", f"{int(np.median(degree)) if n else 0:,}"),
        ("entities in no triple", f"{int((degree == 0).sum()):,}"),
    ]
    first = range(min(5, len(parts.head)))
    rows = [
        (
            _shorten(parts.entities[int(parts.head[i])]),
            _shorten(parts.relations[int(parts.relation[i])]),
            _shorten(parts.entities[int(parts.tail[i])]),
        )
        for i in first
    ]
    shown = html_table([("KnowledgeGraph", ""), *counts])
    if rows:
        shown += html_table([("head", "relation", "tail"), *rows], "The first triples; .info() says more.")
    if not parts.report.ok:
        shown += f"<p>{html.escape(parts.report.summary())}</p>"
    return f'<div class="ragkit-graph">{shown}</div>'
