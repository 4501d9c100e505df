"""How values are spread: histograms of scores, losses or lengths."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from ragkit.plots.plot import Plot
from ragkit.plots.style import bar_look, drawing, empty, figures, legend_name, line_look, new_figure, one_line

BINS = 40  # at most
LABEL = 100  # characters in a line below the axis
UNEQUAL = 1.5  # ratio of the sizes from which on shares are drawn in place of counts


def histogram(
    series: Any, xlabel: str = "score", bins: int | None = None, share: bool | None = None, unit: str = "values"
) -> Plot:
    """Histograms over common bins: the first series as bars, the others as outlines on it.

    Values that are not finite are left out and counted in the description.

    Args:
        series: Values (a list, an array or a tensor of any shape), or label -> values.
        xlabel: What the values are, with their unit.
        bins: Number of bins; None: by the Freedman-Diaconis and Sturges rules, at most 40. Whole numbers with a
            small range get one bin each.
        share: Draws percent of each series in place of counts; None: where the series differ much in size.
        unit: What is counted, for example "questions".

    Returns:
        The picture.

    Raises:
        ValueError: No series, or values that are no numbers.

    Example:
        >>> histogram({"supporting": good, "others": rest}, xlabel="cosine", unit="passages")  # doctest: +SKIP
    """
    given = series if isinstance(series, Mapping) else {"": series}
    if not given:
        raise ValueError("series: there is nothing to draw")
    every = {str(label): _array(values, str(label)) for label, values in given.items()}
    kept = {label: values[np.isfinite(values)] for label, values in every.items()}
    sizes = [len(values) for values in kept.values() if len(values)]
    share = bool(sizes) and max(sizes) > UNEQUAL * min(sizes) if share is None else share
    edges = bin_edges(np.concatenate(list(kept.values())), bins)
    with drawing():
        figure = new_figure(3.2)
        axes = figure.subplots()
        if not sizes:
            empty(axes, "no finite value")
        else:
            looks = enumerate(kept.items())
            handles = [_draw(axes, values, edges, share, number, label) for number, (label, values) in looks]
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
        axes.set_xlabel(textwrap.fill(one_line(xlabel), LABEL))
        axes.set_ylabel(f"share of the {unit}" if share else f"number of {unit}")
        if not share and sizes:
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.set_major_formatter(lambda value, _: figures(value, 6))
        if share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        if sizes and any(kept):
            axes.legend(handles=handles, loc="best")
    return Plot(figure, _words(every, kept, xlabel, unit), f"Histogram of {xlabel}")


def _array(values: Any, label: str) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor, on whatever device and of whatever precision
        values = values.detach().cpu().double().numpy()
    try:
        return np.asarray(list(values) if not hasattr(values, "__array__") else values, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label or 'series'}: expected numbers, found {error}") from error


def bin_edges(values: np.ndarray, bins: int | None) -> np.ndarray:
    """[bins + 1] edges for finite values.

    Raises:
        ValueError: Fewer than one bin.
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins: expected at least 1, found {bins}")
    if not len(values):
        return np.array([0.0, 1.0])
    low, high = float(values.min()), float(values.max())
    if bins is None and high - low < BINS and np.array_equal(values, np.round(values)):
        return np.arange(low, high + 2) - 0.5
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):  # one value, up to rounding
        half = max(abs(low) * 1e-3, 0.5)
        return np.linspace(low - half, low + half, (bins or 1) + 1)
    if bins is None:
        width = high - low
        quartiles = np.quantile(values, [0.25, 0.75])
        freedman = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
        sturges = width / (np.log2(len(values)) + 1)
        step = min(freedman, sturges) if freedman > 0 else sturges
        bins = int(min(BINS, max(1, np.ceil(width / step))))
    return np.linspace(low, high, bins + 1)


def _draw(axes: Any, values: np.ndarray, edges: np.ndarray, share: bool, number: int, label: str) -> Any:
    counts = np.histogram(values, edges)[0].astype(np.float64)
    if share and len(values):
        counts /= len(values)
    name = f"{legend_name(label, 32)} (n = {len(values):,})" if label else None
    if number == 0:
        look = bar_look(1) | {"linewidth": 0.6}
        return axes.bar(edges[:-1], counts, np.diff(edges), align="edge", **look, label=name, gid="series-0")
    return axes.stairs(counts, edges, **line_look(number), linewidth=2, label=name, zorder=3, gid=f"series-{number}")


def _words(every: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray], xlabel: str, unit: str) -> str:
    parts = []
    for label, values in kept.items():
        begin = f"{label}: " if label else ""
        if not len(values):
            words = f"no finite value among {len(every[label]):,}"
        else:
            low, middle, high = np.quantile(values, [0, 0.5, 1])
            words = (
                f"{len(values):,} {unit}, median {figures(middle)}, mean {figures(values.mean())}, "
                f"from {figures(low)} to {figures(high)}"
            )
            if len(values) < len(every[label]):
                words += f" ({len(every[label]) - len(values):,} left out: not finite)"
        parts.append(f"{begin}{words}.")
    return f"Histogram of {xlabel}. {' '.join(parts)}"
