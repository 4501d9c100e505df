"""Scores of retrieval and answers, question by question, with bootstrap intervals and before/after tables.

Every metric is an array with one value a question (nan where it does not apply); means are taken over those arrays
and nowhere else, so a score of 0 counts like any other.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ragkit.intervals import Interval, bootstrap_interval, interval
from ragkit.metrics import (
    all_at_k,
    exact_match,
    f1,
    filtered_hits_at_k,
    filtered_mrr,
    filtered_ranks,
    mrr,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
)
from ragkit.tables import html_table, number, text_table

__all__ = [
    "Comparison",
    "EvaluationResult",
    "Interval",
    "all_at_k",
    "bootstrap_interval",
    "compare",
    "evaluate",
    "exact_match",
    "f1",
    "filtered_hits_at_k",
    "filtered_mrr",
    "filtered_ranks",
    "mrr",
    "ndcg_at_k",
    "normalize_answer",
    "recall_at_k",
    "retrieval_values",
]
_LEFT_OUT = {  # metric: why a question has none
    "mrr": "without a supporting passage (no retrieval scores)",
    "doc_mrr": "without a supporting document (no document scores)",
    "ent_mrr": "without a supporting entity (no entity scores)",
    "em": "without an answer",
}


# ---- a system's scores ----


@dataclass(repr=False)
class EvaluationResult:
    """Scores of one system.

    Attributes:
        ids: Question ids, [B].
        values: One array [B] a metric; nan where the metric does not apply to the question.
        predictions: Generated answers, [B]; None if none were asked for.
        retrieved: Ids of the retrieved passages of each question, best first; None if none were asked for.
        bootstrap: Resamples behind the intervals.
        seed: Seed of the resampling.
        metrics: Mean and interval of every metric (computed from `values`).
    """

    ids: list[str]
    values: dict[str, np.ndarray]
    predictions: list[str] | None = None
    retrieved: list[list[str]] | None = None
    bootstrap: int = 2000
    seed: int = 0
    metrics: dict[str, Interval] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {name: np.asarray(column, dtype=np.float64) for name, column in self.values.items()}
        for name, column in self.values.items():
            if len(column) != len(self.ids):
                raise ValueError(f"{name}: found {len(column)} values, expected {len(self.ids)} (one a question)")
        self.metrics = {name: interval(column, self.bootstrap, self.seed) for name, column in self.values.items()}

    def __getitem__(self, metric: str) -> float:
        """Mean of a metric."""
        return self.metrics[metric].mean

    def subset(self, chosen: Iterable[Any]) -> EvaluationResult:
        """The scores of some questions only: a mask of [B] booleans, or question ids."""
        choice = list(chosen)
        if choice and all(isinstance(item, bool | np.bool_) for item in choice):
            if len(choice) != len(self.ids):
                raise ValueError(f"the mask has {len(choice)} entries, there are {len(self.ids)} questions")
            rows = [i for i, wanted in enumerate(choice) if wanted]
        else:
            place = {identifier: i for i, identifier in enumerate(self.ids)}
            unknown = [identifier for identifier in choice if identifier not in place]
            if unknown:
                raise ValueError(f"{len(unknown)} question ids are not in this result, for example {unknown[0]!r}")
            rows = [place[identifier] for identifier in choice]
        return EvaluationResult(
            ids=[self.ids[i] for i in rows],
            values={name: column[rows] for name, column in self.values.items()},
            predictions=None if self.predictions is None else [self.predictions[i] for i in rows],
            retrieved=None if self.retrieved is None else [self.retrieved[i] for i in rows],
            bootstrap=self.bootstrap,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values (nan as null)."""
        return {
            "metrics": {name: _json_interval(value) for name, value in self.metrics.items()},
            "ids": list(self.ids),
            "values": {name: [_json_number(v) for v in column] for name, column in self.values.items()},
            "predictions": self.predictions,
            "retrieved": self.retrieved,
            "bootstrap": self.bootstrap,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`."""
        missing = [name for name in ("ids", "values") if name not in data]
        if missing:
            raise ValueError(f"not an evaluation result: {' and '.join(missing)} missing, found {sorted(data)}")
        values = {name: np.array([np.nan if v is None else v for v in row]) for name, row in data["values"].items()}
        rest = {name: data[name] for name in ("predictions", "retrieved", "bootstrap", "seed") if name in data}
        return cls(list(data["ids"]), values, **rest)

    def _table(self) -> list[list[str]]:
        rows = [["metric", "mean", "95 % interval", "n"]]
        for name, value in self.metrics.items():
            rows.append([name, number(value.mean), f"[{number(value.low)}, {number(value.high)}]", str(value.n)])
        return rows

    def _note(self) -> str:
        """How many questions a kind of metric leaves out."""
        notes = []
        for name, why in _LEFT_OUT.items():
            left_out = len(self.ids) - self.metrics[name].n if name in self.metrics else 0
            if left_out:
                notes.append(f"{left_out} {why}")
        return f"{len(self.ids)} questions" + (f", of them {' and '.join(notes)}" if notes else "")

    def __repr__(self) -> str:
        return f"{text_table(self._table())}\n{self._note()}"

    def _repr_html_(self) -> str:
        return html_table(self._table(), self._note())


def evaluate(
    system: Any,
    examples: Sequence[Any],
    ks: Sequence[int] = (1, 2, 5, 10),
    generate: bool = True,
    retrieve: bool = True,
    top_k: int | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> EvaluationResult:
    """Scores a RAG system on questions.

    Args:
        system: Anything with `batch_retrieve(questions, top_k)` (lists of objects with `.id`) and, to generate,
            `batch_generate(questions, passages)` (texts).
        examples: Objects with `.id`, `.question`, `.answers` (accepted texts) and `.supporting` (passage ids).
        ks: Cut-offs of recall@k, all@k and ndcg@k; `mrr` looks at the first max(ks) passages.
        generate: Generates answers and scores em and f1.
        retrieve: Scores the retrieved passages.
        top_k: Passages given to the generator; None: the system's own (`system.config.top_k`).
        bootstrap: Resamples behind the intervals.
        seed: Seed of the resampling.

    Returns:
        The scores. Questions without a supporting passage have no retrieval scores, those without an answer no em
        and f1; the printed result counts both.

    Raises:
        ValueError: No question, two questions with the same id, or nothing to score.
    """
    examples = list(examples)
    ids = [str(example.id) for example in examples]
    twice = [identifier for identifier, count in collections.Counter(ids).items() if count > 1]
    if not examples:
        raise ValueError("there are no questions to evaluate")
    if twice:
        raise ValueError(f"{len(twice)} question ids occur more than once, for example {twice[0]!r}")
    if not (generate or retrieve) or (retrieve and not ks):
        raise ValueError("there is nothing to score: set retrieve (with at least one k) or generate")
    questions = [example.question for example in examples]
    shown = (top_k or system.config.top_k) if generate else 0
    deepest = max(ks) if retrieve else 0
    passages = system.batch_retrieve(questions, max(shown, deepest))
    values: dict[str, np.ndarray] = {}
    found = [[str(passage.id) for passage in row] for row in passages]
    if retrieve:
        values = retrieval_values(found, [set(example.supporting) for example in examples], ks)
    predictions = None
    if generate:
        predictions = list(system.batch_generate(questions, [row[:shown] for row in passages]))
        values["em"] = _answer_values(exact_match, predictions, examples)
        values["f1"] = _answer_values(f1, predictions, examples)
    return EvaluationResult(ids, values, predictions, found if retrieve else None, bootstrap, seed)


def retrieval_values(
    retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """All retrieval metrics of `evaluate` by name, one array [B] each."""
    values = {}
    for name, metric in (("recall", recall_at_k), ("all", all_at_k), ("ndcg", ndcg_at_k)):
        values.update({f"{name}@{k}": metric(retrieved, relevant, k) for k in sorted(set(ks))})
    values["mrr"] = mrr(retrieved, relevant, max(ks))
    return values


def _answer_values(
    metric: Callable[[str, Sequence[str]], float], predictions: Sequence[str], examples: Sequence[Any]
) -> np.ndarray:
    pairs = zip(predictions, examples, strict=True)
    return np.array([metric(text, example.answers) if example.answers else np.nan for text, example in pairs])


# ---- before and after ----


@dataclass(repr=False)
class Comparison:
    """Scores of several systems on the same questions, and their differences from the first.

    Attributes:
        labels: Names of the systems; the first is the one that the others are compared with.
        results: Their scores, with the questions in the same order.
        differences: For every later system, mean and paired bootstrap interval of (it - first), by metric.
    """

    labels: list[str]
    results: list[EvaluationResult]
    differences: dict[str, dict[str, Interval]]

    @property
    def difference(self) -> dict[str, Interval]:
        """The second system minus the first, by metric."""
        return self.differences[self.labels[1]]

    def significant(self, metric: str, label: str | None = None) -> bool:
        """Whether the 95 % interval of the difference leaves out 0, in either direction."""
        return self.differences[label or self.labels[1]][metric].excludes_zero

    def to_dict(self) -> dict[str, Any]:
        """Means and differences as JSON values."""
        means = {
            label: {name: _json_interval(value) for name, value in result.metrics.items()}
            for label, result in zip(self.labels, self.results, strict=True)
        }
        changes = {
            label: {name: _json_interval(value) for name, value in row.items()}
            for label, row in self.differences.items()
        }
        return {"labels": self.labels, "metrics": means, "differences": changes}

    def _table(self) -> list[list[str]]:
        first, *later = self.labels
        if len(later) == 1:
            changes = ["difference [95 % interval]"]
        else:
            changes = [f"{label} - {first} [95 % interval]" for label in later]
        rows = [["metric", *self.labels, *changes, "n"]]
        for metric in self.difference:
            row = [metric, *(number(result.metrics[metric].mean) for result in self.results)]
            for label in later:
                change = self.differences[label][metric]
                mark = " *" if change.excludes_zero else "  "
                row.append(f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]{mark}")
            rows.append([*row, str(self.difference[metric].n)])
        return rows

    def __repr__(self) -> str:
        return f"{text_table(self._table())}\n{_STAR}"

    def _repr_html_(self) -> str:
        return html_table(self._table(), _STAR)


_STAR = "* the 95 % interval of the paired difference leaves out 0"


def compare(
    before: EvaluationResult, after: EvaluationResult, *others: EvaluationResult, labels: Sequence[str] | None = None
) -> Comparison:
    """Sets systems side by side on the same questions.

    Args:
        before: Scores that the others are compared with.
        after: Scores of the system of interest.
        *others: Further systems, for example controls.
        labels: One name a system; None: before, after, other 1, other 2 ...

    Returns:
        A `Comparison` of the metrics that all of them have; prints as a table, shows as HTML in Jupyter.

    Raises:
        ValueError: The questions differ, the labels do not fit, or there is no common metric.
    """
    results = [before, after, *others]
    names = (
        list(labels) if labels is not None else ["before", "after", *(f"other {i + 1}" for i in range(len(others)))]
    )
    if len(names) != len(results) or len(set(names)) != len(names):
        raise ValueError(f"labels: found {names}, expected {len(results)} different names")
    aligned = [before]
    for name, result in zip(names[1:], results[1:], strict=True):
        odd = sorted(set(before.ids) ^ set(result.ids))
        if odd or len(result.ids) != len(before.ids):
            raise ValueError(
                f'"{names[0]}" and "{name}" were scored on different questions: {len(odd)} are in one of them only, '
                f"for example {odd[:1]}; use subset(ids) to compare the common ones"
            )
        aligned.append(result if result.ids == before.ids else result.subset(before.ids))
    metrics = [name for name in before.values if all(name in result.values for result in aligned)]
    if not metrics:
        raise ValueError("the results have no metric in common")
    differences = {
        name: {
            metric: interval(result.values[metric] - before.values[metric], before.bootstrap, before.seed)
            for metric in metrics
        }
        for name, result in zip(names[1:], aligned[1:], strict=True)
    }
    return Comparison(names, aligned, differences)


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _json_interval(value: Interval) -> dict[str, Any]:
    numbers = {"mean": value.mean, "low": value.low, "high": value.high}
    return {**{name: _json_number(number) for name, number in numbers.items()}, "n": value.n}
