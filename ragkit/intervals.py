"""Bootstrap intervals of means over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over n questions with the 95 % bootstrap interval low..high."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: np.ndarray | Sequence[float], n: int = 2000, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over questions.

    Args:
        values: [B] one value a question; nan are left out.
        n: Resamples.
        seed: Seed of the resampling.
        level: Share of the resampled means inside the interval.

    Returns:
        (low, high); (nan, nan) where there is no value.
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(n)
    rows = max(1, 2_000_000 // len(kept))  # 16 MB of indices at a time
    for begin in range(0, n, rows):
        chosen = generator.integers(0, len(kept), size=(min(rows, n - begin), len(kept)))
        means[begin : begin + rows] = kept[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values: np.ndarray, n: int = 2000, seed: int = 0) -> Interval:
    """Mean of the values that are not nan, with its bootstrap interval."""
    kept = values[~np.isnan(values)]
    mean = float(kept.mean()) if len(kept) else math.nan
    return Interval(mean, *bootstrap_interval(kept, n, seed), n=len(kept))
