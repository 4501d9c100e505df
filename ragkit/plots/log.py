"""The loss log: after each change of a recipe one line of what it gave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ragkit.plots.curves import SPAN, read_curves
from ragkit.plots.style import figures
from ragkit.tables import html_table, text_table

WHAT = "what"
DIGITS = 3


class LossLog:
    """Changes and what they gave, one a line: Karpathy's loss log, with any numbers.

    A text by `print`, a table in a notebook. Numbers are rounded to 3 significant digits when shown, not when kept.

    Attributes:
        rows: One dictionary a change: "what", then numbers by name.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), columns: Sequence[str] | None = None) -> None:
        self.columns = None if columns is None else list(columns)
        self.rows: list[dict[str, Any]] = []
        for row in rows:
            if not isinstance(row, Mapping) or WHAT not in row:
                raise ValueError(f'loss_log: expected rows like {{"what": "warm-up", "loss": 1.2}}, found {row!r}')
            self.add(row[WHAT], {name: value for name, value in row.items() if name != WHAT})

    def add(self, what: str, result: Any = None, **numbers: float) -> LossLog:
        """Appends a line.

        Args:
            what: What was changed.
            result: Numbers by name; or a `TrainResult` (its last loss, the mean of the last 8 logged ones, and its
                last evaluations); or an `EvaluationResult` (its means).
            **numbers: Further numbers.

        Returns:
            The log itself, so that the last line of a cell shows it.

        Raises:
            ValueError: Nothing that numbers can be taken of, or a number that is none.
        """
        values = {**_numbers(result), **numbers}
        for name, value in values.items():
            if value is not None and (isinstance(value, bool | str) or not hasattr(value, "__float__")):
                raise ValueError(f"{what}: {name} is {value!r}, expected a number")
        kept = {name: math.nan if value is None else float(value) for name, value in values.items()}
        self.rows.append({WHAT: str(what), **kept})
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def _table(self) -> list[list[str]]:
        found = dict.fromkeys(name for row in self.rows for name in row if name != WHAT)
        names = list(found) if self.columns is None else self.columns
        table = [["", *names]]
        for row in self.rows:
            values = [row.get(name, math.nan) for name in names]
            table.append([row[WHAT], *("-" if math.isnan(v) else figures(v, DIGITS) for v in values)])
        return table

    def __str__(self) -> str:
        return text_table(self._table()) if self.rows else "nothing was logged yet"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._table()) if self.rows else "<p>nothing was logged yet</p>"


def loss_log(rows: Iterable[Mapping[str, Any]] = (), columns: Sequence[str] | None = None) -> LossLog:
    """A log of changes and what they gave.

    Args:
        rows: Its first lines: dictionaries with "what" and numbers by name.
        columns: Which numbers to show, in this order; None: all, as they come.

    Raises:
        ValueError: A row without "what", or with something that is no number.

    Example:
        >>> log = loss_log([{"what": "as it is", "loss": 2.1, "recall@1": 0.31}])
        >>> log.add("learning rate 1e-3", {"loss": 1.72, "recall@1": 0.4})
                            loss  recall@1
        ----------------------------------
        as it is            2.10     0.310
        learning rate 1e-3  1.72     0.400
    """
    return LossLog(rows, columns)


def _numbers(result: Any) -> dict[str, Any]:
    """Numbers by name."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "history"):  # a TrainResult
        curves = read_curves(result.history)
        losses = curves.loss.values[-SPAN:]
        found = {"loss": float(losses.mean()) if losses.size else math.nan}
        evaluated = {name: float(s.values[-1]) for name, s in curves.metrics.items() if s.values.size}
        return found | {("held-out loss" if name == "loss" else name): value for name, value in evaluated.items()}
    if isinstance(getattr(result, "metrics", None), Mapping):  # an EvaluationResult
        return {name: value.mean for name, value in result.metrics.items()}
    raise ValueError(f"expected numbers by name, a TrainResult or an EvaluationResult, found {type(result).__name__}")
