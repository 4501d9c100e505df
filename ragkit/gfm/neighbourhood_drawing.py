"""The picture of a neighbourhood: boxes and numbered circles, thin lines, and thick ones for the paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ragkit.gfm.looks import DARK, LIGHT, text_width
from ragkit.gfm.near_layout import place
from ragkit.gfm.near_marks import (
    DASH_WORDS,
    DASHES,
    LABEL,
    LINE,
    NAME,
    RADIUS,
    SMALL,
    TITLE,
    Block,
    Box,
    badge,
    badge_width,
    dash_of,
    fit,
    outline,
    sample,
    widest,
)
from ragkit.gfm.near_shapes import arrow, clip, loop, rectangle, through
from ragkit.gfm.path_picture import clean, lines_of, shorten
from ragkit.gfm.picture import Group, Shape, Words, to_png, to_svg

if TYPE_CHECKING:
    from ragkit.gfm.near_nodes import NearEdge, NearNode
    from ragkit.gfm.neighbourhood import Neighbourhood

ALL_NAMED = 40  # nodes; of more, only so many have their names in the picture
ALL_LABELLED = 24  # edges; of more, only those on paths have their relations in the picture
NAME_CHARS, NAME_LINES, LABEL_CHARS, LABEL_LINES = 20, 2, 24, 2
MARGIN = 16.0
LEAST_WIDTH = 640.0
HEAD = 13.0  # pixels of the largest arrow head
AROUND = 9.0  # pixels of a line that show on each side of its label


def draw_neighbourhood(
    neighbourhood: Neighbourhood,
    format: str = "svg",
    dark: bool = False,
    themed: bool = False,
    seed: int = 0,
    tooltips: bool = True,
) -> str | bytes:
    """Draws a neighbourhood.

    The question's entities have round ends and stand on the left, what was scored has a double line and stands on the
    right, what is on a path has points. Each path has a number and a kind of line of its own, thick; all other triples
    are thin. Arrows go from head to tail. Up to 40 entities have their names in the picture; of more, the others are
    circles with numbers, which the tables explain. The tooltips tell everything. The same neighbourhood gives the same
    bytes (with one version of matplotlib, which measures the texts).

    Args:
        neighbourhood: What to draw.
        format: "svg" or "png".
        dark: For a dark page.
        themed: An SVG in the colours of the page that it stands in, see-through; `dark` does not count then.
        seed: Of the layout.
        tooltips: Whether an SVG has some; without it is smaller, and as an `<img>` it shows none.

    Returns:
        The SVG as text, or the PNG's bytes.

    Raises:
        ValueError: Another format, or a themed PNG.
        ImportError: matplotlib is not installed.
    """
    if format not in ("svg", "png") or (format == "png" and themed):
        raise ValueError(f'format: expected "svg" or "png" (not themed), found {format!r}')
    drawing = Drawing(neighbourhood, seed)
    size = drawing.width, drawing.height
    if format == "png":
        return to_png(drawing.groups, size, _colors(dark))
    colors = THEMED if themed else _colors(dark)
    groups = drawing.groups if tooltips else [Group(group.marks) for group in drawing.groups]
    return to_svg(groups, size, colors, neighbourhood.description)


# Colours that can be seen on light and on dark ground, the page's where it has names for them.
THEMED = {
    "ground": "var(--jp-layout-color0, #ffffff)",
    "ink": "var(--jp-ui-font-color1, #1a1a1a)",  # on "ground"
    "outside": "var(--jp-ui-font-color1, currentColor)",  # on the page itself
    "faint": "var(--jp-ui-font-color2, currentColor)",
    "line": "#8a949e",
    "question": "#2a86c4",
    "answer": "#c27a10",
    "path": "#169b74",
    "other": "#8a949e",
    "badge": "#0b6b4f",
    "badge-ink": "#ffffff",
}


def _colors(dark: bool) -> dict[str, str]:
    look = DARK if dark else LIGHT
    return {
        "paper": look.ground,
        "ground": look.ground,
        "ink": look.text,
        "outside": look.text,
        "faint": look.faint,
        "line": "#6b7580" if dark else "#98a2ab",
        "question": look.question[1],
        "answer": look.target[1],
        "path": "#3ccf9f" if dark else "#007a5a",
        "other": look.between[1],
        "badge": "#3ccf9f" if dark else "#00664b",
        "badge-ink": "#0b1512" if dark else "#ffffff",
    }


class Drawing:
    """All marks of the picture.

    Attributes:
        groups: In the order of drawing.
        nodes: A box for each node.
        labels: Place of an edge -> box of its label.
        width, height: Pixels.
    """

    def __init__(self, neighbourhood: Neighbourhood, seed: int = 0) -> None:
        self.of = neighbourhood
        self.at = {node.id: place for place, node in enumerate(neighbourhood.nodes)}
        self.nodes = [self._node_box(place, node) for place, node in enumerate(neighbourhood.nodes)]
        few = len(neighbourhood.edges) <= ALL_LABELLED
        self.labels = {
            place: self._label_box(edge)
            for place, edge in enumerate(neighbourhood.edges)
            if edge.head != edge.tail and (edge.paths or few)
        }
        width, height = self._lay_out(seed)
        head, foot = self._heading(max(width, LEAST_WIDTH)), self._legend(max(width, LEAST_WIDTH))
        inner = max(width, LEAST_WIDTH)
        top, self.width = MARGIN + head.height, inner + 2 * MARGIN
        for box in [*self.nodes, *self.labels.values()]:
            box.x += MARGIN + (inner - width) / 2
            box.y += top
        self.height = top + height + foot.height + MARGIN
        edges = [*self._thin_edges(), *self._labelled_edges()]
        nodes = [self._node(box, node) for box, node in zip(self.nodes, neighbourhood.nodes, strict=True)]
        self.groups = [head.moved(MARGIN, MARGIN), *edges, *nodes, foot.moved(MARGIN, top + height)]

    # ---- sizes and places ----

    def _node_box(self, place: int, node: NearNode) -> Box:
        if place >= ALL_NAMED and node.role == "other":
            return Box([str(node.number)], 2 * RADIUS, 2 * RADIUS, named=False)
        lines = lines_of(node.name, NAME_CHARS, NAME_LINES)
        side = {"question": 12, "answer": 11, "path": 14, "other": 7}[node.role]
        return Box(lines, widest(lines, NAME) + 2 * side, len(lines) * NAME * LINE + 10)

    def _label_box(self, edge: NearEdge) -> Box:
        names = edge.path_relations or edge.relations
        if len(names) > LABEL_LINES:
            names = (*names[: LABEL_LINES - 1], f"and {len(names) - LABEL_LINES + 1} more")
        lines = [shorten(name, LABEL_CHARS) for name in names]
        badge = badge_width(edge.paths) + 5 if edge.paths else 0
        return Box(lines, widest(lines, LABEL) + badge + 6, max(16.0, len(lines) * LABEL * LINE + 3))

    def _lay_out(self, seed: int) -> tuple[float, float]:
        boxes = [*self.nodes, *self.labels.values()]
        sizes = [(box.width, box.height) for box in self.nodes]
        sizes += [(box.width + 2 * AROUND, box.height + AROUND) for box in self.labels.values()]
        springs: list[tuple[int, int]] = []
        lines: list[tuple[int, int]] = []
        middle = {edge: len(self.nodes) + number for number, edge in enumerate(self.labels)}
        for place_, edge in enumerate(self.of.edges):
            head, tail = self.at[edge.head], self.at[edge.tail]
            between = middle.get(place_)
            ways = [(head, tail)] if between is None else [(head, between), (between, tail)]
            springs += ways
            lines += ways if edge.paths else []
        places, width, height = place(sizes, springs, self._columns(middle), lines, seed)
        for box, (x, y) in zip(boxes, places.tolist(), strict=True):
            box.x, box.y = x, y
        return width, height

    def _columns(self, middle: dict[int, int]) -> dict[int, float]:
        """Where paths hold their nodes and labels: left to right, each path from its first to its last entity."""
        explanation = self.of.explanation
        if explanation is None or not any(node.role == "answer" for node in self.of.nodes):
            return {}
        between = {(edge.head, edge.tail): middle.get(i) for i, edge in enumerate(self.of.edges)}
        columns: dict[int, float] = {}
        for number in self.of.paths:
            steps = explanation.paths[number - 1].steps
            for hop, step in enumerate(steps):
                columns.setdefault(self.at[step.start[0]], hop / len(steps))
                label = between.get((step.head_id, step.tail_id))
                if label is not None:
                    columns.setdefault(label, (hop + 0.5) / len(steps))
            columns.setdefault(self.at[steps[-1].end[0]], 1.0)
        for place_, node in enumerate(self.of.nodes):
            if node.role == "question":
                columns.setdefault(place_, 0.0)
            elif node.role == "answer":
                columns.setdefault(place_, 1.0)
        return columns

    # ---- nodes ----

    def _node(self, box: Box, node: NearNode) -> Group:
        group = Group(outline(box, node.role), _node_title(node, self.of.role_words[node.role]))
        for number, line in enumerate(box.lines):
            y = box.y + (number - (len(box.lines) - 1) / 2) * NAME * LINE
            size = NAME if box.named else SMALL
            bold = box.named and node.role in ("question", "answer")
            group.marks.append(Words(box.x, y, line, size, bold=bold))
        return group

    # ---- edges ----

    def _thin_edges(self) -> list[Group]:
        """Straight lines; triples of both ways share one."""
        pairs: dict[frozenset[int], list[NearEdge]] = {}
        for number, edge in enumerate(self.of.edges):
            if number not in self.labels:
                pairs.setdefault(frozenset((edge.head, edge.tail)), []).append(edge)
        groups = []
        for edges in pairs.values():
            first = edges[0]
            one, two = self.nodes[self.at[first.head]], self.nodes[self.at[first.tail]]
            title = "\n".join(self._edge_title(edge) for edge in edges)
            if one is two:
                groups.append(Group([Shape(loop(one.x, one.y, one.width, one.height), stroke="line")], title))
                continue
            start, end = _border(one, (two.x, two.y)), _border(two, (one.x, one.y))
            steps = [("M", *start), ("L", *end), *arrow(start, end, 6.0)]
            if len(edges) > 1:
                steps += arrow(end, start, 6.0)
            groups.append(Group([Shape(steps, stroke="line")], title))
        return groups

    def _labelled_edges(self) -> list[Group]:
        """Curves through their labels; the best paths are drawn last."""
        lines, labels = [], []
        for number, box in sorted(self.labels.items(), key=lambda item: -item[0]):
            edge = self.of.edges[number]
            one, two = self.nodes[self.at[edge.head]], self.nodes[self.at[edge.tail]]
            start, bend, end = _curve(one, box, two)
            title = self._edge_title(edge)
            if edge.paths:
                width = 3.6 if edge.paths[0] == 1 else 2.6
                tip = arrow(bend, end, 7.0 + 1.6 * width)
                head = [tip[0], tip[1], tip[2], ("Z",)]
                back = ((tip[0][1] + tip[2][1]) / 2, (tip[0][2] + tip[2][2]) / 2)  # the line ends within the head
                line = Shape([("M", *start), ("Q", *bend, *back)], None, "path", width, dash_of(edge.paths[0]))
                lines.append(Group([line, Shape(head, "path")], title))
            else:
                steps = [("M", *start), ("Q", *bend, *end), *arrow(bend, end, 7.0)]
                lines.append(Group([Shape(steps, stroke="line", width=1.2)], title))
            labels.append(self._label(box, edge, title))
        return [*lines, *labels]

    def _label(self, box: Box, edge: NearEdge, title: str) -> Group:
        marks: list[Shape | Words] = [Shape(rectangle(box.x, box.y, box.width, box.height, 3), "ground")]
        left = box.x - box.width / 2 + 3
        if edge.paths:
            marks += badge(left, box.y, edge.paths)
            left += badge_width(edge.paths) + 5
        for number, line in enumerate(box.lines):
            y = box.y + (number - (len(box.lines) - 1) / 2) * LABEL * LINE
            marks.append(Words(left, y, line, LABEL, "ink", "start"))
        return Group(marks, title)

    def _edge_title(self, edge: NearEdge) -> str:
        head, tail = (self.of.nodes[self.at[i]].name for i in (edge.head, edge.tail))
        lines = [f"{clean(head)} \u2014 {clean(relation)} \u2192 {clean(tail)}" for relation in edge.relations[:12]]
        if len(edge.relations) > 12:
            lines.append(f"and {len(edge.relations) - 12} more relations")
        if edge.paths:
            lines.append(f"on path {', '.join(map(str, edge.paths))}")
        if edge.gradient is not None:
            lines.append(f"gradient of the score: {edge.gradient:.3g}")
        return "\n".join(lines)

    # ---- heading and legend ----

    def _heading(self, width: float) -> Block:
        block = Block()
        block.line(Words(0, 0, fit(self.of.title, width, TITLE, True), TITLE, "outside", "start", True))
        if self.of.explanation is not None:
            text = f"scored: {self.of.explanation.title}"
            block.line(Words(0, 0, fit(text, width, NAME), NAME, "outside", "start"))
        for text in filter(None, (self.of.summary, self.of.note)):
            block.line(Words(0, 0, fit(text, width, LABEL), LABEL, "faint", "start"))
        block.height += 12
        return block

    def _legend(self, width: float) -> Block:
        block = Block()
        block.height = 14
        x, row = 0.0, LABEL * LINE + 8
        roles = {node.role for node in self.of.nodes}
        entries = [(role, words) for role, words in self.of.role_words.items() if role in roles]
        if any(not box.named for box in self.nodes):
            entries.append(("circle", "number: see the table"))
        if any(not edge.paths for edge in self.of.edges):
            entries.append(("thin", "other triple, head \u2192 tail"))
        for what, words in entries:
            needed = 44 + text_width(words, LABEL) * 72 + 16
            if x and x + needed > width:
                x, block.height = 0.0, block.height + row
            block.marks += sample(what, x + 17, block.height + row / 2)
            block.marks.append(Words(x + 42, block.height + row / 2, words, LABEL, "faint", "start"))
            x += needed
        block.height += row
        if self.of.explanation is None:
            return block
        for number in self.of.paths:
            path = self.of.explanation.paths[number - 1]
            y = block.height + row / 2
            line = Shape([("M", 0, y), ("L", 40, y)], None, "path", 3.6 if number == 1 else 2.6, dash_of(number))
            block.marks += [line, *badge(46, y, (number,))]
            weight = f"  ({DASH_WORDS[(number - 1) % len(DASHES)]}, weight {path.weight:.3g})"
            left = 46 + badge_width((number,)) + 6
            text = fit(str(path), width - left - text_width(weight, LABEL) * 72, LABEL)
            block.marks.append(Words(left, y, text + weight, LABEL, "faint", "start"))
            block.height += row
        return block


def _curve(one: Box, label: Box, two: Box) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Start, control point and end of a curve from a node past a label to a node.

    It leaves and reaches the nodes on the side of its control point; but where that would lead it through one of them,
    and hide the arrow behind it, on the side of the label.
    """
    middle = (label.x, label.y)
    bend = through((one.x, one.y), middle, (two.x, two.y))
    start, end = _border(one, bend), _border(two, bend)
    bend = through(start, middle, end)
    if not (_covers(two, start, bend, end) or _covers(one, end, bend, start)):
        return start, bend, end
    start, end = _border(one, middle), _border(two, middle)
    straight = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    for share in (1.0, 0.75, 0.5, 0.25):  # of the way from a straight line to one through the label
        towards = tuple(a + share * (b - a) for a, b in zip(straight, middle, strict=True))
        bend = through(start, (towards[0], towards[1]), end)
        head = any(_within(two, x, y) for _, x, y in arrow(bend, end, HEAD))
        if not (head or _covers(two, start, bend, end) or _covers(one, end, bend, start)):
            return start, bend, end
    return start, straight, end


def _covers(box: Box, start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether the last half of a curve to a node's border runs behind the node."""
    for step in range(10, 20):
        t = step / 20
        x, y = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in zip(start, bend, end, strict=True))
        if _within(box, x, y):
            return True
    return False


def _within(box: Box, x: float, y: float) -> bool:
    return abs(x - box.x) < box.width / 2 - 1 and abs(y - box.y) < box.height / 2 - 1


def _border(box: Box, towards: tuple[float, float]) -> tuple[float, float]:
    return clip((box.x, box.y), (box.width + 5, box.height + 5), towards, circle=not box.named)


def _node_title(node: NearNode, role: str) -> str:
    lines = [f"{node.number}: {clean(node.name)} ({role})"]
    if node.score is not None:
        lines.append(f"score {node.score:.3g}, place {node.rank:,} of all entities")
    if node.paths:
        lines.append(f"on path {', '.join(map(str, node.paths))}")
    lines.append(f"{node.degree:,} triple{'' if node.degree == 1 else 's'}")
    if node.num_documents:
        more = node.num_documents - len(node.documents)
        names = ", ".join(shorten(name, 40) for name in node.documents)
        lines.append(f"documents: {names}{f' and {more:,} more' if more else ''}")
    return "\n".join(lines)
