"""The paths of an explanation as a picture: SVG for a notebook, PNG for anything else."""

from __future__ import annotations

import io
import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ragkit.gfm.looks import DARK, LIGHT, SVG, Look, text_width
from ragkit.gfm.path_layout import Layout, lay_out
from ragkit.gfm.path_picture import Edge, Node, clean, label_of, picture_graph, shorten
from ragkit.optional import require
from ragkit.plots.fonts import families, no_word_of_fonts, page_fonts
from ragkit.units import counted

if TYPE_CHECKING:
    from ragkit.gfm.paths import Explanation

NODE_SIZE, LABEL_SIZE, TITLE_SIZE = 9.0, 7.5, 10.0  # points
LINE = 1.25  # of the font size
PORT = 0.11  # inches between two edges at a node
STUB = 0.18  # level run at a node, so that arrowheads lie level
MARGIN = 0.22
TITLE_CHARS = 90
ROUND = 0.2  # radius of a question entity's box


def draw_paths(explanation: Explanation, format: str = "svg", dark: bool = False) -> str | bytes:
    """Draws the paths: the question's entities on the left, what was scored on the right.

    An arrow goes from a triple's head to its tail, whichever way the path takes it. It is as wide and as deep in
    colour as the gradients of its edges are large, over all layers. The same explanation gives the same bytes (with
    one version of matplotlib), and the SVG needs nothing from outside; long names are shortened, the whole name is
    the tooltip.

    Args:
        explanation: What `explain` returned.
        format: "svg" or "png".
        dark: For a dark page.

    Returns:
        The SVG as text, or the PNG's bytes.

    Raises:
        ValueError: Another format.
        ImportError: matplotlib is not installed.
    """
    if format not in ("svg", "png"):
        raise ValueError(f'format: expected "svg" or "png", found {format!r}')
    matplotlib = require("matplotlib", extra="notebooks")
    settings = {"svg.hashsalt": "ragkit", "svg.fonttype": "none", "font.family": families()}
    with matplotlib.rc_context(settings), no_word_of_fonts():
        figure, titles = _figure(explanation, DARK if dark else LIGHT)
        file = io.BytesIO()
        if format == "png":
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
            return file.getvalue()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _finished_svg(file.getvalue(), titles, explanation)


def _figure(explanation: Explanation, look: Look) -> tuple[Any, dict[str, str]]:
    """The matplotlib figure, in inches, and group id -> tooltip."""
    nodes, edges = picture_graph(explanation)
    sizes = [_node_size(node) for node in nodes]
    texts = [label_of(edge) for edge in edges]
    labels = [_size(lines, LABEL_SIZE, 0.05, 0.03) for lines in texts]
    targets = [i for i, node in enumerate(nodes) if node.role == "target"]
    last = targets if len(targets) == 1 else ()  # a document's entities stay where their paths end
    layout = lay_out(sizes, [(e.start, e.end) for e in edges], labels, last)
    heading = [shorten(explanation.question, TITLE_CHARS)] if explanation.question else []
    heading.append(shorten(explanation.title, TITLE_CHARS))
    notes = [] if explanation.paths else textwrap.wrap(clean(explanation.note), TITLE_CHARS)
    top = len(heading) * TITLE_SIZE * LINE / 72 + 0.16
    bottom = 0.42 + len(notes) * NODE_SIZE * LINE / 72 + (0.14 if notes else 0)
    widest = max(text_width(line, TITLE_SIZE, line is heading[0]) for line in [*heading, *notes])
    inner = max(layout.width, widest, _legend_width(edges, explanation.target_kind))
    width, height = inner + 2 * MARGIN, layout.height + top + bottom + 2 * MARGIN
    figure = require("matplotlib.figure").Figure(figsize=(width, height), facecolor=look.ground)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    _move(layout, MARGIN + (inner - layout.width) / 2, MARGIN + bottom)
    y = height - MARGIN
    for i, line in enumerate(heading):
        weight = "bold" if i == 0 else "normal"
        _text(axes, MARGIN, y, line, TITLE_SIZE, look.text if i == 0 else look.faint, weight, "left", "top")
        y -= TITLE_SIZE * LINE / 72
    y = MARGIN + 0.42
    for line in reversed(notes):
        _text(axes, MARGIN, y, line, NODE_SIZE, look.faint, "normal", "left", "bottom")
        y += NODE_SIZE * LINE / 72
    titles: dict[str, str] = {}
    _draw_edges(axes, nodes, edges, texts, layout, look, titles)
    _draw_nodes(axes, nodes, layout, look, titles)
    _draw_legend(axes, edges, look, explanation.target_kind)
    return figure, titles


# ---- text and sizes ----


def _size(lines: Sequence[str], size: float, across: float, down: float) -> tuple[float, float]:
    """(width, height) in inches, with a margin on each side."""
    return max(text_width(line, size) for line in lines) + 2 * across, len(lines) * size * LINE / 72 + 2 * down


def _node_size(node: Node) -> tuple[float, float]:
    width, height = _size(node.lines, NODE_SIZE, 0.14, 0.075)
    return width, max(height, PORT * (max(node.ports) + 1))


def _move(layout: Layout, x: float, y: float) -> None:
    for item in layout.items:
        item.x += x
        item.y += y
    layout.columns = [(left + x, right + x) for left, right in layout.columns]


# ---- drawing ----


def _text(
    axes: Any, x: float, y: float, text: str, size: float, color: str, weight: str = "normal", ha: str = "center",
    va: str = "center_baseline", gid: str | None = None,
) -> None:  # fmt: skip
    axes.text(
        x, y, text, fontsize=size, color=color, fontweight=weight, ha=ha, va=va, gid=gid, parse_math=False, zorder=4
    )


def _draw_nodes(axes: Any, nodes: list[Node], layout: Layout, look: Look, titles: dict[str, str]) -> None:
    what = {"question": "entity of the question", "between": "entity on the way", "target": "what was scored"}
    for i, node in enumerate(nodes):
        item = layout.items[i]
        titles[f"node-{i}"] = f"{node.name} ({what[node.role]})"
        _box(axes, node.role, item.x, item.y, item.width, item.height, look, f"node-{i}")
        for number, line in enumerate(node.lines):
            y = item.y + ((len(node.lines) - 1) / 2 - number) * NODE_SIZE * LINE / 72
            _text(axes, item.x, y, line, NODE_SIZE, look.text, gid=f"node-{i}")


def _box(
    axes: Any, role: str, x: float, y: float, width: float, height: float, look: Look, gid: str | None = None
) -> None:
    """A question's entity is round, a target has sharp corners and a double line, the rest is plain."""
    patches = require("matplotlib.patches")
    face, edge = getattr(look, role)
    radius = {"question": min(height / 2, ROUND), "between": 0.05, "target": 0.0}[role]
    style = f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        patches.FancyBboxPatch(
            corner, width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.3, zorder=3, gid=gid
        )
    )
    if role == "target":
        line = 0.035
        axes.add_patch(
            patches.Rectangle(
                (corner[0] + line, corner[1] + line), width - 2 * line, height - 2 * line, fill=False,
                edgecolor=edge, linewidth=0.8, zorder=3, gid=gid,
            )
        )  # fmt: skip


def _draw_edges(
    axes: Any, nodes: list[Node], edges: list[Edge], texts: list[list[str]], layout: Layout, look: Look,
    titles: dict[str, str],
) -> None:  # fmt: skip
    patches = require("matplotlib.patches")
    most = max((abs(edge.total) for edge in edges), default=0.0) or 1.0
    ports = _ports(nodes, layout)
    for i in sorted(range(len(edges)), key=lambda i: abs(edges[i].total)):  # the widest on top
        edge, chain = edges[i], layout.chains[i]
        share = abs(edge.total) / most
        color = _color(look, "raises" if edge.total >= 0 else "lowers", share)
        rightwards = (chain[0] == edge.start) == edge.forward
        route = _route(layout, chain, ports[i], rightwards)
        axes.add_patch(
            patches.FancyArrowPatch(
                path=route, arrowstyle=f"-|>,head_length={4 + 3 * share:.2f},head_width={2 + 1.6 * share:.2f}",
                mutation_scale=1, linewidth=_line_width(share), edgecolor=color, facecolor=color, shrinkA=0, shrinkB=0,
                capstyle="butt", joinstyle="miter", zorder=1 + share / 2, gid=f"edge-{i}",
            )
        )  # fmt: skip
        head, tail = (edge.start, edge.end) if edge.forward else (edge.end, edge.start)
        titles[f"edge-{i}"] = "\n".join(
            f"{nodes[head].name} \u2014 {name} \u2192 {nodes[tail].name}: {total:.3g} "
            f"(layer {', '.join(map(str, sorted(edge.layers[name])))})"
            for name, total in edge.relations.items()
        )
        item = layout.items[layout.labels[i]]
        axes.add_patch(
            patches.Rectangle(
                (item.x - item.width / 2, item.y - item.height / 2), item.width, item.height, facecolor=look.ground,
                edgecolor="none", zorder=2, gid=f"edge-{i}",
            )
        )  # fmt: skip
        for number, line in enumerate(texts[i]):
            y = item.y + ((len(texts[i]) - 1) / 2 - number) * LABEL_SIZE * LINE / 72
            _text(axes, item.x, y, line, LABEL_SIZE, look.text, gid=f"edge-{i}")


def _ports(nodes: list[Node], layout: Layout) -> list[tuple[float, float]]:
    """For each edge how far above the middle it leaves its left node, and enters its right one."""
    found = [[0.0, 0.0] for _ in layout.chains]
    for side, (end, neighbour) in enumerate(((0, 1), (-1, -2))):
        at: dict[int, list[int]] = {}
        for i, chain in enumerate(layout.chains):
            at.setdefault(chain[end], []).append(i)
        for members in at.values():
            members.sort(key=lambda i: layout.items[layout.chains[i][neighbour]].y)
            for place, i in enumerate(members):
                found[i][side] = (place - (len(members) - 1) / 2) * PORT
    return [(a, b) for a, b in found]


def _route(layout: Layout, chain: list[int], port: tuple[float, float], rightwards: bool) -> Any:
    """A smooth line through the chain: level within a column, an S between two."""
    Path = require("matplotlib.path").Path
    first, last = layout.items[chain[0]], layout.items[chain[-1]]
    points = [(first.x + first.width / 2, first.y + port[0])]
    points.append((layout.columns[first.column][1] + STUB, points[0][1]))
    for i in chain[1:-1]:
        item = layout.items[i]
        points += [(x, item.y) for x in layout.columns[item.column]]
    end = (last.x - last.width / 2, last.y + port[1])
    points += [(layout.columns[last.column][0] - STUB, end[1]), end]
    vertices, codes = [points[0]], [Path.MOVETO]
    for number, ((x0, y0), (x1, y1)) in enumerate(zip(points[:-1], points[1:], strict=True)):
        if number % 2 == 0:
            level = math.isclose(x0, x1)
            vertices += [] if level else [(x1, y1)]
            codes += [] if level else [Path.LINETO]
        else:
            middle = (x0 + x1) / 2
            vertices += [(middle, y0), (middle, y1), (x1, y1)]
            codes += [Path.CURVE4] * 3
    if rightwards:
        return Path(vertices, codes)
    return Path(vertices[::-1], [Path.MOVETO, *codes[:0:-1]])


def _line_width(share: float) -> float:
    """Points, for a contribution's share of the largest."""
    return 0.9 + 2.9 * share


def _color(look: Look, what: str, share: float) -> str:
    """Between the least and the most of "raises" or "lowers"."""
    least, most = look.raises if what == "raises" else look.lowers
    pairs = zip(bytes.fromhex(least[1:]), bytes.fromhex(most[1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


# ---- legend ----


def _legend(edges: list[Edge], kind: str) -> list[tuple[str, str]]:
    target = "scored entity" if kind == "entity" else "entity of the scored document"
    items = [("question", "entity of the question"), ("between", "on the way"), ("target", target)]
    signs = {edge.total >= 0 for edge in edges}
    items += [("raises", "raises the score, in all layers: little \u2026 much")] if True in signs else []
    return items + ([("lowers", "lowers the score")] if False in signs else [])


def _legend_width(edges: list[Edge], kind: str) -> float:
    return sum(0.62 + text_width(text, LABEL_SIZE) for _, text in _legend(edges, kind)) - 0.23


def _draw_legend(axes: Any, edges: list[Edge], look: Look, kind: str) -> None:
    patches = require("matplotlib.patches")
    x, y = MARGIN, MARGIN + 0.1
    for what, text in _legend(edges, kind):
        if what in ("raises", "lowers"):
            for k in range(16):
                line, color = _line_width(k / 15), _color(look, what, k / 15)
                axes.add_patch(
                    patches.Rectangle((x + k * 0.02, y - line / 144), 0.02, line / 72, color=color, linewidth=0)
                )
        else:
            _box(axes, what, x + 0.16, y, 0.32, 0.17, look)
        _text(axes, x + 0.39, y, text, LABEL_SIZE, look.faint, ha="left")
        x += 0.62 + text_width(text, LABEL_SIZE)


# ---- SVG ----


def _finished_svg(raw: bytes, titles: dict[str, str], explanation: Explanation) -> str:
    """Tooltips in, what is not needed out, and a name for screen readers."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(raw)
    for child in [c for c in root if c.tag == f"{{{SVG}}}metadata"]:
        root.remove(child)
    for group in root.iter(f"{{{SVG}}}g"):
        name = group.get("id", "")
        if name in titles:
            title = ET.Element(f"{{{SVG}}}title")
            title.text = titles[name]
            group.insert(0, title)
        group.attrib.pop("id", None)  # two pictures on one page must not share ids
    for text in root.iter(f"{{{SVG}}}text"):
        text.set("style", page_fonts(text.get("style", "")))
    label = clean(f"{counted(len(explanation.paths), 'path')} to {explanation.title}")
    if explanation.question:
        label += f", for the question: {clean(explanation.question)}"
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("style", "max-width:100%;height:auto")
    title = ET.Element(f"{{{SVG}}}title")
    title.text = label
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")
