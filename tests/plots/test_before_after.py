"""The picture shows what the run's file says."""

from __future__ import annotations

import numpy as np
import pytest

from ragkit.evaluation import EvaluationResult
from ragkit.files import atomic_write_json
from ragkit.plots import before_after
from ragkit.plots.__main__ import main
from ragkit.runs import RunError


def result(share: float, **more: np.ndarray) -> EvaluationResult:
    hits = np.zeros(20)
    hits[: round(20 * share)] = 1
    return EvaluationResult([str(i) for i in range(20)], {"recall@1": hits, **more}, None, None, 200, 0)


def test_bars_have_the_height_of_the_means_and_missing_metrics_none():
    figure = before_after({"before": result(0.25), "after": result(0.75, em=np.ones(20))}, ["recall@1", "em"]).figure
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([0.25, 0.75, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]


def test_draws_a_run_from_its_file(tmp_path):
    scores = {label: result(share).to_dict() for label, share in (("before", 0.2), ("after", 0.6))}
    atomic_write_json(tmp_path / "evaluation.json", scores)
    main([str(tmp_path), str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluation_is_named(tmp_path):
    with pytest.raises(RunError, match=r"evaluation\.json"):
        main([str(tmp_path), "picture.png"])


def test_scores_beyond_0_and_1_are_seen_whole():
    numbers = result(0.5, loss=np.linspace(5, 8, 20), gain=np.linspace(-3, -1, 20))
    axes = before_after({"run": numbers}, ["loss", "gain"]).figure.axes[0]
    low, high = axes.get_ylim()
    assert low < numbers.metrics["gain"].low and high > numbers.metrics["loss"].high
    assert {text.get_text() for text in axes.texts} == {"6.50", "-2.00"}
    assert before_after({"run": result(0.5)}, ["recall@1"]).figure.axes[0].get_ylim() == (0, 1.12)


def test_nothing_to_draw_is_said():
    axes = before_after({"run": result(0.5)}, ["em"]).figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["no system has a score"]


def test_names_stay_in_the_picture_and_apart():
    scores = {f"_a system with quite a long name {i}": result(0.5) for i in range(6)}
    metrics = [f"recall_of_a_long_name@{i}" for i in range(5)] + ["recall@1"]
    figure = before_after(scores, metrics).figure
    assert [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()] == list(scores)
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    labels = figure.axes[0].get_xticklabels()
    assert all(text.get_rotation() == 25 for text in labels) and labels[0].get_window_extent().x0 >= 0
    numbers = [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(a.x1 < b.x0 for a, b in zip(numbers[:5], numbers[1:6], strict=True))
