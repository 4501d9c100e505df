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
