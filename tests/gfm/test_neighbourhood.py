"""Which part of a graph is shown: by hand, against networkx, and against the retriever's own scores."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import (
    Explanation,
    GFMRetriever,
    GFMSettings,
    GNNRetriever,
    Path,
    PathStep,
    embed_relations,
    entity_weights,
    explain,
    neighbourhood,
)
from ragkit.gfm.near_nodes import Scores
from ragkit.gfm.neighbourhood import Neighbourhood, around, explained, scores_of
from ragkit.graph import GraphError, KnowledgeGraph

#   a -> b -> c -> d      a -> e,  a => f twice and f -> a,  e -> g,  z alone with y
TRIPLES = [
    ("a", "to", "b"),
    ("b", "to", "c"),
    ("c", "to", "d"),
    ("a", "near", "e"),
    ("a", "near", "f"),
    ("a", "like", "f"),
    ("a", "near", "f"),
    ("f", "to", "a"),
    ("e", "to", "g"),
    ("y", "to", "z"),
]
DOCUMENTS = {"one": ["a", "b"], "two": ["b"], "three": ["b", "d"], "four": ["b"]}


@pytest.fixture
def line():
    return KnowledgeGraph.from_triples(TRIPLES, DOCUMENTS)


def scored(graph, starts, logits, best=()):
    """Scores as a model would give them."""
    values = np.full(graph.num_entities, -9.0)
    for name, score in logits.items():
        values[graph.entities.index(name)] = score
    ranked = tuple((place, name, logits[name]) for place, name in enumerate(best, 1))
    ids = [graph.entities.index(name) for name in starts]
    return Scores("Which?", ids, torch.zeros(1), values, ranked, (), None, None)


def path(graph, *hops, weight=0.5):
    """Each hop is (head, relation, tail, inverse)."""
    steps = []
    for layer, (head, relation, tail, inverse) in enumerate(hops, 1):
        ids = graph.entities.index(head), graph.relations.index(relation), graph.entities.index(tail)
        steps.append(PathStep(head, ids[0], relation, ids[1], tail, ids[2], inverse, layer, weight, weight))
    return Path(tuple(steps), weight)


def explanation(graph, target, *paths, starts=("a",), gradient=None):
    begin = {graph.entities.index(name): name for name in starts}
    return Explanation(
        "Which?", target, "entity", 1.5, "logit", begin, {graph.entities.index(target): target}, paths, "", gradient
    )


def names(found):
    return [node.name for node in found.nodes]


# ---- which nodes ----


def test_a_graph_alone_grows_the_nearest_first_then_those_with_most_triples(line):
    found = neighbourhood(line, entities=["a"], hops=2, max_nodes=6)
    # one hop: f (4 triples), b and e (2 each, in the order of their ids); two hops: c (2 triples), g (1)
    assert names(found) == ["a", "f", "b", "e", "c", "g"]
    assert [node.role for node in found.nodes] == ["question"] + 5 * ["other"]
    assert [node.number for node in found.nodes] == [1, 2, 3, 4, 5, 6]
    assert [node.degree for node in found.nodes] == [6, 4, 2, 2, 2, 1]
    assert [node.distance for node in found.nodes] == [0, 1, 1, 1, 2, 2]
    assert found.left_out == 0 and found.explanation is None and found.title == "Around a"
    fewer = neighbourhood(line, entities=["a"], hops=3, max_nodes=3)
    assert names(fewer) == ["a", "f", "b"] and fewer.left_out == 4
    assert fewer.summary == "3 entities and 3 edges; 4 more within 3 hops left out"
    assert names(neighbourhood(line, entities=["a"], hops=1, max_nodes=40)) == ["a", "f", "b", "e"]


def test_with_scores_the_best_neighbour_is_next_and_nothing_hangs_in_the_air(line):
    scores = scored(line, ["a"], {"a": 1.0, "b": -3.0, "c": 4.0, "d": 3.0, "e": 0.0, "g": -1.0, "f": -5.0})
    ids = scores.starts
    assert names(around(line, ids, scores, hops=3, max_nodes=4)) == ["a", "e", "g", "b"]
    assert names(around(line, ids, scores, hops=3, max_nodes=6)) == ["a", "e", "g", "b", "c", "d"]
    node = around(line, ids, scores, hops=3, max_nodes=6).nodes[4]
    assert (node.name, node.score, node.rank) == ("c", 4.0, 1)


def test_the_best_entities_are_shown_even_where_they_are_far(line):
    scores = scored(line, ["a"], {"z": 7.0, "b": 1.0}, best=["z", "b"])
    found = around(line, scores.starts, scores, hops=1, max_nodes=4)
    assert names(found)[:3] == ["a", "z", "b"] and found.nodes[1].distance is None
    assert found.note == "Among the best scored, but more than 1 hop away: z."
    assert around(line, scores.starts, scores, hops=1, max_nodes=1).note == ""


def test_documents_are_counted_and_named(line):
    by_name = {node.name: node for node in neighbourhood(line, entities=["a"], hops=3).nodes}
    assert (by_name["b"].num_documents, by_name["b"].documents) == (4, ("one", "two", "three"))
    assert (by_name["d"].num_documents, by_name["d"].documents) == (1, ("three",))
    assert (by_name["g"].num_documents, by_name["g"].documents) == (0, ())


def test_edges_with_the_same_ends_are_one_and_know_paths_and_gradients(line):
    gradient = torch.arange(20.0)  # 10 triples, then their inverses
    way = path(line, ("a", "near", "f", False))
    why = explanation(line, "f", way, gradient=gradient)
    found = around(line, [0], scored(line, ["a"], {}), why, hops=1)
    by_ends = {(line.entities[e.head], line.entities[e.tail]): e for e in found.edges}
    assert set(by_ends) == {("a", "b"), ("a", "e"), ("a", "f"), ("f", "a")}
    edge = by_ends["a", "f"]
    assert edge.relations == ("near", "like") and edge.path_relations == ("near",) and edge.paths == (1,)
    assert edge.gradient == (4 + 5 + 6) + (14 + 15 + 16) and found.edges[0] is edge
    assert by_ends["f", "a"].paths == () and by_ends["f", "a"].gradient == 7 + 17


def test_paths_and_their_nodes_come_before_what_is_near(line):
    one = path(line, ("a", "to", "b", False), ("b", "to", "c", False), ("c", "to", "d", False))
    two = path(line, ("f", "to", "a", True))
    scores = scored(line, ["a"], {"e": 5.0, "f": 4.0})
    found = around(line, [0], scores, explanation(line, "d", one, two), hops=1, max_nodes=5)
    assert names(found) == ["a", "d", "b", "c", "f"] and found.paths == (1, 2)
    assert [node.role for node in found.nodes] == ["question", "answer", "path", "path", "path"]
    assert found.nodes[0].paths == (1, 2) and found.nodes[3].paths == (1,)
    small = around(line, [0], scores, explanation(line, "d", one, two), hops=1, max_nodes=3)
    assert names(small) == ["a", "d", "f"] and small.paths == (2,)
    assert "1 of 2 paths do not fit into 3 nodes" in small.note
    assert "1 (not drawn)" in str(small) and "the best: a <--[to]-- f" in small.description


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_question_and_answer_are_always_there(line, most):
    starts = [line.entities.index(name) for name in "abcefg"]
    scores = scored(line, "abcefg", {"d": 1.0})
    found = around(line, starts, scores, explanation(line, "d", starts="abcefg"), hops=2, max_nodes=most)
    assert len(found.nodes) == most and found.nodes[0].name == "a"
    assert most == 1 or [n.name for n in found.nodes if n.role == "answer"] == ["d"]
    if most < 7:
        assert f"of the question: no room in {most} node" in found.note


def test_only_paths(line):
    way = path(line, ("a", "to", "b", False))
    full = around(line, [0], scored(line, ["a"], {}), explanation(line, "b", way), hops=2)
    only = full.only_paths()
    assert names(only) == ["a", "b"] and len(only.edges) == 1 and only.edges[0].paths == (1,)
    assert len(full.nodes) == 6 and only.left_out == full.left_out + 4


@settings(max_examples=60)
@given(st.data())
def test_any_graph(data):
    n = data.draw(st.integers(2, 12))
    ends = st.integers(0, n - 1)
    pairs = data.draw(st.lists(st.tuples(ends, st.integers(0, 2), ends), min_size=1, max_size=30))
    graph = KnowledgeGraph.from_triples([(f"n{a}", f"r{r}", f"n{b}") for a, r, b in pairs])
    peer = nx.Graph((int(a), int(b)) for a, b in zip(graph.head, graph.tail, strict=True))
    starts = data.draw(st.lists(st.integers(0, graph.num_entities - 1), min_size=1, max_size=3, unique=True))
    hops, most = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 14))
    scores = None
    if data.draw(st.booleans()):
        values = data.draw(st.lists(st.integers(-3, 3), min_size=graph.num_entities, max_size=graph.num_entities))
        scores = Scores("Q?", starts, torch.zeros(1), np.array(values, float), (), (), None, None)
    found = around(graph, starts, scores, hops=hops, max_nodes=most)
    distance = nx.multi_source_dijkstra_path_length(peer, set(starts), cutoff=hops)
    shown = {node.id for node in found.nodes}
    assert len(shown) == len(found.nodes) == min(most, len(distance)) and shown <= set(distance)
    assert found.left_out == len(distance) - len(shown)
    for node in found.nodes:
        assert node.distance == distance[node.id]
        assert node.degree == int((graph.head == node.id).sum() + (graph.tail == node.id).sum())
    triples = {(a, b) for a, b in zip(graph.head.tolist(), graph.tail.tolist(), strict=True) if {a, b} <= shown}
    assert {(edge.head, edge.tail) for edge in found.edges} == triples and len(found.edges) == len(triples)
    if len(starts) <= most:
        for part in nx.connected_components(peer.subgraph(shown)):
            assert part & set(starts)


def test_a_node_with_very_many_neighbours():
    leaves = 100_000
    graph = KnowledgeGraph.from_triples([("hub", "to", f"leaf {i}") for i in range(leaves)] + [("leaf 7", "to", "x")])
    found = neighbourhood(graph, entities=["hub"], hops=3, max_nodes=200)
    assert len(found.nodes) == 200 and found.left_out == leaves + 2 - 200
    assert names(found)[:3] == ["hub", "leaf 7", "leaf 0"]  # leaf 7 has two triples


# ---- with a model ----


@pytest.fixture
def retriever(world, letters):
    texts = {"Peru": "Lima is in Peru.", "Chile": "Chile borders Peru.", "Santiago": "Santiago is in Chile."}
    torch.manual_seed(3)
    model = GNNRetriever(GFMSettings(rel_emb_dim=8, input_dim=6, hidden_dims=[6, 6])).eval()
    encoder = letters()
    embed_relations(world, encoder, cache=False)
    return GFMRetriever(model, world, encoder, list(_passages(texts)), ranker="score_weighted_idf", cache=False)


def _passages(texts):
    return [{"id": name, "text": text} for name, text in texts.items()]


QUESTION = "Which country borders Peru?"


def test_scores_and_paths_are_the_models_own(retriever, world):
    found = neighbourhood(retriever, QUESTION, entities=["peru"], max_nodes=4, paths=3)
    assert isinstance(found, Neighbourhood) and found.question == QUESTION
    embedding = retriever.encoder.encode([QUESTION], "query")
    start = [world.entities.index("peru")]
    with torch.no_grad():
        logits = retriever.model(world, embedding, [start], entity_weights(world))[0]
    for node in found.nodes:
        assert node.score == pytest.approx(float(logits[node.id]), abs=1e-6)
        assert node.rank == 1 + int((logits > logits[node.id]).sum())
    assert [name for _, name, _ in found.entities] == [world.entities[i] for i in logits.argsort(descending=True)]
    passages = retriever.retrieve([QUESTION], 5, [["peru"]])[0]
    assert [name for _, name, _ in found.documents] == [p.id for p in passages]
    assert [score for _, _, score in found.documents] == pytest.approx([p.score for p in passages], abs=1e-6)
    best = next(world.entities[i] for i in logits.argsort(descending=True).tolist() if i not in start)
    assert found.explanation.target == best
    why = explain(
        retriever.model, world, embedding[0], start, best, entities_weight=entity_weights(world), top_paths=3
    )
    assert [str(p) for p in found.explanation.paths] == [str(p) for p in why.paths] and why.paths
    assert [p.weight for p in found.explanation.paths] == pytest.approx([p.weight for p in why.paths])


def test_a_document_as_the_target(retriever):
    found = neighbourhood(retriever, QUESTION, "Santiago", entities=["peru"], max_nodes=10)
    assert found.explanation.target_kind == "document"
    assert {n.name for n in found.nodes if n.role == "answer"} == {"santiago", "chile"}


def test_the_linker_finds_the_entities(retriever):
    scores = scores_of(retriever, "Which country borders peru?")
    assert [retriever.graph.entities[i] for i in scores.starts] == ["peru"]
    assert explained(retriever, scores, paths=0) is None
    assert neighbourhood(retriever, "Which country borders peru?", paths=0).explanation is None


def test_bad_input_is_named(retriever, world):
    for call, error, message in (
        (lambda: neighbourhood(world), ValueError, "entities: none is given"),
        (lambda: neighbourhood(world, "Who?", entities=["peru"]), ValueError, "question: a graph alone"),
        (lambda: neighbourhood(world, target="peru", entities=["peru"]), ValueError, "target: a graph alone"),
        (lambda: neighbourhood(world, entities=["perru"]), GraphError, "no entity 'perru'.*'peru'"),
        (lambda: neighbourhood(world, entities=[99]), ValueError, "entities: expected a name or an id"),
        (lambda: neighbourhood(world, entities=["peru"], hops=0), ValueError, "hops: expected a whole number from 1"),
        (lambda: neighbourhood(world, entities=["peru"], max_nodes=201), ValueError, "max_nodes: .* to 200"),
        (lambda: neighbourhood(world, entities=["peru"], paths=True), ValueError, "paths: expected"),
        (lambda: neighbourhood(retriever, " "), ValueError, "question: it is empty"),
        (
            lambda: neighbourhood(retriever, QUESTION, "nowhere", entities=["peru"]),
            GraphError,
            "no entity or document",
        ),
        (lambda: neighbourhood(object(), "Who?"), TypeError, "expected a GFMRetriever or a KnowledgeGraph"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_scores_that_are_not_numbers(retriever):
    with torch.no_grad():
        retriever.model.question_mlp.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers"):
        neighbourhood(retriever, QUESTION, entities=["peru"])


def test_a_question_without_an_entity(retriever):
    retriever.linker = type("Nobody", (), {"link": lambda self, questions: [[] for _ in questions]})()
    with pytest.raises(ValueError, match="no entity of the graph was found in 'Who\\?'"):
        neighbourhood(retriever, "Who?")


def test_the_tables_say_what_there_is(retriever):
    found = neighbourhood(retriever, QUESTION, entities=["peru"], max_nodes=4)
    text = str(found)
    for words in (QUESTION, "Best entities", "Best documents", "Paths to", "In the picture", "entity of the question"):
        assert words in text
    html = found._repr_html_()
    assert html.count("<table>") == 4 and "<svg" in html


def test_many_nodes_are_all_named_in_the_text():
    graph = KnowledgeGraph.from_triples([("hub", "to", f"leaf {i}") for i in range(60)])
    found = neighbourhood(graph, entities=["hub"], max_nodes=61)
    text = str(found)
    assert all(f"leaf {i}" in text for i in range(60)) and "and 41 leaf 39, 42 leaf 40" in text
    assert "<details>" in found.tables_html()
