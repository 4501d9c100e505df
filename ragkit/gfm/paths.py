"""An explanation as data: the paths from a question's entities to what was scored, as text, HTML and JSON."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ragkit.gfm.path_drawing import draw_paths
from ragkit.tables import html_table

MOST_ENDS = 8  # names of one side that the text says
MOST_PADDING = 100  # longer paths push their own weight out only


@dataclass(frozen=True)
class PathStep:
    """One hop of a path, along a triple or against it.

    Attributes:
        head, head_id: The triple's head.
        relation, relation_id: Its relation; never the inverse one.
        tail, tail_id: Its tail.
        inverse: Whether the path goes from the tail to the head.
        layer: Layer of the model that the path takes the hop in, from 1.
        weight: Gradient of the score for the edge's weight in that layer.
        total: The same, added up over all layers.
        edges: The graph's edges (places in `edge_index`) that the message takes; several for a repeated triple.
    """

    head: str
    head_id: int
    relation: str
    relation_id: int
    tail: str
    tail_id: int
    inverse: bool
    layer: int
    weight: float
    total: float
    edges: tuple[int, ...] = ()

    @property
    def start(self) -> tuple[int, str]:
        """(id, name) of the entity that the path comes from."""
        return (self.tail_id, self.tail) if self.inverse else (self.head_id, self.head)

    @property
    def end(self) -> tuple[int, str]:
        """(id, name) of the entity that the path goes to."""
        return (self.head_id, self.head) if self.inverse else (self.tail_id, self.tail)

    def __str__(self) -> str:
        arrow = f"<--[{self.relation}]--" if self.inverse else f"--[{self.relation}]-->"
        return f"{self.start[1]} {arrow} {self.end[1]}"


@dataclass(frozen=True)
class Path:
    """A path from an entity of the question to the target.

    Attributes:
        steps: Its hops, at least one.
        weight: Mean of the hops' weights: above 0 where the path raises the score.
    """

    steps: tuple[PathStep, ...]
    weight: float

    def __str__(self) -> str:
        first, *rest = [str(step) for step in self.steps]
        return first + "".join(
            text.removeprefix(step.start[1]) for step, text in zip(self.steps[1:], rest, strict=True)
        )


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Why a model gave one entity or document its score.

    Attributes:
        question: Its text, or "".
        target: Name of the entity or document.
        target_kind: "entity" or "document".
        score: The model's score of it.
        score_kind: "logit", or the ranker whose score of the document it is.
        question_entities: id -> name, where paths begin.
        target_entities: id -> name, where paths end.
        paths: Best first; empty where no path leads there.
        note: What the paths do not say, or "".
        edge_gradient: [E] gradient of the score for the weight of each of the graph's edges, added up over the layers.
    """

    question: str
    target: str
    target_kind: str
    score: float
    score_kind: str
    question_entities: dict[int, str]
    target_entities: dict[int, str]
    paths: tuple[Path, ...]
    note: str = ""
    edge_gradient: Tensor | None = None

    @property
    def title(self) -> str:
        """The target and its score in one line."""
        return f"{self.target} ({self.target_kind}), {self.score_kind} {self.score:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """All but `edge_gradient`, of plain types that `json` writes."""
        steps = [
            [{name: getattr(s, name) for name in PathStep.__dataclass_fields__} for s in path.steps]
            for path in self.paths
        ]
        for step in (step for path in steps for step in path):
            step["edges"] = list(step["edges"])
        ends = {
            name: [{"id": i, "name": text} for i, text in getattr(self, name).items()]
            for name in ("question_entities", "target_entities")
        }
        plain = {
            name: getattr(self, name) for name in ("question", "target", "target_kind", "score", "score_kind", "note")
        }
        paths = [{"weight": path.weight, "steps": of} for path, of in zip(self.paths, steps, strict=True)]
        return {**plain, **ends, "paths": paths}

    def draw(self, format: str = "svg", dark: bool = False) -> str | bytes:
        """The paths as a picture; see `ragkit.gfm.draw_paths`."""
        return draw_paths(self, format, dark)

    def _lines(self) -> list[str]:
        asked = [f"question: {self.question}"] if self.question else []
        return [*asked, f"from: {_names(self.question_entities)}", f"target: {self.title}"]

    def __str__(self) -> str:
        texts = [str(path) for path in self.paths]
        width = min(MOST_PADDING, max(map(len, texts), default=0))
        rows = [f"{text.ljust(width)}   {path.weight:.3g}" for text, path in zip(texts, self.paths, strict=True)]
        return "\n".join([*self._lines(), *rows, *([self.note] if self.note else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._lines())
        note = self.note
        try:
            picture = str(self.draw())
        except ImportError as error:  # the table needs no library
            picture, note = "", f"{note} No picture: {error}".strip()
        rows = [("path", "layers", "weight")]
        for path in self.paths:
            rows.append((str(path), ", ".join(str(step.layer) for step in path.steps), f"{path.weight:.3g}"))
        table = html_table(rows, note) if self.paths else f"<p>{html.escape(note)}</p>"
        return f"<div>{lines}{picture}{table}</div>"


def _names(entities: dict[int, str]) -> str:
    names = list(entities.values())
    more = f" and {len(names) - MOST_ENDS} more" if len(names) > MOST_ENDS else ""
    return ", ".join(names[:MOST_ENDS]) + more
