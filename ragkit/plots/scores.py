"""Scores of systems before and after: bars of chosen metrics, and recall over the cut-off k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ragkit.evaluation import EvaluationResult, Interval
from ragkit.plots.plot import Plot
from ragkit.plots.style import (
    INK,
    MARKERS,
    bar_look,
    drawing,
    empty,
    figures,
    legend_columns,
    legend_name,
    line_look,
    listing,
    new_figure,
    shorten,
)
from ragkit.units import counted

ACROSS = 20  # bars that have room for their numbers side by side
CHARS = 92  # of the metrics' names below them


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
                    label=None if named else legend_name(label, 40),
                )  # fmt: skip
                named = True
        axes.set_ylabel("mean on held-out questions")
        if axes.patches:
            _scale(axes, scores, metrics)
            names = [shorten(label, 40) for label in scores]
            figure.legend(loc="outside upper center", ncols=legend_columns(names, 4))
        else:
            empty(axes, "no system has a score")
        _name_metrics(axes, metrics)
    return Plot(figure, _words(scores, metrics), "Scores before and after")


def _scale(axes: Any, scores: Mapping[str, EvaluationResult], metrics: Sequence[str]) -> None:
    """The y axis, and the numbers on the bars: most metrics are shares, others can be anything."""
    drawn = [
        (place + (number - (len(scores) - 1) / 2) * 0.8 / len(scores), value)
        for number, result in enumerate(scores.values())
        for place, metric in enumerate(metrics)
        if (value := result.metrics.get(metric)) is not None and not math.isnan(value.mean)
    ]
    low, high = min(value.low for _, value in drawn), max(value.high for _, value in drawn)
    shares = low >= 0 and high <= 1
    low, high = (0.0, 1.0) if shares else (min(low, 0.0), max(high, 0.0))
    span = high - low or 1.0
    axes.set_ylim(low if low == 0 else low - 0.12 * span, high if high == 0 else high + 0.12 * span)
    upright = {"rotation": 90} if len(scores) * len(metrics) > ACROSS else {}
    for at, value in drawn:
        text = f"{value.mean:.2f}" if shares else figures(value.mean, 3)
        below = value.mean < 0
        y = value.low - 0.015 * span if below else value.high + 0.015 * span
        axes.text(at, y, text, ha="center", va="top" if below else "bottom", fontsize=8, **upright)
    if low < 0:
        axes.axhline(0, color=INK, linewidth=0.8)


def _name_metrics(axes: Any, metrics: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(metrics) - 0.5)
    names = [shorten(metric, 40) for metric in metrics]
    wide = max(map(len, names)) * len(names) > CHARS
    slanted: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    axes.set_xticks(range(len(names)), names, **slanted)


def _words(scores: Mapping[str, EvaluationResult], metrics: Sequence[str]) -> str:
    parts = []
    for metric in metrics:
        means = {label: result.metrics.get(metric) for label, result in scores.items()}
        shown = [f"{label} {m.mean:.2f}" for label, m in means.items() if m is not None and not math.isnan(m.mean)]
        parts.append(f"{metric}: {', '.join(shown)}" if shown else f"{metric}: no score")
    return f"Bars with 95 % intervals. {'; '.join(parts)}."


# ---- over k ----


def recall_curves(scores: Mapping[str, EvaluationResult], what: str = "recall") -> Plot:
    """A metric over its cut-off k, before and after, with the 95 % intervals of the means.

    Args:
        scores: Label -> scores.
        what: "recall", "all", "ndcg" or another NAME of metrics called NAME@k. "recall" also finds `doc_recall@k` and
            `ent_recall@k` of a GFM, which are drawn side by side.

    Returns:
        The picture.

    Raises:
        ValueError: No system, or none that has such a metric.
    """
    if not scores:
        raise ValueError("recall_curves: there is no system to draw")
    families = _families(scores, what)
    if not families:
        have = dict.fromkeys(name for result in scores.values() for name in result.metrics)
        raise ValueError(f"what: no system has {what}@k for any k; there are: {listing(list(have))}")
    with drawing():
        figure = new_figure(3.6)
        panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
        for axes, (family, ks) in zip(panels, families.items(), strict=True):
            _draw_family(axes, scores, family, ks)
        handles = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
        named = {name: handle for handle, name in handles}  # a system may be in one of the panels only
        if named:
            panels[0].legend(list(named.values()), list(named), loc="best")
        else:
            empty(panels[0], "no question has such a score")
    return Plot(figure, _family_words(scores, families), f"{what}@k")


def _families(scores: Mapping[str, EvaluationResult], what: str) -> dict[str, list[int]]:
    """Name before the "@" -> its cut-offs, of all systems together."""
    found: dict[str, set[int]] = {}
    for result in scores.values():
        for name in result.metrics:
            family, at, k = name.partition("@")
            if at and k.isdigit() and (family == what or family.endswith(f"_{what}")):
                found.setdefault(family, set()).add(int(k))
    # "filtered_hits" ends with "_hits" too, and so does "doc_filtered_hits"; that is what was asked for.
    return {family: sorted(ks) for family, ks in found.items()}


def _curve(result: EvaluationResult, family: str, ks: Sequence[int]) -> list[tuple[int, Interval]]:
    """(k, mean and interval) where the system has one."""
    pairs = [(k, result.metrics.get(f"{family}@{k}")) for k in ks]
    return [(k, value) for k, value in pairs if value is not None and not math.isnan(value.mean)]


def _draw_family(axes: Any, scores: Mapping[str, EvaluationResult], family: str, ks: Sequence[int]) -> None:
    # Places, not values of k: the first cut-offs lie close together and matter most.
    place = {k: i for i, k in enumerate(ks)}
    for number, (label, result) in enumerate(scores.items()):
        curve = _curve(result, family, ks)
        if not curve:
            continue
        look = line_look(number)
        # A little beside each other, so that the intervals of two systems can be told apart.
        at = [place[k] + 0.05 * (number - (len(scores) - 1) / 2) for k, _ in curve]
        mean, low, high = ([getattr(v, part) for _, v in curve] for part in ("mean", "low", "high"))
        axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0, gid=f"band-{number}")
        errors = [[m - lo for m, lo in zip(mean, low, strict=True)], [h - m for m, h in zip(mean, high, strict=True)]]
        axes.errorbar(
            at, mean, yerr=errors, **look, linewidth=2, elinewidth=1, capsize=3, marker=MARKERS[number % len(MARKERS)],
            markersize=5.5, label=legend_name(label, 32),
        )  # fmt: skip
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_xlabel("k, passages looked at" if not family.startswith("ent_") else "k, entities looked at")
    axes.set_ylabel(f"{family}@k, mean")
    axes.set_ylim(0, 1.04)
    axes.grid(axis="y")
    axes.tick_params(labelleft=True)


def _family_words(scores: Mapping[str, EvaluationResult], families: Mapping[str, Sequence[int]]) -> str:
    parts = []
    for family, ks in families.items():
        shown = ks if len(ks) <= 3 else [ks[0], ks[len(ks) // 2], ks[-1]]
        for k in shown:
            curves = {label: dict(_curve(result, family, [k])) for label, result in scores.items()}
            values = [f"{label} {c[k].mean:.2f} [{c[k].low:.2f}, {c[k].high:.2f}]" for label, c in curves.items() if c]
            if values:
                parts.append(f"{family}@{k}: {', '.join(values)}")
    counts = {len(result.ids) for result in scores.values()}
    questions = counted(max(counts), "question")
    questions = questions if len(counts) == 1 else f"{min(counts):,} to {questions}"
    return f"Mean over {questions} with 95 % interval. {'; '.join(parts) or 'no score'}."
