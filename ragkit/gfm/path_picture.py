"""What a picture of paths shows: boxes, arrows and their texts, before anything has a place."""

from __future__ import annotations

import textwrap
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ragkit.gfm.paths import Explanation

NODE_CHARS, LABEL_CHARS = 20, 24
NODE_LINES, LABEL_LINES = 2, 3
JOINERS = "\u200c\u200d"
LONE_NODES = 8  # of each side where there is no path


@dataclass
class Node:
    """One box.

    Attributes:
        name: The entity's whole name.
        role: "question", "between" or "target".
        lines: What the box says.
        ports: Edges that come, and that leave.
    """

    name: str
    role: str
    lines: list[str]
    ports: tuple[int, int] = (0, 0)


@dataclass
class Edge:
    """All drawn steps over triples with this head and tail.

    Attributes:
        start, end: Places of the boxes that the first path goes from and to.
        forward: Whether the triples go from start to end.
        relations: Name -> gradients of its drawn edges, over all layers.
        layers: Name -> layers in which the paths take it.
        seen: (relation id, way) that is counted in `relations`.
    """

    start: int
    end: int
    forward: bool
    relations: dict[str, float] = field(default_factory=dict)
    layers: dict[str, set[int]] = field(default_factory=dict)
    seen: set[tuple[int, bool]] = field(default_factory=set)

    @property
    def total(self) -> float:
        """What all its relations add up to."""
        return sum(self.relations.values())


def picture_graph(explanation: Explanation) -> tuple[list[Node], list[Edge]]:
    """Nodes and edges of all paths, the best path's first."""
    asked, wanted = explanation.question_entities, explanation.target_entities
    place: dict[int, int] = {}
    nodes: list[Node] = []
    edges: dict[tuple[int, int], Edge] = {}

    def node(entity: int, name: str) -> int:
        if entity not in place:
            place[entity] = len(nodes)
            role = "target" if entity in wanted else "question" if entity in asked else "between"
            nodes.append(Node(clean(name), role, lines_of(name, NODE_CHARS, NODE_LINES)))
        return place[entity]

    for path in explanation.paths:
        for step in path.steps:
            start, end = node(*step.start), node(*step.end)
            edge = edges.setdefault((step.head_id, step.tail_id), Edge(start, end, not step.inverse))
            name = clean(step.relation)
            edge.layers.setdefault(name, set()).add(step.layer)
            if (step.relation_id, step.inverse) not in edge.seen:
                edge.seen.add((step.relation_id, step.inverse))
                edge.relations[name] = edge.relations.get(name, 0.0) + step.total
    if not explanation.paths:
        for entities in (asked, wanted):
            for entity, name in list(entities.items())[:LONE_NODES]:
                node(entity, name)
    for edge in edges.values():
        nodes[edge.start].ports = (nodes[edge.start].ports[0], nodes[edge.start].ports[1] + 1)
        nodes[edge.end].ports = (nodes[edge.end].ports[0] + 1, nodes[edge.end].ports[1])
    return nodes, list(edges.values())


def clean(text: str) -> str:
    """One line of what can be printed; XML has no place for control characters and lone surrogates.

    Joiners stay (Persian and Hindi words and emoji are made with them); other signs that are not seen go, as those
    that turn the direction of what follows.
    """
    return "".join(_shown(c) for c in " ".join(str(text).split()))


def _shown(c: str) -> str:
    if c.isprintable() or c in JOINERS:
        return c
    return "" if unicodedata.category(c) == "Cf" else "\ufffd"


def shorten(text: str, chars: int) -> str:
    """At most `chars` characters."""
    text = clean(text)
    return text if len(text) <= chars else text[: chars - 1].rstrip() + "\u2026"


def lines_of(text: str, chars: int, most: int) -> list[str]:
    """At most `most` lines; what does not fit ends in an ellipsis."""
    lines = textwrap.wrap(clean(text), chars) or [" "]
    if len(lines) > most:
        lines = [*lines[: most - 1], shorten(" ".join(lines[most - 1 :]), chars)]
    return lines


def label_of(edge: Edge) -> list[str]:
    """Names of the relations, the greatest contribution first."""
    names = sorted(edge.relations, key=lambda name: -abs(edge.relations[name]))
    if len(names) > LABEL_LINES:
        names = [*names[: LABEL_LINES - 1], f"and {len(names) - LABEL_LINES + 1} more"]
    return [shorten(name, LABEL_CHARS) for name in names]
