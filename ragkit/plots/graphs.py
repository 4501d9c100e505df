"""The shape of a graph: how many triples its entities are in, and how often its relations occur."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ragkit.plots.plot import Plot
from ragkit.plots.style import (
    MARKERS,
    bar_look,
    drawing,
    empty,
    figures,
    legend_name,
    line_look,
    listing,
    new_figure,
    plain_ticks,
    shorten,
)
from ragkit.units import counted

SMALL = 12  # largest degree up to which plain scales show more than logarithmic ones
POINTS = 300  # of a curve
NAME_WIDTH = 34


def degree_distribution(graph: Any) -> Plot:
    """How many entities have a degree of at least d, for every d.

    The degree of an entity is the number of triple ends that are on it. A straight line on these logarithmic scales
    is a power law: few hubs, many entities with one or two triples. Small graphs get plain scales.

    Args:
        graph: A `KnowledgeGraph` (anything with `entities`, `head` and `tail`), or label -> graph.

    Returns:
        The picture. Entities without a triple have no place on a logarithmic scale and are counted in the legend.

    Raises:
        ValueError: No graph.
    """
    graphs = {str(k): v for k, v in graph.items()} if isinstance(graph, Mapping) else {"": graph}
    if not graphs:
        raise ValueError("graph: there is none to draw")
    degrees = {label: degrees_of(g) for label, g in graphs.items()}
    most = max((int(d.max()) for d in degrees.values() if len(d)), default=0)
    with drawing():
        figure = new_figure(3.3)
        axes = figure.subplots()
        for number, (label, degree) in enumerate(degrees.items()):
            if len(degree) and degree.max() > 0:
                _draw_degrees(axes, degree, label, number, most <= SMALL)
        if most == 0:
            empty(axes, "there is no triple")
        else:
            _scales(axes, most)
            if len(graphs) == 1:
                _name_hub(axes, next(iter(graphs.values())), next(iter(degrees.values())))
            axes.legend(loc="upper right" if most > SMALL else "best")
        axes.set_xlabel("degree d (triple ends on an entity)" + (", log scale" if most > SMALL else ""))
        axes.set_ylabel("entities with degree ≥ d" + (", log scale" if most > SMALL else ""))
    words = [_degree_words(label, degree, graphs[label]) for label, degree in degrees.items()]
    return Plot(figure, f"Degrees of entities. {' '.join(words)}", "Degree distribution")


def degrees_of(graph: Any) -> np.ndarray:
    """[N] int64 degrees."""
    n = len(graph.entities)
    return np.bincount(np.asarray(graph.head), minlength=n) + np.bincount(np.asarray(graph.tail), minlength=n)


def at_least(degree: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(degrees that occur, without 0; how many entities have at least that degree)."""
    counts = np.bincount(degree)
    counts[:1] = 0
    found = np.flatnonzero(counts)
    return found, counts[::-1].cumsum()[::-1][found]


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of them, evenly spaced on the logarithmic scale, with both ends."""
    if len(x) <= POINTS:
        return x, y
    wanted = np.geomspace(x[0], x[-1], POINTS)
    kept = np.unique(np.searchsorted(x, wanted).clip(0, len(x) - 1))
    return x[kept], y[kept]


def _draw_degrees(axes: Any, degree: np.ndarray, label: str, number: int, small: bool) -> None:
    if small:  # a plain scale has a place for 0
        y = np.bincount(degree)[::-1].cumsum()[::-1]
        x = np.arange(len(y))
    else:
        x, y = _thin(*at_least(degree))
    isolated = int((degree == 0).sum())
    name = f"{legend_name(label, 32) + ': ' if label else ''}{len(degree):,} entities"
    name += f", {isolated:,} of them in no triple" if isolated else ""
    few = len(x) <= 40
    axes.plot(
        x, y, **line_look(number), linewidth=1.2 if few else 2, drawstyle="steps-pre" if small else None,
        marker=MARKERS[number % len(MARKERS)] if few else None, markersize=5, label=name, gid=f"degrees-{number}",
    )  # fmt: skip


def _scales(axes: Any, most: int) -> None:
    if most > SMALL:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis)
        axes.set_ylim(bottom=0.45)  # room for a name below the end of the curve
        axes.grid()
        return
    axes.set_xlim(0, most + 1)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")


def _name_hub(axes: Any, graph: Any, degree: np.ndarray) -> None:
    """Names the entity with the most triples."""
    if not len(degree) or degree.max() == 0:
        return
    hub = int(degree.argmax())
    many = axes.get_xscale() == "log"
    axes.annotate(
        f"most: {shorten(graph.entities[hub], 28)}", (int(degree[hub]), int((degree >= degree[hub]).sum())),
        xytext=(-9, -1) if many else (4, 6), textcoords="offset points", ha="right" if many else "left",
        va="top" if many else "bottom", fontsize=8,
    )  # fmt: skip


def _degree_words(label: str, degree: np.ndarray, graph: Any) -> str:
    begin = f"{label}: " if label else ""
    if not len(degree):
        return f"{begin}no entity."
    hub = int(degree.argmax())
    words = f"{begin}{len(degree):,} entities, median degree {int(np.quantile(degree, 0.5, method='inverted_cdf')):,}"
    if degree[hub]:
        words += f", largest {int(degree[hub]):,} ({shorten(graph.entities[hub], 40)})"
    isolated = int((degree == 0).sum())
    return words + (f", {isolated:,} in no triple." if isolated else ".")


# ---- relations ----


def relation_distribution(graph: Any, top: int = 12) -> Plot:
    """How many triples each relation has: the most frequent ones, and the others together.

    Args:
        graph: A `KnowledgeGraph` (anything with `relations` and `relation`).
        top: Relations shown with their name.

    Returns:
        The picture.

    Raises:
        ValueError: `top` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1, found {top}")
    names = list(graph.relations)
    uses = np.bincount(np.asarray(graph.relation), minlength=len(names))
    order = np.argsort(-uses, kind="stable")
    if len(order) == top + 1:
        top += 1  # a last bar for a single relation may as well have its name
    shown, rest = order[:top], order[top:]
    with drawing():
        figure = new_figure(0.75 + 0.235 * max(4, len(shown) + bool(len(rest))))
        axes = figure.subplots()
        if not uses.sum():
            empty(axes, "there is no triple")
        else:
            _draw_relations(axes, [names[int(i)] for i in shown], uses[shown], int(uses[rest].sum()), len(rest))
        axes.set_xlabel("triples")
    return Plot(figure, _relation_words(names, uses, shown, rest), "Relation distribution")


def _draw_relations(axes: Any, names: list[str], uses: np.ndarray, rest: int, others: int) -> None:
    total = int(uses.sum()) + rest
    labels = [shorten(name, NAME_WIDTH) or "(no name)" for name in names]
    axes.barh(range(len(names)), uses, 0.78, **bar_look(2), gid="relations")
    values = [int(value) for value in uses]
    if others:
        labels.append(f"{others:,} others together")
        axes.barh(len(names), rest, 0.78, **bar_look(3) | {"hatch": "////"})
        values.append(rest)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:,} ({figures(100 * value / total)} %)", (value, place), xytext=(4, 0), textcoords="offset points",
            va="center", ha="left", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(values))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: figures(value, 6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _relation_words(names: list[str], uses: np.ndarray, shown: np.ndarray, rest: np.ndarray) -> str:
    total = int(uses.sum())
    words = f"{counted(len(names), 'relation')} in {counted(total, 'triple')}."
    if not total:
        return words
    first = [f"{shorten(names[int(i)], 40)} {figures(100 * uses[i] / total)} %" for i in shown[:3]]
    words += f" Most frequent: {listing(first)}."
    if len(rest):
        words += f" The {len(rest):,} least frequent have {figures(100 * uses[rest].sum() / total)} % together."
    return words
