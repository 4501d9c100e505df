"""Every value is in one bin, or is said to be left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.plots import histogram
from ragkit.plots.histograms import BINS, bin_edges


def test_bars_and_outlines_count_the_values():
    rng = np.random.default_rng(0)
    series = {"a": rng.normal(0, 1, 300), "b": rng.normal(1, 1, 250), "c": rng.normal(1, 2, 300)}
    axes = histogram(series, xlabel="cosine", bins=12, unit="passages").figure.axes[0]
    edges = np.histogram_bin_edges(np.concatenate(list(series.values())), 12)
    bars = axes.containers[0].patches
    np.testing.assert_array_equal([bar.get_height() for bar in bars], np.histogram(series["a"], edges)[0])
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1])
    outlines = {patch.get_gid(): patch for patch in axes.patches if patch.get_gid() and "series" in patch.get_gid()}
    for gid, name in (("series-1", "b"), ("series-2", "c")):
        values, stairs, _ = outlines[gid].get_data()
        np.testing.assert_array_equal(values, np.histogram(series[name], edges)[0])
        np.testing.assert_allclose(stairs, edges)
    assert bars[0].get_hatch() and outlines["series-1"].get_linestyle() != outlines["series-2"].get_linestyle()
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["a (n = 300)", "b (n = 250)", "c (n = 300)"]
    assert axes.get_ylabel() == "number of passages" and axes.get_xlabel() == "cosine"


def test_series_of_unequal_size_are_shares():
    axes = histogram({"a": np.arange(10.0) / 7, "b": np.arange(1000.0) / 700}, bins=5).figure.axes[0]
    assert sum(bar.get_height() for bar in axes.containers[0].patches) == pytest.approx(1)
    assert axes.get_ylabel().startswith("share") and axes.yaxis.get_major_formatter()(0.25, 0) == "25 %"
    counts = histogram({"a": np.arange(10.0) / 7, "b": np.arange(1000.0) / 700}, share=False).figure.axes[0]
    assert sum(bar.get_height() for bar in counts.containers[0].patches) == 10


def test_words():
    plot = histogram([1.0, 2.0, 3.0, np.nan, np.inf], xlabel="score", unit="documents")
    assert plot.alt == (
        "Histogram of score. 3 documents, median 2.0, mean 2.0, from 1.0 to 3.0 (2 left out: not finite)."
    )


@pytest.mark.parametrize("values", [[], [np.nan], [0.3], [0.3] * 50, [0, 1, 1, 2], [1e30, -1e30], [5e-324, 0.0]])
def test_edge_cases(values):
    plot = histogram({"x": values})
    plot.png(50)
    drawn = plot.figure.axes[0].containers
    finite = int(np.isfinite(np.asarray(values, float)).sum())
    assert sum(bar.get_height() for c in drawn for bar in c.patches) == finite


def test_tensors_of_any_kind_and_texts():
    scores = torch.linspace(0, 1, 20, dtype=torch.bfloat16).reshape(4, 5).requires_grad_()
    assert "20 values" in histogram(scores).alt
    with pytest.raises(ValueError, match="x: expected numbers"):
        histogram({"x": ["a"]})
    with pytest.raises(ValueError, match="nothing to draw"):
        histogram({})
    with pytest.raises(ValueError, match="bins: expected at least 1"):
        histogram([1.0], bins=0)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=80))
def test_bins_hold_everything(values):
    edges = bin_edges(np.array(values), None)
    assert (np.diff(edges) > 0).all() and len(edges) <= BINS + 2
    assert np.histogram(values, edges)[0].sum() == len(values)


def test_counts_are_whole_numbers_and_a_long_label_is_wrapped():
    figure = histogram({"_a": [1.0, 2.5], "b": [2.0, 3.0]}, xlabel="cosine of the passages " * 8).figure
    axes = figure.axes[0]
    assert all(tick == int(tick) for tick in axes.get_yticks())
    box = axes.xaxis.label.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and "\n" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["\u200b_a (n = 2)", "b (n = 2)"]
