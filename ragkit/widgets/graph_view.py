"""The graph view: a question's neighbourhood in the graph, with the paths that led to what was found."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragkit.console import explain as words_of
from ragkit.gfm.near_nodes import Scores
from ragkit.gfm.neighbourhood import (
    MOST_NODES,
    Neighbourhood,
    around,
    entity_ids,
    explained,
    scores_of,
)
from ragkit.gfm.paths import Explanation
from ragkit.graph import KnowledgeGraph
from ragkit.tables import html_table
from ragkit.widgets.base import TEXT, StaticBox, accordion, error_html, escape, set_tooltip, widgets

BEST = 8  # entities and documents to choose from
WIDTH = "110px"  # of the names before the inputs
LAYOUT = {"width": "min(760px, 98%)"}


class GraphView(StaticBox):
    """Shows what lies around a question's entities, what scored best, and the paths that explain it.

    Without a front end (GitHub, nbviewer) it is a picture and tables. Everything that an input does is an attribute or
    a method, too.

    Args:
        source: A `GFMRetriever`; or a `KnowledgeGraph`, which shows names without scores and paths.
        question: The question to begin with.
        target: Name of the entity or document whose score is explained first; None: the best scored entity that the
            question does not name.
        entities: Names or ids to start from, in place of those that the linker finds; needed with a graph alone.
        hops, max_nodes, paths: As in `ragkit.gfm.neighbourhood`; the first numbers in their fields.

    Attributes:
        neighbourhood: What is shown, or None where there is nothing to show.
        message: What is wrong, in words, or "".

    Raises:
        TypeError: `source` is neither.

    Example:
        >>> view = GraphView(retriever, "Which country borders Peru?"); view  # doctest: +SKIP
        >>> view.save("peru.svg")  # doctest: +SKIP
    """

    def __init__(
        self,
        source: Any,
        question: str = "",
        target: str | None = None,
        *,
        entities: Sequence[int | str] | None = None,
        hops: int = 2,
        max_nodes: int = 40,
        paths: int = 5,
    ) -> None:
        super().__init__()
        graph = source if isinstance(source, KnowledgeGraph) else getattr(source, "graph", None)
        if not isinstance(graph, KnowledgeGraph):
            raise TypeError(f"source: expected a GFMRetriever or a KnowledgeGraph, found a {type(source).__name__}")
        self._graph = graph
        self._retriever = None if source is graph else source
        self.neighbourhood: Neighbourhood | None = None
        self.message = ""
        self._quiet = False
        self._scores: tuple[Any, Scores] | None = None  # with what they were asked for
        self._explanation: tuple[Any, Explanation | None] | None = None
        given = [] if entities is None else [entities] if isinstance(entities, (str, int)) else entities
        self._make_inputs(question, [self._name(entity) for entity in given], hops, max_nodes, paths)
        self._wanted = target  # for the first question only
        self._update()

    def _name(self, entity: int | str) -> str:
        """What the input of names shows; a wrong id stays as it is, and is named as wrong later."""
        if isinstance(entity, str):
            return entity
        known = 0 <= int(entity) < self._graph.num_entities
        return self._graph.entities[int(entity)] if known else str(entity)

    def _make_inputs(self, question: str, names: list[str], hops: int, max_nodes: int, paths: int) -> None:
        style = {"description_width": WIDTH}
        options: dict[str, Any] = {"style": style, "layout": LAYOUT, "continuous_update": False}
        self.question = widgets.Text(value=question, description="Question", **options)
        hint = "found in the question" if self._retriever else "such as: peru; chile"
        self.entities = widgets.Text(value="; ".join(names), description="Entities", placeholder=hint, **options)
        set_tooltip(self.entities, "Where to start: names as the graph writes them, with ; between")
        self.target = widgets.Dropdown(options=[("nothing", None)], description="Explain", style=style, layout=LAYOUT)
        set_tooltip(self.target, "The entity or document whose score the paths explain")
        low = min(5, max_nodes)
        self.nodes = _whole_number(max_nodes, low, MOST_NODES, "Most entities")
        self.hops = _whole_number(hops, 1, max(3, hops), "Hops")
        self.paths = _whole_number(paths, 1, max(10, paths), "Paths")
        self.paths_only = widgets.Checkbox(value=False, description="Only what is on the paths", indent=False)
        self.status, self.picture, self.tables = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.table = widgets.HTML()
        self.file = widgets.Text(value="graph", description="File name", style=style, layout={"width": "320px"})
        self.svg_button = widgets.Button(description="Save SVG", layout={"width": "110px"})
        self.png_button = widgets.Button(description="Save PNG", layout={"width": "110px"})
        self.saved = widgets.HTML()
        with_model = [self.question, self.entities, self.target, self.nodes, self.hops, self.paths, self.paths_only]
        inputs = with_model if self._retriever else [self.entities, self.nodes, self.hops]
        for widget in inputs:
            widget.observe(self._changed, "value")
        self.svg_button.on_click(lambda _: self._save("svg"))
        self.png_button.on_click(lambda _: self._save("png"))
        save = widgets.HBox([self.file, self.svg_button, self.png_button], layout={"flex_flow": "row wrap"})
        nodes = accordion(self.table, "All entities in the picture")
        self.children = [*inputs, self.status, self.picture, self.tables, nodes, save, self.saved]

    # ---- what is shown ----

    def _changed(self, change: Any) -> None:
        if not self._quiet:
            self._update()

    def _update(self) -> None:
        """Shows what the inputs say; what is wrong with them becomes the message."""
        self.neighbourhood, self.message, picture, tables, table = None, "", "", "", ""
        try:
            found = self._find()
            picture = f'<div style="overflow-x: auto">{found.draw(themed=True)!s}</div>'
            *others, (_, rows) = found.tables()
            parts = [f"<div><div><b>{escape(title)}</b></div>{html_table(of)}</div>" for title, of in others]
            tables = f'<div style="display: flex; flex-wrap: wrap; gap: 8px 40px">{"".join(parts)}</div>'
            table = html_table(rows)
            self.neighbourhood = found
        except Exception as error:  # a callback must not fail where nobody sees it
            self.message = _words(error)
        self.status.value = error_html(self.message)
        self.picture.value = picture
        self.tables.value, self.table.value = (_themed(text) for text in (tables, table))
        self.saved.value = ""

    def _find(self) -> Neighbourhood:
        names = [name.strip() for name in self.entities.value.split(";") if name.strip()]
        if self._retriever is None:
            ids = entity_ids(self._graph, names)
            return around(self._graph, ids, hops=self.hops.value, max_nodes=self.nodes.value)
        question = self.question.value.strip()
        asked = (question, tuple(names))
        if self._scores is None or self._scores[0] != asked:
            self._scores = self._explanation = None
            self._offer([("nothing", None)])
            scores = scores_of(self._retriever, question, names or None, BEST)
            self._scores = (asked, scores)
            self._offer(self._targets(scores))
        scores = self._scores[1]
        wanted = (self.target.value, self.paths.value)
        if self._explanation is None or self._explanation[0] != wanted:
            self._explanation = None
            kind, name = wanted[0] or ("auto", None)
            explanation = None
            if name is not None:
                explanation = explained(self._retriever, scores, name, self.paths.value, kind)
            self._explanation = (wanted, explanation)
        found = around(self._graph, scores.starts, scores, self._explanation[1], self.hops.value, self.nodes.value)
        return found.only_paths() if self.paths_only.value else found

    def _targets(self, scores: Scores) -> list[tuple[str, Any]]:
        """What can be explained, best first; the one that was asked for at the beginning before all."""
        found: list[tuple[str, Any]] = []
        if self._wanted is not None:
            found.append((self._wanted, ("auto", self._wanted)))
            self._wanted = None
        asked = {self._graph.entities[i] for i in scores.starts}
        ranked = [(name, score) for _, name, score in scores.entities]
        others = [pair for pair in ranked if pair[0] not in asked] + [pair for pair in ranked if pair[0] in asked]
        found += [(f"entity: {name} ({score:.3g})", ("entity", name)) for name, score in others]
        found += [(f"document: {name} ({score:.3g})", ("document", name)) for _, name, score in scores.documents]
        return [*found, ("nothing", None)]

    def _offer(self, options: list[tuple[str, Any]]) -> None:
        """Gives the list of targets new entries and takes the first."""
        with self._silently():
            self.target.index = None  # a front end shows nothing chosen if the place stays the same
            self.target.options = options
            self.target.index = 0

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """While it lasts, changes of the inputs are ours and not a person's."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    # ---- files ----

    def svg(self, dark: bool = False) -> str:
        """The picture as an SVG that stands alone.

        Raises:
            ValueError: There is none; the message says why.
        """
        return str(self._shown().draw("svg", dark))

    def png(self, dark: bool = False) -> bytes:
        """The picture as a PNG; errors as in `svg`."""
        picture = self._shown().draw("png", dark)
        assert isinstance(picture, bytes)
        return picture

    def save(self, path: str | Path, dark: bool = False) -> Path:
        """Writes the picture atomically, as .svg or .png, whatever the ending says; errors as in `svg`."""
        return self._shown().save(path, dark)

    def _shown(self) -> Neighbourhood:
        if self.neighbourhood is None:
            raise ValueError(f"there is no picture: {self.message}")
        return self.neighbourhood

    def _save(self, kind: str) -> None:
        name = self.file.value.strip()
        try:
            if not name:
                raise ValueError("File name is empty; write one, such as: graph")
            path = Path(name if name.lower().endswith(f".{kind}") else f"{name}.{kind}")
            self.save(path)
            self.saved.value = f'<div role="status" style="color: {TEXT}">\u2713 saved as {escape(path)}</div>'
        except Exception as error:
            self.saved.value = error_html(f"not saved: {_words(error)}")

    # ---- without widgets ----

    def static_html(self) -> str:
        """The picture, as an image that GitHub shows too, and the tables."""
        if self.neighbourhood is None:
            return error_html(self.message)
        shown = self.neighbourhood
        picture = str(shown.draw("svg", tooltips=False)).encode("utf-8")
        data = base64.b64encode(picture).decode("ascii")
        image = (
            f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(shown.description)}" style="max-width:100%">'
        )
        return f"<div>{image}{shown.tables_html()}</div>"

    def static_text(self) -> str:
        """The tables."""
        return self.message if self.neighbourhood is None else str(self.neighbourhood)


def _whole_number(value: int, low: int, high: int, name: str) -> Any:
    """A field for a number; the handle of a slider would have no name for a screen reader."""
    style, layout = {"description_width": WIDTH}, {"width": "220px"}
    field = widgets.BoundedIntText(value=value, min=low, max=high, description=name, style=style, layout=layout)
    set_tooltip(field, f"{low} to {high}")
    return field


def _themed(text: str) -> str:
    text = text.replace("<table>", '<table style="border-spacing: 8px 1px">')
    return f'<div style="color: {TEXT}; line-height: 1.4; overflow-x: auto">{text}</div>' if text else ""


def _words(error: Exception) -> str:
    """What went wrong, for a person."""
    return words_of(error) or f"this did not work: {type(error).__name__}: {error}"
