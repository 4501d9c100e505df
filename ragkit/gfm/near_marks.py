"""Parts of a neighbourhood's picture: boxes, badges, samples and blocks of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ragkit.gfm.looks import text_width
from ragkit.gfm.near_shapes import arrow, hexagon, rectangle
from ragkit.gfm.path_picture import clean, shorten
from ragkit.gfm.picture import Group, Shape, Words

NAME, LABEL, SMALL, TITLE = 12.0, 10.5, 8.5, 14.0  # pixels
LINE = 1.25
RADIUS = 10.0  # of a numbered circle
DASHES: tuple[tuple[float, ...], ...] = ((), (10, 4), (3, 3), (10, 3, 3, 3), (16, 4, 3, 4))
DASH_WORDS = ("solid", "dashed", "dotted", "dash and dot", "long dash and dot")


@dataclass
class Box:
    """A node or a label with its place.

    Attributes:
        lines: Text; of a node without its name, the number.
        width, height: Pixels.
        x, y: Centre.
        named: Whether it is more than a circle.
    """

    lines: list[str]
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    named: bool = True


class Block(Group):
    """Marks under one another, from (0, 0); `height` is where the next one goes."""

    height: float = 0.0

    def line(self, words: Words) -> None:
        """Adds a line of text."""
        words.y = self.height + words.size * LINE / 2
        self.height += words.size * LINE + 2
        self.marks.append(words)

    def moved(self, x: float, y: float) -> Group:
        """The marks at another place."""
        for mark in self.marks:
            if isinstance(mark, Words):
                mark.x, mark.y = mark.x + x, mark.y + y
            else:
                shift = (x, y)
                mark.steps = [(s[0], *(v + shift[i % 2] for i, v in enumerate(s[1:]))) for s in mark.steps]
        return self


def outline(box: Box, role: str) -> list[Shape | Words]:
    """A question's entity has round ends, what was scored a double line, a path's has points; others are plain."""
    x, y, width, height = box.x, box.y, box.width, box.height
    if not box.named:
        steps = rectangle(x, y, width, height, RADIUS)
    elif role == "path":
        steps = hexagon(x, y, width, height, 8)
    else:
        steps = rectangle(x, y, width, height, {"question": height / 2, "answer": 0, "other": 4}[role])
    marks: list[Shape | Words] = [Shape(steps, "ground")]
    if role != "other":
        marks.append(Shape(steps, role, opacity=0.16))
    marks.append(Shape(steps, None, role, 1.0 if role == "other" else 2.0))
    if role == "answer":
        marks.append(Shape(rectangle(x, y, width - 7, height - 7, 0), None, role, 1.0))
    return marks


def sample(what: str, x: float, y: float) -> list[Shape | Words]:
    """What the legend shows of a role or of a line."""
    if what == "thin":
        return [Shape([("M", x - 17, y), ("L", x + 17, y), *arrow((x - 17, y), (x + 17, y), 6.0)], stroke="line")]
    if what == "circle":
        return [Shape(rectangle(x, y, 17, 17, 8.5), None, "other", 1.0), Words(x, y, "7", SMALL, "outside")]
    return outline(Box([], 32, 16, x, y), what)


def badge(left: float, y: float, numbers: tuple[int, ...]) -> list[Shape | Words]:
    """The numbers of paths on a round ground; `left` is its left end."""
    width = badge_width(numbers)
    shape = Shape(rectangle(left + width / 2, y, width, 13, 6.5), "badge")
    return [shape, Words(left + width / 2, y, badge_text(numbers), SMALL, "badge-ink", "middle", True)]


def badge_width(numbers: tuple[int, ...]) -> float:
    """Pixels."""
    return max(13.0, math.ceil(text_width(badge_text(numbers), SMALL, True) * 72) + 8)


def badge_text(numbers: tuple[int, ...]) -> str:
    """At most four numbers."""
    shown = ", ".join(map(str, numbers[:4]))
    return shown + (" \u2026" if len(numbers) > 4 else "")


def dash_of(number: int) -> tuple[float, ...]:
    """The kind of line of a path."""
    return DASHES[(number - 1) % len(DASHES)]


def widest(lines: list[str], size: float) -> float:
    """Pixels of the longest of bold lines."""
    return float(math.ceil(max(text_width(line, size, True) for line in lines) * 72))


def fit(text: str, width: float, size: float, bold: bool = False) -> str:
    """As much of a text as fits."""
    text = clean(text)
    while text_width(text, size, bold) * 72 > width and len(text) > 8:
        text = shorten(text, max(8, min(len(text) - 1, int(len(text) * width / (text_width(text, size, bold) * 72)))))
    return text
