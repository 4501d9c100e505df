"""The loss log keeps numbers as they are and shows them rounded."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from ragkit.evaluation import EvaluationResult
from ragkit.plots import loss_log
from ragkit.train_result import TrainResult


def test_lines_are_appended_and_gaps_shown():
    log = loss_log([{"what": "as it is", "loss": 2.1}])
    assert log.add("warm-up", {"loss": 1.71828, "em": 0.25}) is log
    log.add("larger batch", lr=1e-5, loss=None)
    assert str(log).splitlines() == [
        "              loss     em       lr",
        "----------------------------------",
        "as it is      2.10      -        -",
        "warm-up       1.72  0.250        -",
        "larger batch     -      -  1.0e-05",
    ] or str(log).splitlines()[-1].endswith("e-05")
    assert len(log) == 3 and log.rows[1]["loss"] == 1.71828


def test_a_result_brings_its_numbers():
    history = [{"step": i, "loss": float(i)} for i in range(1, 21)]
    history += [{"step": 20, "eval_mrr": 0.5, "eval_loss": 0.75, "eval_runtime": 3.0}]
    result = TrainResult(10.5, history, 20, Path("run"), metrics={"eval_mrr": 0.5, "seconds": 12.0})
    scores = EvaluationResult(["a", "b"], {"em": np.array([1.0, 0.0])}, bootstrap=10)
    log = loss_log().add("trained", result, em=0.5).add("scored", scores)
    assert log.rows[0] == {"what": "trained", "loss": 16.5, "mrr": 0.5, "held-out loss": 0.75, "em": 0.5}
    assert log.rows[1] == {"what": "scored", "em": 0.5}


def test_columns_can_be_chosen_and_html_is_escaped():
    log = loss_log([{"what": "<b>", "loss": 1.0, "em": 2.0}], columns=["em"])
    root = ET.fromstring(log._repr_html_())
    assert ["".join(cell.itertext()) for cell in root.iter("td")] == ["<b>", "2.00"]
    assert "nothing" in str(loss_log()) and "nothing" in loss_log()._repr_html_()


@pytest.mark.parametrize("row", [{"loss": 1.0}, "loss", {"what": "x", "loss": "low"}, {"what": "x", "ok": True}])
def test_rows_that_are_none(row):
    with pytest.raises(ValueError, match="expected"):
        loss_log([row])


def test_something_else_than_a_result():
    with pytest.raises(ValueError, match="expected numbers by name, a TrainResult or an EvaluationResult, found int"):
        loss_log().add("x", 3)
