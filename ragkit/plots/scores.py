"""Scores of systems before and after: bars of chosen metrics, and recall over the cut-off k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ragkit.evaluation import EvaluationResult
from ragkit.plots.plot import Plot
from ragkit.plots.style import INK, bar_look, drawing, new_figure, shorten


def before_after(
    scores: Mapping[str, EvaluationResult], metrics: Sequence[str] = ("recall@1", "mrr", "em", "f1")
) -> Plot:
    """Bars of several systems side by side, with the 95 % interval of each mean.

    Args:
        scores: Label -> scores; a metric that a system does not have is left out.
        metrics: What to draw, left to right.

    Returns:
        The picture.

    Raises:
        ValueError: No system or no metric.
    """
    if not scores or not metrics:
        raise ValueError(
            "before_after: there is no system to draw" if not scores else "metrics: there is none to draw"
        )
    with drawing():
        figure = new_figure(3.6)
        axes = figure.subplots()
        width = 0.8 / len(scores)
        for number, (label, result) in enumerate(scores.items()):
            named = False
            for place, metric in enumerate(metrics):
                value = result.metrics.get(metric)
                if value is None or math.isnan(value.mean):
                    continue
                at = place + (number - (len(scores) - 1) / 2) * width
                axes.bar(
                    at, value.mean, width * 0.92, yerr=[[value.mean - value.low], [value.high - value.mean]],
                    **bar_look(number), error_kw={"elinewidth": 1, "capsize": 2, "ecolor": INK},
                    label=None if named else shorten(label, 40),
                )  # fmt: skip
                named = True
                axes.text(at, value.high + 0.015, f"{value.mean:.2f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(metrics)), metrics)
        axes.set_ylim(0, 1.12)
        axes.set_ylabel("mean on held-out questions")
        figure.legend(loc="outside upper center", ncols=min(4, len(scores)))
    return Plot(figure, _words(scores, metrics), "Scores before and after")


def _words(scores: Mapping[str, EvaluationResult], metrics: Sequence[str]) -> str:
    parts = []
    for metric in metrics:
        means = {label: result.metrics.get(metric) for label, result in scores.items()}
        shown = [f"{label} {m.mean:.2f}" for label, m in means.items() if m is not None and not math.isnan(m.mean)]
        parts.append(f"{metric}: {', '.join(shown)}" if shown else f"{metric}: no score")
    return f"Bars with 95 % intervals. {'; '.join(parts)}."
