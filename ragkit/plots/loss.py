"""Loss curves: what the loss, the learning rate and the evaluations of trainings did, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.plots.curves import POINTS, SPAN, Curves, Series, envelope, is_noisy, read_curves, smooth, thin
from ragkit.plots.plot import Plot
from ragkit.plots.style import (
    DASHES,
    HEIGHT,
    INK,
    LINES,
    MARKERS,
    RAW,
    drawing,
    figures,
    legend_columns,
    legend_name,
    line_look,
    listing,
    new_figure,
    plain_ticks,
    shorten,
)
from ragkit.runs import Run
from ragkit.units import counted

FEW = 12  # points up to which each gets a marker
MANY = 6  # runs; of more, the names stand below the picture, not on the curves
METRICS = 3  # shown of one run, if none are asked for
WIDE = 50.0  # ratio of the largest to the smallest loss from which on the scale is logarithmic
# Of which metrics to show the first ones, if none are asked for.
PREFERRED = ("mrr", "recall", "f1", "em", "hits", "ndcg", "all")
LEAST = ("loss", "kl", "perplexity", "ppl", "rank", "error")  # smaller is better


def loss_curves(runs: Any, metric: str | Sequence[str] | None = None, ylabel: str = "loss") -> Plot:
    """The loss of trainings over their steps, their learning rate below, their evaluations beside it.

    A noisy loss is drawn thin, and over it its exponential moving average, as LLaMA Board does (span: a twentieth of
    the points, at least 8; without bias towards the first value). Steps whose loss is not a finite number are marked.
    Where steps come twice (a resumed run), the later ones count.

    Args:
        runs: A run, or label -> run. A run is a `Run`, a run folder, a `TrainResult`, or a list of events.
        metric: Which evaluations to draw, with or without `eval_`; None: of one run up to three, of several runs
            one. "eval_loss" is drawn with the loss.
        ylabel: What the loss is, with its unit, for example "KL in nats".

    Returns:
        The picture.

    Raises:
        ValueError: No run, a metric that no run has, or something that is not a run.
        RunError: A folder that is no run, or with a corrupt file.

    Example:
        >>> loss_curves({"replug": "runs/lsr-1", "ra_dit": "runs/lsr-2"}, metric="recall@5")  # doctest: +SKIP
    """
    given = runs if isinstance(runs, Mapping) else {_name(runs): runs}
    if not given:
        raise ValueError("runs: there is no run to draw")
    curves = {str(label): read_curves(events_of(run, str(label))) for label, run in given.items()}
    chosen, left_out = _choose(curves, metric)
    with drawing():
        names = [shorten(label, 36) for label in curves]
        below = math.ceil(len(names) / legend_columns(names, 3)) if len(names) > MANY else 0  # lines of the legend
        figure = new_figure(HEIGHT + 0.19 * below)
        main, rate, panel = _axes(figure, any(c.learning_rate.steps.size for c in curves.values()), bool(chosen))
        _draw_losses(main, curves, ylabel)
        if rate is not None:
            _draw_rates(rate, curves)
        (rate or main).set_xlabel("step")
        if panel is not None:
            _draw_metrics(panel, curves, chosen)
    return Plot(figure, _words(curves, chosen, left_out, ylabel), "Loss curves")


def events_of(run: Any, label: str = "") -> list[Mapping[str, Any]]:
    """The events of a `Run`, a run folder, a `TrainResult` or a list of events.

    Raises:
        ValueError: Something else.
    """
    if isinstance(run, str | Path):
        return list(Run.open(run).events())
    events = run.events() if callable(getattr(run, "events", None)) else getattr(run, "history", run)
    if isinstance(events, Sequence) and not isinstance(events, str):
        wrong = [type(event).__name__ for event in events if not isinstance(event, Mapping)]
        if not wrong:
            return list(events)
        raise ValueError(f"{label or 'runs'}: expected a list of events (dictionaries), found one of {wrong[0]}")
    raise ValueError(
        f"{label or 'runs'}: expected a Run, a run folder, a TrainResult or a list of events, "
        f"found {type(run).__name__}"
    )


def _name(run: Any) -> str:
    if isinstance(run, str | Path):
        return Path(run).name
    folder = getattr(run, "run_dir", None) or getattr(run, "dir", None)
    return Path(folder).name if folder else "run"


# ---- which metrics ----


def smaller_is_better(metric: str) -> bool:
    """Whether a metric's name says so."""
    return any(part in LEAST for part in metric.lower().replace("@", "_").split("_"))


def _choose(curves: Mapping[str, Curves], metric: str | Sequence[str] | None) -> tuple[list[str], list[str]]:
    """(names drawn beside the loss, names left out), without "eval_"."""
    known = list(dict.fromkeys(name for c in curves.values() for name in c.metrics if name != "loss"))
    if metric is not None:
        asked = [metric] if isinstance(metric, str) else list(metric)
        asked = [name.removeprefix("eval_") for name in asked]
        for name in asked:
            if name not in known and name != "loss":
                raise ValueError(f"metric: no run has eval_{name}; there are: {listing(known)}")
        return [name for name in asked if name != "loss"], []

    def order(name: str) -> int:
        parts = name.replace("@", "_").split("_")
        return min((PREFERRED.index(part) for part in parts if part in PREFERRED), default=len(PREFERRED))

    ranked = sorted(known, key=order)  # stable: otherwise as they were logged
    count = METRICS if len(curves) == 1 else 1
    return ranked[:count], ranked[count:]


# ---- drawing ----


def _axes(figure: Any, with_rate: bool, with_metrics: bool) -> tuple[Any, Any, Any]:
    grid = figure.add_gridspec(
        2 if with_rate else 1,
        2 if with_metrics else 1,
        width_ratios=[1.75, 1] if with_metrics else None,
        height_ratios=[3.2, 1] if with_rate else None,
    )
    main = figure.add_subplot(grid[0, 0])
    rate = figure.add_subplot(grid[1, 0], sharex=main) if with_rate else None
    if rate is not None:
        main.tick_params(labelbottom=False)
    return main, rate, figure.add_subplot(grid[:, 1]) if with_metrics else None


def _draw_losses(axes: Any, curves: Mapping[str, Curves], ylabel: str) -> None:
    single = len(curves) == 1
    drawn: list[np.ndarray] = []
    for number, (label, curve) in enumerate(curves.items()):
        look, name = line_look(number), legend_name(label, 36)
        loss = curve.loss
        if loss.values.size:
            if is_noisy(loss.values):
                raw = RAW if single else look["color"]
                _draw_raw(axes, loss, raw, 0.9 if single else 0.4, "each logged step" if single else None, number)
                line = smooth(loss)
                axes.plot(
                    *thin(line), **look, linewidth=2, zorder=3, label="moving average" if single else name,
                    gid=f"loss-{number}",
                )  # fmt: skip
                drawn += [line.values, loss.values]
            else:
                marker = MARKERS[number % len(MARKERS)] if loss.values.size <= FEW else None
                axes.plot(
                    *thin(loss), **look, linewidth=2, marker=marker, markersize=4.5, zorder=3, gid=f"loss-{number}",
                    label="training" if single else name,
                )  # fmt: skip
                drawn.append(loss.values)
        held_out = curve.metrics.get("loss")
        if held_out is not None and held_out.values.size:
            mark = {"marker": "s", "markersize": 5, "markerfacecolor": "none", "linewidth": 0.9}
            color = LINES[1] if single else look["color"]
            axes.plot(
                *thin(held_out), **mark, color=color, linestyle=look["linestyle"] if not single else DASHES[1],
                zorder=3.5, gid=f"eval-loss-{number}", label="held-out" if single else None,
            )  # fmt: skip
            drawn.append(held_out.values)
        if curve.not_finite.size:
            axes.plot(
                curve.not_finite, np.full(curve.not_finite.size, 0.03), "x", color=LINES[1], markersize=7,
                markeredgewidth=2, transform=axes.get_xaxis_transform(), zorder=4, gid=f"not-finite-{number}",
                label="loss is not a number" if single else f"{name}: loss is not a number",
            )  # fmt: skip
    if not single and any("loss" in curve.metrics for curve in curves.values()):
        axes.plot([], [], "s", color=INK, markersize=5, markerfacecolor="none", label="held-out")
    axes.set_ylabel(ylabel)
    if not drawn:
        words = "no finite loss was logged" if any(c.not_finite.size for c in curves.values()) else "no loss yet"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        if not any(c.not_finite.size or c.learning_rate.steps.size for c in curves.values()):
            axes.set_xticks([])
    else:
        every = np.concatenate(drawn)
        if every.min() > 0 and every.max() > WIDE * every.min():
            axes.set_yscale("log")
            axes.set_ylabel(f"{ylabel} (log scale)")
            plain_ticks(axes.yaxis)
    _whole_steps(axes)
    axes.grid(axis="y")
    if len(axes.get_legend_handles_labels()[0]) > 1 or not single:
        if len(curves) > MANY:
            handles, names = axes.get_legend_handles_labels()
            axes.figure.legend(handles, names, loc="outside lower center", ncols=legend_columns(names, 3))
        else:
            axes.legend(loc="upper right", ncols=1 if len(curves) < 6 else 2)
    if single and next(iter(curves)) != "run":
        axes.set_title(shorten(next(iter(curves)), 60))


def _draw_raw(axes: Any, loss: Series, color: str, alpha: float, label: str | None, number: int) -> None:
    """What was logged: a thin line, or where there are more values than pixels, the range of those of a pixel."""
    if loss.values.size <= POINTS:
        axes.plot(*loss, color=color, linewidth=0.7, alpha=alpha, zorder=1.5, label=label, gid=f"raw-{number}")
        return
    steps, low, high = envelope(loss)
    axes.fill_between(
        steps, low, high, color=color, alpha=alpha / 2, linewidth=0, zorder=1.5, gid=f"raw-{number}",
        label=label and "range of the logged steps",
    )  # fmt: skip


def _draw_rates(axes: Any, curves: Mapping[str, Curves]) -> None:
    for number, curve in enumerate(curves.values()):
        rate = curve.learning_rate
        if rate.values.size:
            marker = "." if rate.values.size == 1 else None
            axes.plot(*thin(rate), **line_look(number), linewidth=1.4, marker=marker, gid=f"rate-{number}")
    axes.set_ylabel("learning\nrate")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.grid(axis="y")


def _draw_metrics(axes: Any, curves: Mapping[str, Curves], chosen: Sequence[str]) -> None:
    single = len(curves) == 1

    def metric_label(name: str, label: str) -> str | None:
        if single:
            return legend_name(name, 40)
        return None if len(curves) > MANY else legend_name(label, 24)  # of many, the legend below has the names

    for run, (label, curve) in enumerate(curves.items()):
        for place, name in enumerate(chosen):
            series = curve.metrics.get(name)
            if series is None or not series.values.size:
                continue
            number = place if single else run
            axes.plot(
                *thin(series), **line_look(number), marker=MARKERS[number % len(MARKERS)], markersize=4.5,
                linewidth=1.4, label=metric_label(name, label), gid=f"metric-{run}-{name}",
            )  # fmt: skip
            best = _best(series, name)
            axes.plot(
                series.steps[best], series.values[best], "o", markersize=11, markerfacecolor="none",
                markeredgecolor=INK, markeredgewidth=1.1, gid=f"best-{run}-{name}",
            )  # fmt: skip
    axes.plot([], [], "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, linestyle="none", label="best")
    axes.set_ylabel("evaluation" if len(chosen) > 1 else chosen[0])
    axes.set_xlabel("step")
    axes.margins(y=0.12)
    _whole_steps(axes)
    axes.grid(axis="y")
    axes.legend(loc="best")


def _whole_steps(axes: Any) -> None:
    if not axes.get_xticks().size:
        return
    axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.dataLim.intervalx
    if low == high:  # one step: no scale to choose
        axes.set_xlim(low - 1, low + 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _best(series: Series, name: str) -> int:
    return int(series.values.argmin() if smaller_is_better(name) else series.values.argmax())


# ---- words ----


def _words(curves: Mapping[str, Curves], chosen: Sequence[str], left_out: Sequence[str], ylabel: str) -> str:
    what = ylabel[0].upper() + ylabel[1:]
    parts = [_loss_words(curve, chosen) for curve in curves.values()]
    if len(curves) == 1:
        words = f"{what} {parts[0]}."
    else:
        each = " ".join(f"{label}: {part}." for label, part in zip(curves, parts, strict=True))
        words = f"{what} of {len(curves)} trainings. {each}"
    return words + (f" Not drawn: {listing(list(left_out))}." if left_out else "")


def _loss_words(curve: Curves, chosen: Sequence[str]) -> str:
    loss = curve.loss
    if not loss.values.size:
        words = "never finite" if curve.not_finite.size else "not logged yet"
    elif loss.values.size == 1:
        words = f"{figures(loss.values[0])} at step {loss.steps[0]:,}"
    else:
        first, last = float(loss.values[0]), float(loss.values[-1])
        if is_noisy(loss.values):  # means, as one value says little
            few = min(loss.values.size // 10, SPAN)
            first, last = float(loss.values[:few].mean()), float(smooth(loss).values[-1])
        words = f"from {figures(first)} to {figures(last)} over {loss.steps[-1]:,} steps"
    if curve.not_finite.size:
        many = curve.not_finite.size
        words += f"; not a finite number at {counted(many, 'step')} (first: {curve.not_finite[0]:,})"
    for name in ("loss", *chosen):
        series = curve.metrics.get(name)
        if series is not None and series.values.size:
            words += f"; {_metric_words(series, name)}"
    return words


def _metric_words(series: Series, name: str) -> str:
    shown = "held-out loss" if name == "loss" else name
    first, last = figures(series.values[0]), figures(series.values[-1])
    if series.values.size == 1:
        return f"{shown} {last}"
    best = figures(series.values[_best(series, name)])
    return f"{shown} from {first} to {last}" + (f" (best: {best})" if best not in (first, last) else "")
