from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from ragkit.graph import KnowledgeGraph


def test_numbers_by_hand(graph):
    info = graph.info()
    assert (info.entities, info.relations, info.triples, info.documents, info.links) == (4, 3, 5, 3, 5)
    assert (info.isolated, info.repeated, info.loops, info.undocumented) == (0, 1, 0, 1)
    # degrees: lima 3, peru 4, chile 2, pacific 1
    assert info.degree_quantiles == {0.0: 1, 0.25: 1, 0.5: 2, 0.75: 3, 0.9: 4, 0.99: 4, 1.0: 4}
    assert info.entities_per_document == {0.0: 0, 0.25: 0, 0.5: 2, 0.75: 3, 0.9: 3, 0.99: 3, 1.0: 3}
    assert info.top_relations == [("capital of", 2), ("borders", 2), ("on", 1)]
    assert info.largest_relation_share == 0.4


def test_as_text_and_html(graph):
    text = str(graph.info())
    assert repr(graph.info()) == text
    assert "capital of                     2  40.0 %" in text and "degree of an entity" in text
    html = graph.info()._repr_html_()
    assert html.count("<table>") == 3 and "<td>capital of</td><td>2</td><td>40.0 %</td>" in html


def test_html_escapes_names_and_sets_no_colour(capsys):
    bad = "<script>alert(1)</script>"
    graph = KnowledgeGraph.from_triples([(bad, "r & s", "x" * 500), ("", "r", "b")], {bad: [bad, "<b>"]})
    html = graph._repr_html_() + graph.info()._repr_html_() + graph.report._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "r &amp; s" in html and "<b>" not in html
    assert "x" * 500 not in html and "color" not in html and "background" not in html
    assert "1 of 2 rows not used" in html


def test_repr_of_an_empty_and_of_a_usual_graph(graph):
    assert repr(graph) == "KnowledgeGraph(4 entities, 3 relations, 5 triples, 3 documents)"
    html = graph._repr_html_()
    assert "<td>lima</td><td>capital of</td><td>peru</td>" in html and "not used" not in html


def test_isolated_entities_and_loops():
    data = SimpleNamespace(
        edge_index=torch.tensor([[0, 2, 0], [0, 2, 0]]), edge_type=torch.zeros(3).long(), num_nodes=5
    )
    info = KnowledgeGraph.from_pyg(data).info()
    assert (info.isolated, info.loops, info.repeated) == (3, 3, 1) and "entities in no document" not in str(info)
    assert np.isclose(info.largest_relation_share, 1)
