"""Outlines and ends of lines for pictures of graphs, in pixels from the upper left."""

from __future__ import annotations

import math

from ragkit.gfm.picture import Step

Point = tuple[float, float]


def rectangle(x: float, y: float, width: float, height: float, radius: float) -> list[Step]:
    """Around a centre, with round corners."""
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if radius <= 0:
        return [("M", left, top), ("L", right, top), ("L", right, bottom), ("L", left, bottom), ("Z",)]
    r = min(radius, width / 2, height / 2)
    k = 0.4477 * r  # a cubic curve that is nearly a quarter of a circle
    return [
        ("M", left + r, top),
        ("L", right - r, top),
        ("C", right - k, top, right, top + k, right, top + r),
        ("L", right, bottom - r),
        ("C", right, bottom - k, right - k, bottom, right - r, bottom),
        ("L", left + r, bottom),
        ("C", left + k, bottom, left, bottom - k, left, bottom - r),
        ("L", left, top + r),
        ("C", left, top + k, left + k, top, left + r, top),
        ("Z",),
    ]


def hexagon(x: float, y: float, width: float, height: float, point: float) -> list[Step]:
    """A rectangle with points to the left and to the right."""
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    upper: list[Step] = [("M", left, y), ("L", left + point, top), ("L", right - point, top), ("L", right, y)]
    return [*upper, ("L", right - point, bottom), ("L", left + point, bottom), ("Z",)]


def loop(x: float, y: float, width: float, height: float) -> list[Step]:
    """From a box to itself, over its upper right corner."""
    right, top = x + width / 2, y - height / 2
    curve: Step = ("C", right - 8, top - 16, right + 16, top - 8, right + 2, top + 6)
    return [("M", right - 8, top - 2), curve, *arrow((right + 12, top - 6), (right + 2, top + 6), 6.0)]


def arrow(start: Point, end: Point, size: float) -> list[Step]:
    """An open head at `end`, of a line that comes from `start`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.sqrt(dx * dx + dy * dy) or 1.0
    dx, dy = dx / length * size, dy / length * size
    one = (end[0] - dx - dy * 0.45, end[1] - dy + dx * 0.45)
    two = (end[0] - dx + dy * 0.45, end[1] - dy - dx * 0.45)
    return [("M", *one), ("L", *end), ("L", *two)]


def through(start: Point, middle: Point, end: Point) -> Point:
    """Where the control point must be for a quadratic curve that passes `middle` half way."""
    return 2 * middle[0] - (start[0] + end[0]) / 2, 2 * middle[1] - (start[1] + end[1]) / 2


def clip(centre: Point, size: Point, towards: Point, circle: bool = False) -> Point:
    """Where the way from a box's centre leaves it; the centre where `towards` lies within."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    if circle:
        length = math.sqrt(dx * dx + dy * dy)
        share = size[0] / 2 / length if length else 0.0
    else:
        share = min(size[0] / 2 / abs(dx) if dx else math.inf, size[1] / 2 / abs(dy) if dy else math.inf)
    share = share if share < 1 else 0.0
    return centre[0] + dx * share, centre[1] + dy * share
