"""Results of several processes put together, and of several data sets summed up."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from ragkit.evaluation import EvaluationResult


def merge_shards(parts: Sequence[EvaluationResult], ids: Sequence[str]) -> EvaluationResult:
    """One result from those of several processes.

    Args:
        parts: Results of the same evaluation, each with another `shard`.
        ids: All question ids, in the order that is wanted (`questions.ids`).

    Returns:
        The result that one process would have had.

    Raises:
        ValueError: A question is missing, there twice or not among `ids`, or the parts are not alike.
    """
    if not parts:
        raise ValueError("there are no shards to merge")
    place: dict[str, int] = {}  # question -> its place among all rows of the parts
    for identifier in (identifier for part in parts for identifier in part.ids):
        if identifier in place:
            raise ValueError(
                f"question {identifier!r} is in the shards twice; give each process another (rank, world)"
            )
        place[identifier] = len(place)
    each_once(ids)
    missing = [identifier for identifier in ids if identifier not in place]
    if missing:
        raise ValueError(f"{len(missing)} of {len(ids)} questions are in no shard, for example {missing[0]!r}")
    if len(place) != len(ids):
        wanted = set(ids)
        odd = next(identifier for identifier in place if identifier not in wanted)
        raise ValueError(f"{len(place) - len(ids)} questions of the shards are not among the ids, for example {odd!r}")
    first = parts[0]
    for number, part in enumerate(parts):
        if list(part.values) != list(first.values) or (part.bootstrap, part.seed) != (first.bootstrap, first.seed):
            raise ValueError(f"shard {number} has other metrics, bootstrap or seed than shard 0; evaluate them alike")
        if (part.retrieved is None) != (first.retrieved is None):
            raise ValueError(f"of the shards 0 and {number} only one has retrieved documents; evaluate them alike")
    order = [place[identifier] for identifier in ids]
    values = {name: np.concatenate([part.values[name] for part in parts])[order] for name in first.values}
    retrieved = None
    if first.retrieved is not None:
        rows = [row for part in parts for row in part.retrieved or []]
        retrieved = [rows[i] for i in order]
    return EvaluationResult(list(ids), values, None, retrieved, first.bootstrap, first.seed)


def mean_metrics(results: Mapping[str, EvaluationResult]) -> dict[str, float]:
    """Means as one flat dict, to log and to choose a model by.

    Args:
        results: Data set -> result, all with the same metrics.

    Returns:
        "data set/metric" -> mean over its questions, and "metric" -> mean of these over the data sets, each data set
        counting the same (nan ones left out; nan where all are).

    Raises:
        ValueError: The results have different metrics, so a mean over data sets would mix them.
    """
    flat = {f"{name}/{metric}": result[metric] for name, result in results.items() for metric in result.metrics}
    metrics = list(next(iter(results.values())).metrics) if results else []
    for name, result in results.items():
        odd = sorted(set(metrics) ^ set(result.metrics))
        if odd:
            raise ValueError(f"{next(iter(results))!r} and {name!r} do not both have {odd[0]!r}; evaluate them alike")
    for metric in metrics:
        means = np.array([result[metric] for result in results.values()])
        kept = means[~np.isnan(means)]
        flat[metric] = float(kept.mean()) if len(kept) else float("nan")
    return flat


def each_once(ids: Sequence[str]) -> None:
    """Raises ValueError if a question id occurs twice."""
    twice = [identifier for identifier, count in collections.Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} question ids occur more than once, for example {twice[0]!r}")
