"""A picture as a list of shapes and words, written as SVG or as PNG."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkit.gfm.looks import SVG
from ragkit.gfm.path_picture import clean
from ragkit.optional import require
from ragkit.plots.fonts import FONTS, families, no_word_of_fonts
from ragkit.plots.palette import palette_png

Step = tuple[Any, ...]  # ("M", x, y), ("L", x, y), ("Q", x, y, x, y), ("C", x, y, x, y, x, y) or ("Z",)


@dataclass
class Shape:
    """A line or an area, in pixels from the upper left.

    Attributes:
        steps: Its outline.
        fill, stroke: Names of colours, or None.
        width: Of the line.
        dash: Lengths of dashes and gaps; () for a whole line.
        opacity: Of the fill.
    """

    steps: Sequence[Step]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0


@dataclass
class Words:
    """One line of text; y is its middle."""

    x: float
    y: float
    text: str
    size: float
    color: str = "ink"
    anchor: str = "middle"
    bold: bool = False


@dataclass
class Group:
    """What has one tooltip."""

    marks: list[Shape | Words] = field(default_factory=list)
    title: str = ""


def to_svg(groups: Iterable[Group], size: tuple[float, float], colors: Mapping[str, str], label: str) -> str:
    """The picture as an `<svg>` element that needs nothing from outside and has no ids.

    Args:
        groups: In the order of drawing.
        size: Width and height.
        colors: Name -> CSS colour; one that is not there stays as it is. "ground" fills the picture if it is there.
        label: What it shows, in words, for screen readers.
    """
    ET.register_namespace("", SVG)
    width, height = (f"{round(value)}" for value in size)
    root = ET.Element(f"{{{SVG}}}svg", {"viewBox": f"0 0 {width} {height}", "width": width, "height": height})
    root.set("role", "img")
    root.set("aria-label", clean(label))
    root.set("style", f"max-width:100%;height:auto;font-family:{FONTS}")
    if "paper" in colors:
        ET.SubElement(root, f"{{{SVG}}}rect", {"width": width, "height": height, "fill": colors["paper"]})
    for group in groups:
        parent = ET.SubElement(root, f"{{{SVG}}}g")
        if group.title:
            title = ET.SubElement(parent, f"{{{SVG}}}title")
            title.text = "\n".join(clean(line) for line in group.title.split("\n"))
        for mark in group.marks:
            _svg_words(parent, mark, colors) if isinstance(mark, Words) else _svg_shape(parent, mark, colors)
    return ET.tostring(root, encoding="unicode")


def _svg_words(parent: ET.Element, mark: Words, colors: Mapping[str, str]) -> None:
    y = mark.y + 0.35 * mark.size  # half the height of a capital
    element = ET.SubElement(parent, f"{{{SVG}}}text", {"x": _number(mark.x), "y": _number(y)})
    element.set("font-size", _number(mark.size))
    if mark.anchor != "start":
        element.set("text-anchor", mark.anchor)
    if mark.bold:
        element.set("font-weight", "bold")
    element.set("style", f"fill:{colors.get(mark.color, mark.color)}")
    element.text = clean(mark.text)


def _svg_shape(parent: ET.Element, mark: Shape, colors: Mapping[str, str]) -> None:
    d = "".join(step[0] + " ".join(map(_number, step[1:])) for step in mark.steps)
    style = f"fill:{'none' if mark.fill is None else colors.get(mark.fill, mark.fill)}"
    element = ET.SubElement(parent, f"{{{SVG}}}path", {"d": d})
    if mark.stroke is not None:
        style += f";stroke:{colors.get(mark.stroke, mark.stroke)}"
        element.set("stroke-width", _number(mark.width))
    if mark.dash:
        element.set("stroke-dasharray", " ".join(map(_number, mark.dash)))
    if mark.opacity != 1:
        element.set("fill-opacity", _number(mark.opacity))
    element.set("style", style)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) >= 0.005 else "0"


def to_png(groups: Iterable[Group], size: tuple[float, float], colors: Mapping[str, str], scale: float = 2.0) -> bytes:
    """The same as PNG, on the ground "paper".

    Args:
        groups, size: As in `to_svg`.
        colors: Name -> colour as matplotlib takes it.
        scale: Pixels of the PNG for each pixel of the SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="notebooks")
    file = io.BytesIO()
    settings = {"font.family": families(), "lines.scale_dashes": False}
    with matplotlib.rc_context(settings), no_word_of_fonts():
        width, height = (round(value) for value in size)
        figure = require("matplotlib.figure").Figure(figsize=(width / 72, height / 72), facecolor=colors["paper"])
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        place = 0
        for group in groups:
            for mark in group.marks:
                place += 1
                _png_mark(axes, mark, colors, place)
        figure.savefig(file, format="png", dpi=72 * scale, metadata={"Software": None})
    image = require("PIL.Image", extra="notebooks", package="pillow")
    return palette_png(image.open(file).convert("RGB"))


def _png_mark(axes: Any, mark: Shape | Words, colors: Mapping[str, str], place: int) -> None:
    if isinstance(mark, Words):
        axes.text(
            mark.x,
            mark.y + 0.35 * mark.size,
            clean(mark.text),
            fontsize=mark.size,
            color=colors.get(mark.color, mark.color),
            fontweight="bold" if mark.bold else "normal",
            ha={"middle": "center", "start": "left", "end": "right"}[mark.anchor],
            va="baseline",
            parse_math=False,
            zorder=place,
        )
        return
    Path = require("matplotlib.path").Path
    kinds = {"M": [Path.MOVETO], "L": [Path.LINETO], "Q": [Path.CURVE3] * 2, "C": [Path.CURVE4] * 3}
    vertices: list[tuple[float, float]] = []
    codes: list[Any] = []
    for step in mark.steps:
        if step[0] == "Z":
            vertices.append(vertices[-1])
            codes.append(Path.CLOSEPOLY)
            continue
        vertices += list(zip(step[1::2], step[2::2], strict=True))
        codes += kinds[step[0]]
    face = "none" if mark.fill is None else colors.get(mark.fill, mark.fill)
    patch = require("matplotlib.patches").PathPatch(
        Path(vertices, codes),
        facecolor=face,
        edgecolor="none" if mark.stroke is None else colors.get(mark.stroke, mark.stroke),
        linewidth=mark.width if mark.stroke is not None else 0,
        linestyle=(0, mark.dash) if mark.dash else "-",
        capstyle="butt",
        zorder=place,
    )
    if mark.opacity != 1:
        patch.set_alpha(mark.opacity)
    axes.add_patch(patch)
