"""Recall over k: means and intervals as they were computed."""

from __future__ import annotations

import numpy as np
import pytest

from ragkit.evaluation import EvaluationResult
from ragkit.plots import recall_curves


def result(**values) -> EvaluationResult:
    size = len(next(iter(values.values())))
    names = {name.replace("_at_", "@"): np.array(column, float) for name, column in values.items()}
    return EvaluationResult([str(i) for i in range(size)], names, bootstrap=100)


BEFORE = result(recall_at_1=[0, 0, 0, 1], recall_at_5=[0, 1, 0, 1], all_at_1=[0, 0, 0, 0])
AFTER = result(recall_at_1=[1, 0, 1, 1], recall_at_5=[1, 1, 1, 1], recall_at_2=[1, 1, 1, 1])


def curves(axes):
    """label -> (mean [ks], interval ends [ks, 2])."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        found[container.get_label()] = (line, np.asarray(line.get_ydata(), float), ends)
    return found


def test_means_and_intervals_are_those_of_the_scores():
    axes = recall_curves({"before": BEFORE, "after": AFTER}).figure.axes[0]
    drawn = curves(axes)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "5"]
    for label, scores, ks in (("before", BEFORE, (1, 5)), ("after", AFTER, (1, 2, 5))):
        wanted = [scores.metrics[f"recall@{k}"] for k in ks]
        _, means, ends = drawn[label]
        np.testing.assert_allclose(means, [value.mean for value in wanted])
        np.testing.assert_allclose(ends, [[value.low, value.high] for value in wanted])
        places = [(1, 2, 5).index(k) for k in ks]
        np.testing.assert_allclose(np.round(np.asarray(drawn[label][0].get_xdata(), float)), places)
    assert len(axes.collections) >= 2  # the bands
    looks = [(str(line._dash_pattern), line.get_marker()) for line, _, _ in drawn.values()]
    assert looks[0] != looks[1]


def test_words_hold_means_and_intervals():
    scores = result(recall_at_1=[1, 1], recall_at_3=[1, 1])
    assert recall_curves({"a": scores}).alt == (
        "Mean over 2 questions with 95 % interval. recall@1: a 1.00 [1.00, 1.00]; recall@3: a 1.00 [1.00, 1.00]."
    )
    assert "recall@2: after 1.00" in recall_curves({"before": BEFORE, "after": AFTER}).alt


def test_a_gfm_has_documents_and_entities():
    scores = result(doc_recall_at_1=[1, 0], doc_recall_at_20=[1, 1], ent_recall_at_2=[0, 1], doc_mrr=[1, 1])
    plot = recall_curves({"gfm": scores})
    assert [axes.get_ylabel() for axes in plot.figure.axes] == ["doc_recall@k, mean", "ent_recall@k, mean"]
    assert "entities" in plot.figure.axes[1].get_xlabel()
    assert "doc_recall@20: gfm 1.00" in plot.alt and "ent_recall@2: gfm 0.50" in plot.alt
    assert len(recall_curves({"gfm": scores}, what="doc_recall").figure.axes) == 1


def test_other_metrics_and_none():
    assert "all@1: before 0.00" in recall_curves({"before": BEFORE, "after": AFTER}, what="all").alt
    with pytest.raises(ValueError, match="no system has ndcg@k for any k; there are: recall@1"):
        recall_curves({"before": BEFORE}, what="ndcg")
    with pytest.raises(ValueError, match="no system"):
        recall_curves({})


def test_a_score_that_nobody_has_is_no_point():
    gap = result(recall_at_1=[np.nan, np.nan], recall_at_2=[1, 0])
    _, means, _ = curves(recall_curves({"x": gap}).figure.axes[0])["x"]
    assert means.tolist() == [0.5]


def test_where_no_question_has_a_score_that_is_said():
    plot = recall_curves({"run": result(recall_at_1=[np.nan, np.nan])})
    assert plot.alt == "Mean over 2 questions with 95 % interval. no score."
    axes = plot.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["no question has such a score"] and axes.get_legend() is None


def test_each_system_is_in_the_legend_whatever_it_is_called_and_has():
    scores = {"_a": result(doc_recall_at_1=[0, 1]), "b": result(ent_recall_at_1=[0, 1])}
    texts = recall_curves(scores).figure.axes[0].get_legend().get_texts()
    assert [text.get_text().strip("\u200b") for text in texts] == ["_a", "b"]


def test_one_question_is_one():
    assert recall_curves({"run": result(recall_at_1=[1.0])}).alt.startswith("Mean over 1 question with")
