"""Degrees and relations against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph.knowledge_graph import KnowledgeGraph
from ragkit.plots import degree_distribution, relation_distribution
from ragkit.plots.graphs import POINTS, at_least


class Graph:
    def __init__(self, n, head, tail, relation=None, relations=("r",)):
        self.entities, self.relations = [f"e{i}" for i in range(n)], list(relations)
        self.head, self.tail = np.asarray(head, np.int32), np.asarray(tail, np.int32)
        self.relation = np.zeros(len(self.head), np.int32) if relation is None else np.asarray(relation, np.int32)


SMALL = KnowledgeGraph.from_triples(
    [("Lima", "capital of", "Peru"), ("Oslo", "capital of", "Norway"), ("Lima", "in", "Peru"), ("Cusco", "in", "Peru")]
)


def line(axes, number=0):
    found = next(item for item in axes.get_lines() if item.get_gid() == f"degrees-{number}")
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_a_small_graph_on_plain_scales():
    plot = degree_distribution(SMALL)
    axes = plot.figure.axes[0]
    np.testing.assert_array_equal(line(axes), [[0, 1, 2, 3], [5, 5, 2, 1]])  # Peru 3, Lima 2, three with 1
    assert axes.get_xscale() == "linear"
    assert plot.alt == "Degrees of entities. 5 entities, median degree 1, largest 3 (Peru)."


def test_a_large_graph_on_logarithmic_scales_with_few_points():
    rng = np.random.default_rng(0)
    size = 300_000
    graph = Graph(60_000, *(np.minimum((rng.pareto(0.7, size) * 30).astype(int), 59_999) for _ in range(2)))
    plot = degree_distribution({"all": graph, "half": Graph(60_000, graph.head[::2], graph.tail[::2])})
    axes = plot.figure.axes[0]
    degree = np.bincount(graph.head, minlength=60_000) + np.bincount(graph.tail, minlength=60_000)
    x, y = line(axes)
    assert axes.get_xscale() == axes.get_yscale() == "log" and 2 < len(x) <= POINTS
    assert x[0] == degree[degree > 0].min() and x[-1] == degree.max()
    np.testing.assert_array_equal(y, [(degree >= d).sum() for d in x])
    isolated = int((degree == 0).sum())
    assert f"{isolated:,} of them in no triple" in axes.get_legend().get_texts()[0].get_text()
    assert f"all: 60,000 entities, median degree {int(np.sort(degree)[29_999])}" in plot.alt
    assert axes.xaxis.get_major_formatter()(1000.0, 0) == "1,000"
    assert len(plot.svg()) < 60_000


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_counts_of_at_least(degrees):
    degree = np.array(degrees)
    x, y = at_least(degree)
    assert x.tolist() == sorted(set(degrees) - {0})
    assert y.tolist() == [sum(d >= value for d in degrees) for value in x]


@pytest.mark.parametrize("n", [0, 3])
def test_graphs_without_triples(n):
    graph = Graph(n, [], [])
    assert ("no entity" if n == 0 else "3 entities, median degree 0, 3 in no triple") in degree_distribution(graph).alt
    assert relation_distribution(graph).alt == "1 relation in 0 triples."
    degree_distribution(graph).png(50)
    relation_distribution(graph).svg()
    with pytest.raises(ValueError, match="none to draw"):
        degree_distribution({})


def test_relations_most_frequent_first_and_the_rest_together():
    names = [f"/a/long/path/of/relations/number/{i}" for i in range(20)]
    relation = np.repeat(np.arange(20), np.arange(1, 21))
    plot = relation_distribution(Graph(2, np.zeros(210), np.ones(210), relation, names), top=4)
    axes = plot.figure.axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [20, 19, 18, 17, 210 - 74]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[-1] == "16 others together" and len(set(labels)) == 5 and max(map(len, labels)) <= 34
    assert labels[0].startswith("/a/") and labels[0].endswith("number/19")
    assert axes.patches[-1].get_hatch() and not axes.patches[0].get_hatch()
    assert [text.get_text() for text in axes.texts][0] == "20 (9.5 %)"
    assert "The 16 least frequent have 65 % together." in plot.alt
    with pytest.raises(ValueError, match="top: expected at least 1"):
        relation_distribution(SMALL, top=0)


def test_all_relations_have_their_name_where_one_more_would_be_the_rest():
    axes = relation_distribution(SMALL, top=1).figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["capital of", "in"]
