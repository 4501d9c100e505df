"""Numbers over steps: taken out of events, smoothed, thinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

POINTS = 600  # most points of a drawn line: one a pixel
SPAN = 8  # least span of the moving average
NOISY = 10  # points from which on a curve can be called noisy
# Evaluations that are about speed or size: they say nothing of what was learned.
_NOT_METRICS = ("runtime", "_per_second", "seconds", "jit_compilation_time", "samples")


@dataclass
class Series:
    """Values over steps: steps [P] int64 (rising), values [P] float64 (finite)."""

    steps: np.ndarray
    values: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.steps, self.values))


@dataclass
class Curves:
    """What the events of a run say of its steps.

    Attributes:
        loss: The training loss.
        learning_rate: Of the optimizer.
        metrics: Name without "eval_" -> evaluations.
        not_finite: [P] steps whose loss was NaN or infinite (null in the file).
    """

    loss: Series
    learning_rate: Series
    metrics: dict[str, Series] = field(default_factory=dict)
    not_finite: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def read_curves(events: Iterable[Mapping[str, Any]]) -> Curves:
    """Sorts events into curves; where steps go back (a resumed run), what was logged later counts."""
    columns: dict[str, dict[int, float]] = {"loss": {}, "learning_rate": {}}
    last = -1
    for place, event in enumerate(events, start=1):
        step = event.get("step")
        step = place if not isinstance(step, int | float) else int(step)
        if step < last:
            for column in columns.values():
                for later in [s for s in column if s >= step]:
                    del column[later]
        last = step
        for name, value in event.items():
            wanted = name in columns or (name.startswith("eval_") and not name.endswith(_NOT_METRICS))
            if wanted and (value is None or isinstance(value, int | float)) and not isinstance(value, bool):
                columns.setdefault(name, {})[step] = math.nan if value is None else float(value)
    loss = columns["loss"]
    return Curves(
        loss=_series(loss),
        learning_rate=_series(columns["learning_rate"]),
        metrics={n.removeprefix("eval_"): _series(c) for n, c in columns.items() if n.startswith("eval_")},
        not_finite=np.array(sorted(step for step, value in loss.items() if not math.isfinite(value)), np.int64),
    )


def _series(column: Mapping[int, float]) -> Series:
    steps = np.array(sorted(column), np.int64)
    values = np.array([column[int(step)] for step in steps], np.float64)
    kept = np.isfinite(values)
    return Series(steps[kept], values[kept])


def is_noisy(values: np.ndarray) -> bool:
    """Whether a curve goes up and down: of at least 10 values a tenth of the steps go the other way."""
    if len(values) < NOISY:
        return False
    change = np.diff(values)
    return bool(min((change > 0).sum(), (change < 0).sum()) >= 0.1 * len(change))


def smooth(series: Series, span: float | None = None) -> Series:
    """Exponential moving average without bias: weights (1 - a)^age, a = 2 / (span + 1), divided by their sum.

    Args:
        series: P values.
        span: In points; None: a twentieth of them, at least 8.
    """
    span = max(SPAN, len(series.values) / 20) if span is None else span
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    out = np.empty(len(series.values))
    for place, value in enumerate(series.values.tolist()):
        total, weight = keep * total + value, keep * weight + 1
        out[place] = total / weight
    return Series(series.steps, out)


def thin(series: Series, points: int = POINTS) -> Series:
    """At most `points` values that look the same: of each stretch the first, the least and the largest, and the end.

    No spike is lost; a short series stays as it is.
    """
    size = len(series.values)
    if size <= points:
        return series
    edges = np.linspace(0, size, max(1, (points - 1) // 3) + 1).astype(np.int64)
    kept = {size - 1}
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = series.values[begin:end]
        kept |= {begin, begin + int(part.argmin()), begin + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def envelope(series: Series, points: int = POINTS // 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, least, largest) of `points` stretches of about equal length; steps are their middles."""
    edges = np.linspace(0, len(series.values), min(points, len(series.values)) + 1).astype(np.int64)
    begins = edges[:-1]
    middles = series.steps[(edges[:-1] + edges[1:] - 1) // 2]
    return middles, np.minimum.reduceat(series.values, begins), np.maximum.reduceat(series.values, begins)
