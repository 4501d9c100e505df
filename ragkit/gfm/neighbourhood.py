"""The neighbourhood of a question: what lies around its entities, what scored best, and the paths that led there."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from ragkit.files import atomic_file
from ragkit.gfm.explain import SMOOTH, explain
from ragkit.gfm.graph_names import GraphNames
from ragkit.gfm.near_nodes import NearEdge, NearNode, Scores, pick, question_scores
from ragkit.gfm.neighbourhood_drawing import draw_neighbourhood
from ragkit.gfm.path_picture import shorten
from ragkit.gfm.paths import Explanation
from ragkit.graph import KnowledgeGraph
from ragkit.tables import html_table, text_table
from ragkit.units import counted

if TYPE_CHECKING:
    from ragkit.gfm.retriever import GFMRetriever

MOST_NODES = 200  # more cannot be read
ROLES = {
    "question": "entity of the question",
    "answer": "what was scored",
    "path": "on a path",
    "other": "near them",
}
MOST_STARTS = 6  # names of them in a title
NAME_CHARS, PATH_CHARS = 40, 160  # of names and paths in tables
TABLE_ROWS = 40  # nodes that the text lists with all they have; more are named only


@dataclass(frozen=True, eq=False, repr=False)
class Neighbourhood:
    """A part of a graph that can be looked at; its text is its tables, in Jupyter it is the picture and its tables.

    Attributes:
        question: Its text, or "".
        nodes: The question's entities first, then what was scored, what is on a path, and the rest, the nearest or
            best first. Their `number` is the one that the picture shows.
        edges: The triples between them; equal ends are joined.
        entities: (rank, name, score) of the best scored entities of the whole graph.
        documents: (rank, id, score) of the best scored documents.
        explanation: What explains the target's score; None without a model, or where nothing was to be explained.
        paths: Numbers of those of its paths, from 1, that are in the picture.
        hops: How far the nodes around may be from the question's entities.
        left_out: Nodes within that distance that are not shown.
        note: What else a reader must know, or "".
    """

    question: str
    nodes: tuple[NearNode, ...]
    edges: tuple[NearEdge, ...]
    entities: tuple[tuple[int, str, float], ...] = ()
    documents: tuple[tuple[int, str, float], ...] = ()
    explanation: Explanation | None = None
    paths: tuple[int, ...] = ()
    hops: int = 2
    left_out: int = 0
    note: str = ""

    @property
    def title(self) -> str:
        """The question, or what the graph is looked at around."""
        names = [node.name for node in self.nodes if node.role == "question"]
        return self.question or "Around " + ", ".join(names[:MOST_STARTS]) + ("\u2026" if names[MOST_STARTS:] else "")

    @property
    def role_words(self) -> dict[str, str]:
        """What the roles of the nodes are called."""
        return ROLES if self.question else {**ROLES, "question": "where it starts"}

    @property
    def summary(self) -> str:
        """How much of the graph this is, in a sentence."""
        text = f"{counted(len(self.nodes), 'entity', 'entities')} and {counted(len(self.edges), 'edge')}"
        if self.left_out:
            text += f"; {self.left_out:,} more within {counted(self.hops, 'hop')} left out"
        return text

    @property
    def description(self) -> str:
        """The picture in words, for those who cannot see it."""
        parts = [f"{self.title}: graph of {self.summary}."]
        asked = [node.name for node in self.nodes if node.role == "question"]
        if self.question and asked:
            more = " and others" if len(asked) > MOST_STARTS else ""
            parts.append(f"It starts from {', '.join(asked[:MOST_STARTS])}{more}.")
        if self.explanation is not None:
            parts.append(f"Scored: {self.explanation.title}.")
            if self.paths:
                best = self.explanation.paths[self.paths[0] - 1]
                parts.append(f"{counted(len(self.paths), 'path')} highlighted; the best: {best}.")
        return " ".join(shorten(part, 300) for part in parts)

    def only_paths(self) -> Neighbourhood:
        """Without what is neither of the question, nor scored, nor on a path; numbers stay."""
        kept = tuple(node for node in self.nodes if node.role != "other")
        ids = {node.id for node in kept}
        on_path = tuple(edge for edge in self.edges if edge.paths and {edge.head, edge.tail} <= ids)
        return replace(self, nodes=kept, edges=on_path, left_out=self.left_out + len(self.nodes) - len(kept))

    def draw(
        self,
        format: str = "svg",
        dark: bool = False,
        themed: bool = False,
        seed: int = 0,
        tooltips: bool = True,
    ) -> str | bytes:
        """The picture; see `ragkit.gfm.draw_neighbourhood`."""
        return draw_neighbourhood(self, format, dark, themed, seed, tooltips)

    def save(self, path: str | FilePath, dark: bool = False) -> FilePath:
        """Writes the picture atomically.

        Args:
            path: Ends in .svg or .png, which chooses the format; an existing file is replaced.
            dark: On dark ground.

        Raises:
            ValueError: Another ending.
        """
        path = FilePath(path)
        suffix = path.suffix.lower()
        if suffix not in (".svg", ".png"):
            raise ValueError(f"{path}: the ending is {suffix or 'missing'}; a picture is saved as .svg or as .png")
        picture = self.draw(suffix[1:], dark)
        with atomic_file(path) as file:
            file.write(picture if isinstance(picture, bytes) else picture.encode("utf-8"))
        return path

    # ---- as tables ----

    def tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """(title, rows with their head) of the best entities and documents, the paths, and the nodes shown."""
        found: list[tuple[str, list[tuple[str, ...]]]] = []
        for title, ranked in (("Best entities", self.entities), ("Best documents", self.documents)):
            if ranked:
                rows = [(shorten(name, NAME_CHARS), str(rank), f"{score:.3g}") for rank, name, score in ranked]
                found.append((title, [("name", "rank", "score"), *rows]))
        if self.explanation is not None and self.explanation.paths:
            rows = []
            for number, path in enumerate(self.explanation.paths, 1):
                place = str(number) if number in self.paths else f"{number} (not drawn)"
                rows.append((shorten(str(path), PATH_CHARS), place, f"{path.weight:.3g}"))
            found.append((f"Paths to {shorten(self.explanation.title, 90)}", [("path", "number", "weight"), *rows]))
        nodes = [_node_row(node, self.role_words[node.role]) for node in self.nodes]
        found.append(("In the picture", [NODE_HEAD, *nodes]))
        return found

    def __str__(self) -> str:
        lines = [self.title, self.summary]
        if self.note:
            lines.append(self.note)
        for title, rows in self.tables():
            many = len(rows) - 1 > TABLE_ROWS
            lines += ["", title, text_table(rows[: TABLE_ROWS + 1] if many else rows)]
            if many:
                lines.append("and " + ", ".join(f"{row[1]} {row[0]}" for row in rows[TABLE_ROWS + 1 :]))
        return "\n".join(lines)

    __repr__ = __str__

    def tables_html(self) -> str:
        """The tables; that of the nodes is folded where it is long."""
        parts = [f"<p>{html.escape(self.note)}</p>" if self.note else ""]
        for title, rows in self.tables():
            table = html_table(rows)
            if len(rows) > 12:
                head = f"<summary><b>{html.escape(title)}</b> ({len(rows) - 1})</summary>"
                parts.append(f"<details>{head}{table}</details>")
            else:
                parts.append(f"<div><b>{html.escape(title)}</b></div>{table}")
        return "".join(parts)

    def _repr_html_(self) -> str:
        return f"<div>{self.draw(themed=True)!s}{self.tables_html()}</div>"


NODE_HEAD = ("name", "no.", "role", "score", "rank", "degree", "documents")


def _node_row(node: NearNode, role: str) -> tuple[str, ...]:
    return (
        shorten(node.name, NAME_CHARS),
        str(node.number),
        role,
        "-" if node.score is None else f"{node.score:.3g}",
        "-" if node.rank is None else f"{node.rank:,}",
        f"{node.degree:,}",
        f"{node.num_documents:,}",
    )


# ---- making one ----


def neighbourhood(
    source: GFMRetriever | KnowledgeGraph,
    question: str = "",
    target: int | str | None = None,
    hops: int = 2,
    max_nodes: int = 40,
    paths: int = 5,
    *,
    entities: Sequence[int | str] | None = None,
    target_kind: str = "auto",
    best: int = 5,
) -> Neighbourhood:
    """The part of a graph around a question's entities, with the best paths to what a model scored.

    With a retriever, the model scores all entities, and the paths to `target` are those of `explain`. The question's
    entities, what was scored and the paths come first; from there the picture grows over the triples, the best score
    next, as far as `hops` from the question's entities, until it holds `max_nodes`. With a graph alone there are no
    scores: it grows the nearest first, of those the ones with most triples.

    Nothing is as large as entities × entities: one question's scores [N], distances [N], and the triples of what is
    shown. `explain` takes longest.

    Args:
        source: A `GFMRetriever`, or a graph.
        question: Its text; only with a retriever.
        target: Name or id of the entity, or name of the document, whose score is explained. None: the best scored
            entity that the question does not name.
        hops: From the question's entities, 1 to 10.
        max_nodes: 1 to 200.
        paths: Paths to look for, 0 to 50. One whose nodes do not all fit is not drawn; the tables have it.
        entities: Names or ids of the question's entities, in place of the linker's; needed with a graph alone.
        target_kind: As in `explain`.
        best: Entities and documents in the tables of the best; the entities are shown, too, as long as there is room.

    Returns:
        The neighbourhood.

    Raises:
        GraphError: A name that the graph does not have; the nearest one is named.
        ValueError: No entity, or a number out of range.

    Example:
        >>> neighbourhood(graph, entities=["peru"], max_nodes=20).save("peru.svg")  # doctest: +SKIP
        >>> neighbourhood(retriever, "Which country borders Peru?")  # doctest: +SKIP
    """
    for name, value, low, high in (
        ("hops", hops, 1, 10),
        ("max_nodes", max_nodes, 1, MOST_NODES),
        ("paths", paths, 0, 50),
        ("best", best, 0, 1000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}: expected a whole number from {low} to {high}, found {value!r}")
    if isinstance(source, KnowledgeGraph):
        if question or target is not None:
            what = "question" if question else "target"
            raise ValueError(f"{what}: a graph alone scores nothing; give a GFMRetriever, or entities= only")
        return around(source, entity_ids(source, entities), hops=hops, max_nodes=max_nodes)
    scores = scores_of(source, question, entities, best)
    explanation = explained(source, scores, target, paths, target_kind)
    return around(source.graph, scores.starts, scores, explanation, hops, max_nodes)


def entity_ids(graph: KnowledgeGraph, entities: Sequence[int | str] | None) -> list[int]:
    """Ids of the entities that somebody named, each once.

    Raises:
        GraphError: A name that the graph does not have; the nearest one is named.
        ValueError: None is given, or an id is out of range.
    """
    given = [entities] if isinstance(entities, (str, int)) else [] if entities is None else list(entities)
    if not given:
        raise ValueError("entities: none is given; name at least one entity to look around, such as entities=['peru']")
    names = GraphNames(graph)
    return list(dict.fromkeys(names.entity(entity, "entities") for entity in given))


def scores_of(
    retriever: GFMRetriever, question: str, entities: Sequence[int | str] | None = None, best: int = 5
) -> Scores:
    """A question's entities and what the model scored for it; arguments and errors as in `neighbourhood`."""
    missing = [name for name in ("model", "graph", "encoder", "link") if not hasattr(retriever, name)]
    if missing:
        raise TypeError(f"source: expected a GFMRetriever or a KnowledgeGraph, found a {type(retriever).__name__}")
    if not question.strip():
        raise ValueError("question: it is empty; write one that names an entity of the graph")
    if entities is not None:
        starts = entity_ids(retriever.graph, entities)
    else:
        starts = retriever.link([question])[0]
    if not starts:
        raise ValueError(
            f"question: no entity of the graph was found in {question!r}; name one as the graph writes it, or give "
            "entities="
        )
    return question_scores(retriever, question, starts, best)


def explained(
    retriever: GFMRetriever,
    scores: Scores,
    target: int | str | None = None,
    paths: int = 5,
    target_kind: str = "auto",
) -> Explanation | None:
    """Why the target has its score: `explain` with what the retriever uses; None where there is nothing to explain."""
    if paths == 0 and target is None:
        return None
    if target is None:
        target, target_kind = scores.best_other, "entity"
        if target is None:
            return None
    ranker = retriever.ranker if retriever.ranker in SMOOTH else "score_weighted_idf"
    found = explain(
        retriever.model,
        retriever.graph,
        scores.embedding,
        scores.starts,
        target,
        text=scores.question,
        target_kind=target_kind,
        entities_weight=scores.entities_weight,
        top_paths=max(1, paths),
        ranker=ranker,
    )
    return found if paths else replace(found, paths=())


def around(
    graph: KnowledgeGraph,
    starts: Sequence[int],
    scores: Scores | None = None,
    explanation: Explanation | None = None,
    hops: int = 2,
    max_nodes: int = 40,
) -> Neighbourhood:
    """The neighbourhood of entities, from what is known of them; see `neighbourhood`.

    Args:
        graph: The graph.
        starts: Ids of the question's entities.
        scores: What a model scored, or None.
        explanation: Its paths are shown.
        hops, max_nodes: As in `neighbourhood`.
    """
    found = pick(graph, list(starts), scores, explanation, hops, max_nodes)
    notes = [explanation.note] if explanation is not None and explanation.note else []
    room = counted(max_nodes, "node")
    total = len(explanation.paths) if explanation is not None else 0
    if len(found.paths) < total:
        notes.append(f"{total - len(found.paths)} of {total} paths do not fit into {room}.")
    if found.missing_starts:
        missing = counted(found.missing_starts, "entity", "entities")
        notes.append(f"{missing} of the question: no room in {room}.")
    far = [node.name for node in found.nodes if node.distance is None and node.role == "other"]
    if far:
        more = f" and {len(far) - 3} more" if len(far) > 3 else ""
        names = ", ".join(shorten(name, 40) for name in far[:3])
        notes.append(f"Among the best scored, but more than {counted(hops, 'hop')} away: {names}{more}.")
    known = scores if scores is not None else explanation
    return Neighbourhood(
        question=known.question if known is not None else "",
        nodes=found.nodes,
        edges=found.edges,
        entities=scores.entities if scores is not None else (),
        documents=scores.documents if scores is not None else (),
        explanation=explanation,
        paths=found.paths,
        hops=hops,
        left_out=found.left_out,
        note=" ".join(notes),
    )
