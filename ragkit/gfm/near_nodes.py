"""Which nodes and edges of a graph a picture of a question's neighbourhood shows: few, connected, the best first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragkit.gfm.graph_view import view_of
from ragkit.gfm.paths import Explanation
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights, rank
from ragkit.gfm.text_encoder import encode
from ragkit.graph import KnowledgeGraph

if TYPE_CHECKING:
    from ragkit.gfm.retriever import GFMRetriever

SHOWN_DOCUMENTS = 3  # of a node, by name
ORDER = ("question", "answer", "path", "other")


@dataclass(frozen=True)
class NearNode:
    """One entity.

    Attributes:
        number: Its place in the picture's tables, from 1.
        id, name: As in the graph.
        role: "question" (named by the question), "answer" (what was scored, or an entity of the document that was),
            "path" (on a path between them) or "other".
        score: The model's logit, or None.
        rank: Its place among all entities by score, from 1; equal scores share the first place. None without scores.
        degree: Triples that it is in.
        num_documents: Documents that tell of it, and `documents`, the first of them.
        distance: Hops from the nearest of the question's entities; None for more than were looked for.
        paths: Numbers of the paths that it is on.
    """

    number: int
    id: int
    name: str
    role: str
    score: float | None
    rank: int | None
    degree: int
    num_documents: int
    documents: tuple[str, ...]
    distance: int | None
    paths: tuple[int, ...] = ()


@dataclass(frozen=True)
class NearEdge:
    """All triples with this head and this tail.

    Attributes:
        head, tail: Ids of the entities.
        relations: Names, each once.
        paths: Numbers of the paths that take it, from 1.
        path_relations: Those of the relations that they take.
        gradient: What all these triples add to the target's score, to first order; None without an explanation.
    """

    head: int
    tail: int
    relations: tuple[str, ...]
    paths: tuple[int, ...] = ()
    path_relations: tuple[str, ...] = ()
    gradient: float | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of one question.

    Attributes:
        question: Its text.
        starts: Ids of its entities.
        embedding: [F] of the question.
        logits: [N] float64.
        entities: (rank, name, logit) of the best entities.
        documents: (rank, id, score) of the best documents.
        best_other: Id of the best entity that the question does not name, or None.
        entities_weight: [N] weights of the question's entities, or None.
    """

    question: str
    starts: list[int]
    embedding: Tensor
    logits: np.ndarray
    entities: tuple[tuple[int, str, float], ...]
    documents: tuple[tuple[int, str, float], ...]
    best_other: int | None
    entities_weight: Tensor | None


def question_scores(retriever: GFMRetriever, question: str, starts: Sequence[int], best: int) -> Scores:
    """Scores all entities and documents for one question, as the retriever does.

    Args:
        retriever: Its model, graph, encoder, ranker and passages are used.
        question: The text.
        starts: Ids of its entities, at least one.
        best: Entities and documents to name.

    Raises:
        ValueError: A score is not a number.
    """
    graph = retriever.graph
    weights = entity_weights(graph) if retriever.init_entities_weight else None
    with torch.no_grad():
        embedding = encode(retriever.encoder, [question], "query")  # [1, F]
        logits = retriever.model(graph, embedding, [list(starts)], weights).float().cpu()  # [1, N]
        if logits.isnan().any():
            raise ValueError("the model's scores are not numbers (NaN); its training went wrong, take another one")
        values, ids = rank(logits, min(graph.num_entities, max(best, len(starts) + 1)))
        ranked = list(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        documents: list[tuple[int, str, float]] = []
        if best:
            ranker = RANKERS[retriever.ranker]
            scores = retriever.store.columns(ranker(logits, Incidence.of(graph), **retriever.ranker_options))  # [1, U]
            top, columns = rank(scores, best)
            for place, (column, score) in enumerate(zip(columns[0].tolist(), top[0].tolist(), strict=True), 1):
                documents.append((place, retriever.store.of_column(column).id, score))
    return Scores(
        question=question,
        starts=list(starts),
        embedding=embedding[0],
        logits=logits[0].double().numpy(),
        entities=tuple((place, graph.entities[i], score) for place, (i, score) in enumerate(ranked[:best], 1)),
        documents=tuple(documents),
        best_other=next((i for i, _ in ranked if i not in set(starts)), None),
        entities_weight=weights,
    )


@dataclass(frozen=True)
class Picked:
    """What is shown; see `Neighbourhood`."""

    nodes: tuple[NearNode, ...]
    edges: tuple[NearEdge, ...]
    paths: tuple[int, ...]
    left_out: int
    missing_starts: int


def pick(
    graph: KnowledgeGraph,
    starts: Sequence[int],
    scores: Scores | None,
    explanation: Explanation | None,
    hops: int,
    max_nodes: int,
) -> Picked:
    """Chooses at most `max_nodes` nodes, and what is between them.

    Args:
        graph: The graph.
        starts: Ids of the question's entities.
        scores: What decides between nodes; None: the distance from `starts`, then the number of triples.
        explanation: Its paths and its target come before all but `starts`.
        hops: Most hops from `starts` of a node that comes by its score.
        max_nodes: Most nodes.
    """
    near = _Near(graph, starts, hops)
    wanted = {} if explanation is None else explanation.target_entities
    goal = next(iter(wanted)) if explanation is not None and explanation.target_kind == "entity" else None
    room = max_nodes if goal is None or goal in starts else max(1, max_nodes - 1)
    chosen = dict.fromkeys(list(starts)[:room])
    missing = len(starts) - len(chosen)
    if goal is not None and len(chosen) < max_nodes:
        chosen[goal] = None
    drawn, on_paths = [], dict[int, list[int]]()
    for number, path in enumerate(explanation.paths if explanation is not None else (), 1):
        ids = [path.steps[0].start[0], *(step.end[0] for step in path.steps)]
        if len(chosen.keys() | set(ids)) <= max_nodes:
            chosen.update(dict.fromkeys(ids))
            drawn.append(number)
            for i in ids:
                on_paths.setdefault(i, []).append(number)
    best = [] if scores is None else [graph.entities.index(name) for _, name, _ in scores.entities]
    for i in [*wanted, *best]:
        if len(chosen) < max_nodes:
            chosen[i] = None
    near.grow(chosen, max_nodes, None if scores is None else scores.logits)
    roles = {i: _role(i, starts, wanted, on_paths) for i in chosen}
    order = sorted(chosen, key=lambda i: ORDER.index(roles[i]))  # stable: as they were chosen
    edges = _edges(graph, order, explanation, drawn)
    told = _documents(graph, order)
    ascending = None if scores is None else np.sort(scores.logits)
    nodes = []
    for number, i in enumerate(order, 1):
        score = None if scores is None else float(scores.logits[i])
        place = None
        if ascending is not None and score is not None:
            place = 1 + len(ascending) - int(np.searchsorted(ascending, score, side="right"))
        names = told.get(i, [])
        nodes.append(
            NearNode(
                number=number,
                id=i,
                name=graph.entities[i],
                role=roles[i],
                score=score,
                rank=place,
                degree=near.degree(i),
                num_documents=len(names),
                documents=tuple(graph.documents[d] for d in names[:SHOWN_DOCUMENTS]),
                distance=int(near.distance[i]) if near.distance[i] <= hops else None,
                paths=tuple(on_paths.get(i, ())),
            )
        )
    within = int(np.count_nonzero(near.distance <= hops))
    left_out = within - sum(node.distance is not None for node in nodes)
    return Picked(tuple(nodes), tuple(edges), tuple(drawn), left_out, missing)


def _role(i: int, starts: Sequence[int], wanted: Iterable[int], on_paths: dict[int, list[int]]) -> str:
    return "question" if i in starts else "answer" if i in wanted else "path" if i in on_paths else "other"


class _Near:
    """Neighbours in both ways along the triples, and distances from some nodes."""

    def __init__(self, graph: KnowledgeGraph, starts: Sequence[int], hops: int) -> None:
        by_src = view_of(graph).layout(torch.device("cpu")).by_src  # each triple both ways, so these are all edges
        self.ptr, self.dst = by_src.ptr.numpy(), by_src.edges[0].numpy()
        self.hops = hops
        self.distance = np.full(graph.num_entities, hops + 1, np.int32)
        self.distance[list(starts)] = 0
        front = np.unique(np.asarray(starts, np.int64))
        for step in range(1, hops + 1):
            reached = self._around(front)
            front = np.unique(reached[self.distance[reached] > step])
            self.distance[front] = step

    def _around(self, nodes: np.ndarray) -> np.ndarray:
        """The neighbours of all these nodes, one after the other."""
        begin, count = self.ptr[nodes].astype(np.int64), np.diff(self.ptr)[nodes].astype(np.int64)
        before = np.cumsum(count) - count  # places that earlier nodes take
        return self.dst[np.repeat(begin - before, count) + np.arange(int(count.sum()))]

    def degree(self, i: int) -> int:
        """Triples that a node is in; one with itself at both ends counts twice."""
        return int(self.ptr[i + 1]) - int(self.ptr[i])

    def grow(self, chosen: dict[int, Any], most: int, logits: np.ndarray | None) -> None:
        """Adds the best neighbour of what is there, again and again.

        Of a node's neighbours only the `most` best are ever looked at: no more can be added.
        """
        heap: list[tuple[float, int, int]] = []

        def look(i: int) -> None:
            near = np.unique(self.dst[self.ptr[i] : self.ptr[i + 1]])
            near = near[self.distance[near] <= self.hops]
            near = near[~np.isin(near, list(chosen))]
            if logits is None:
                first, second = self.distance[near].astype(float), -(self.ptr[near + 1] - self.ptr[near])
            else:
                first, second = -logits[near], np.zeros(len(near), int)
            order = np.lexsort((near, second, first))[:most]
            for place in order.tolist():
                heapq.heappush(heap, (float(first[place]), int(second[place]), int(near[place])))

        for i in list(chosen):
            look(i)
        while heap and len(chosen) < most:
            _, _, i = heapq.heappop(heap)
            if i not in chosen:
                chosen[i] = None
                look(i)


def _edges(graph: KnowledgeGraph, ids: list[int], explanation: Explanation | None, drawn: list[int]) -> list[NearEdge]:
    """The triples between the nodes, those on paths first."""
    shown = np.zeros(graph.num_entities, bool)
    shown[ids] = True
    triples = np.flatnonzero(shown[graph.head] & shown[graph.tail])
    gradient = None
    if explanation is not None and explanation.edge_gradient is not None:
        both = explanation.edge_gradient.numpy()
        gradient = both[triples] + both[triples + graph.num_triples]  # the triple's message and its inverse's
    groups: dict[tuple[int, int], list[int]] = {}
    for place, triple in enumerate(triples.tolist()):
        groups.setdefault((int(graph.head[triple]), int(graph.tail[triple])), []).append(place)
    taken: dict[tuple[int, int], tuple[dict[int, None], dict[str, None]]] = {}
    for number in drawn:
        assert explanation is not None
        for step in explanation.paths[number - 1].steps:
            numbers, names = taken.setdefault((step.head_id, step.tail_id), ({}, {}))
            numbers[number], names[step.relation] = None, None
    found = []
    for (head, tail), places in groups.items():
        relations = list(dict.fromkeys(graph.relations[int(graph.relation[triples[p]])] for p in places))
        total = None if gradient is None else float(gradient[places].sum())
        numbers, names = taken.get((head, tail), ({}, {}))
        found.append(NearEdge(head, tail, tuple(relations), tuple(numbers), tuple(names), total))
    return sorted(found, key=lambda edge: edge.paths or (1 << 30,))


def _documents(graph: KnowledgeGraph, ids: list[int]) -> dict[int, list[int]]:
    """Entity id -> documents that tell of it."""
    shown = np.zeros(graph.num_entities, bool)
    shown[ids] = True
    entries = np.flatnonzero(shown[graph.document_entities])
    documents = np.searchsorted(graph.document_ptr, entries, side="right") - 1
    found: dict[int, list[int]] = {}
    for entity, document in zip(graph.document_entities[entries].tolist(), documents.tolist(), strict=True):
        found.setdefault(entity, []).append(document)
    return found
