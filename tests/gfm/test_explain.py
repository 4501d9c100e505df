"""Explanations: gradients against the model, a plain model and differences; paths by hand and by brute force."""

from __future__ import annotations

import html
import importlib
import json
import os
from itertools import combinations
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.relational_conv import build_layout

from ragkit.gfm import RANKERS, Explanation, GFMSettings, GNNRetriever, QueryGNN, entity_weights, explain
from ragkit.gfm import paths as paths_module
from ragkit.gfm.explain import edge_gradients, forward
from ragkit.gfm.graph_view import view_of
from ragkit.gfm.path_search import Hops, best_paths
from ragkit.graph import GraphError, KnowledgeGraph

SHARED = FilePath(os.environ.get("RAGKIT_SHARED", FilePath(__file__).resolve().parents[2].parent / "shared"))
KINDS = [
    {},
    {"message_func": "transe"},
    {"aggregate_func": "mean"},
    {"aggregate_func": "mean", "message_func": "transe", "short_cut": False},
    {"aggregate_func": "max"},
    {"aggregate_func": "pna"},
    {"concat_hidden": True, "hidden_dims": [6, 6, 4]},
    {"hidden_dims": [5]},
]


def score_of(model, graph, embedding, starts, target, weights=None, edge_mask=None, entities_weight=None):
    """The target's logit by the model's own parts, for one question."""
    view = view_of(graph)
    query, mask = model.inputs(view, embedding.unsqueeze(0), [starts], entities_weight)
    tables, layout = model.relation_tables(graph), view.layout(model.device)
    states = model.entity_model.states(layout, tables, mask, query, edge_weight=weights, edge_mask=edge_mask)
    return model.entity_model.score(states, query)[target, 0]


# ---- scores and gradients ----


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_gradients_are_those_of_the_model_and_equal_differences(case, plain, kinds):
    c = case(dtype=torch.float64, seed=1, nodes=12, triples=14, relations=4, questions=1, **kinds)
    assert len(set(zip(*c.graph.edge_index.tolist(), c.graph.edge_type.tolist(), strict=True))) == 28  # no equal edges
    starts, target = [1, 4, 4], 4
    if kinds.get("aggregate_func") in ("max", "pna"):  # no equal states either: a maximum has no gradient there
        starts = list(range(12))
    weight = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5
    found = explain(c.model, c.graph, c.embeddings[0], starts, target, entities_weight=weight)
    with torch.no_grad():
        logits = c.model(c.graph, c.embeddings, [starts], weight)
    assert found.score == pytest.approx(float(logits[0, target]), rel=1e-12)
    every, weights, _ = forward(c.model, c.graph, c.embeddings[0], starts, range(12), weight)
    assert torch.allclose(every, logits[0], rtol=1e-12, atol=1e-12)
    gradients = edge_gradients(every[target], weights)
    L, E = gradients.shape
    assert (L, E) == (c.model.settings.num_layers, 28)

    shared = torch.ones(E, dtype=torch.float64, requires_grad=True)  # one weight for all layers: the sum of theirs
    mask = torch.zeros(1, 12, dtype=torch.float64)
    mask[0, starts] = 1
    score = plain(c.model, c.graph, c.embeddings, mask, weight, shared)[0, target]
    (wanted,) = torch.autograd.grad(score, shared)
    assert torch.allclose(found.edge_gradient, wanted, rtol=1e-7, atol=1e-9)
    assert wanted.abs().max() > 1e-3

    step = 1e-5
    for layer in range(L):
        for edge in range(0, E, 3):
            ends = []
            for sign in (1, -1):
                moved = [torch.ones(E, dtype=torch.float64) for _ in range(L)]
                moved[layer][edge] += sign * step
                with torch.no_grad():
                    moved_score = score_of(c.model, c.graph, c.embeddings[0], starts, target, moved, None, weight)
                    ends.append(float(moved_score))
            assert gradients[layer, edge] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_messages_go_the_way_of_the_forward_pass(case):
    """GFM-RAG v1 explains a function whose messages go from head to tail."""
    c = case(dtype=torch.float64, hidden_dims=[6], questions=1, triples=30, nodes=8)
    logits, weights, _ = forward(c.model, c.graph, c.embeddings[0], [2], [5])
    gradients = edge_gradients(logits[0], weights)[0]
    to, come = c.graph.edge_index
    arrives = (to == 5) & (come == 2)  # with one layer nothing else reaches the target
    assert arrives.any()
    assert (gradients[arrives.numpy()] != 0).all() and (gradients[~arrives.numpy()] == 0).all()


@pytest.mark.parametrize("ranker", ["score_weighted_idf", "idf", "simple"])
def test_a_document_has_its_rankers_score(world, small, ranker):
    weight = entity_weights(world)
    question = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    found = explain(small, world, question, ["lima"], "Chile", ranker=ranker, entities_weight=weight)
    with torch.no_grad():
        logits = small(world, question, [[0]], weight)
    wanted = RANKERS[ranker](logits, world)[0, world.documents.index("Chile")]
    assert found.target_kind == "document" and found.score_kind == ranker
    assert found.score == pytest.approx(float(wanted), rel=1e-5)
    assert set(found.target_entities.values()) == {"chile", "peru"}
    assert {path.steps[-1].end[1] for path in found.paths} == {"chile", "peru"}


@pytest.fixture
def small(world):
    """A model for `world`, whose relation embeddings are set."""
    world.rel_emb = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    return GNNRetriever(GFMSettings(rel_emb_dim=8, input_dim=8, hidden_dims=[8] * 3)).eval()


# ---- the search ----


def random_hops(seed, N, E, R, L):
    g = np.random.default_rng(seed)
    to, come, rel = g.integers(N, size=E), g.integers(N, size=E), g.integers(R, size=E)
    hops = Hops.of(build_layout(*map(torch.from_numpy, (to, come, rel)), N, R))
    return hops, hops.weights(g.normal(size=(L, E))), (to, come, rel)


def every_path(hops, weights, sources, targets):
    """Weight of every way without a node twice, at its best layers: {(source, hops): weight}."""
    L = len(weights)
    found, todo = {}, [((s,), ()) for s in sources]
    while todo:
        nodes, way = todo.pop()
        if way and nodes[-1] in targets:
            sums = [
                sum(weights[k, e] for k, e in zip(at, way, strict=True)) for at in combinations(range(L), len(way))
            ]
            found[nodes[0], way] = max(sums) / len(way)
        if len(way) < L:
            for e in range(hops.ptr[nodes[-1]], hops.ptr[nodes[-1] + 1]):
                if hops.dst[e] not in nodes:
                    todo.append(((*nodes, int(hops.dst[e])), (*way, e)))
    return found


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 16), st.integers(1, 4), st.integers(1, 8))
def test_a_wide_beam_finds_the_best_of_all_paths(seed, N, E, L, top):
    hops, weights, _ = random_hops(seed, N, E, 2, L)
    sources, targets = [0, seed % N], {N - 1, seed % 3 % N}
    wanted = every_path(hops, weights, set(sources), targets)
    found, stopped = best_paths(hops, weights, sources, sorted(targets), top, beam=10**6)
    assert stopped == "" and len(found) == min(top, len(wanted))
    best = sorted(wanted.values(), reverse=True)[:top]
    assert [path.weight for path in found] == pytest.approx(best)
    for path in found:
        assert path.weight == pytest.approx(wanted[path.source, path.hops])
        assert list(path.layers) == sorted(set(path.layers)) and path.layers[-1] <= L
        at = [weights[layer - 1, hop] for layer, hop in zip(path.layers, path.hops, strict=True)]
        assert path.weight == pytest.approx(np.mean(at))
    assert len({(path.source, path.hops) for path in found}) == len(found)


def test_the_default_beam_is_as_good_here():
    """On graphs of 40 nodes a beam of 10 misses nothing, and one of 1 does."""
    missed, short = 0, 0
    for seed in range(10):
        hops, weights, _ = random_hops(seed, 40, 160, 3, 4)
        runs = {beam: best_paths(hops, weights, [0, 1], [2], 10, beam) for beam in (1, 10, 10**6)}
        assert runs[10][0] == runs[10**6][0] and runs[10**6][1] == ""
        missed += runs[1][0] != runs[10][0]
        short += runs[1][1] == "beam"  # it says so
        assert (runs[1][1] == "beam") == (len(runs[1][0]) < 10)
    assert missed == 10 and short


def test_hops_may_wait():
    """0 -> 1 -> 2 on three layers: the first hop weighs most in layer 2, the second in layer 3."""
    hops = Hops.of(build_layout(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 0]), 3, 1))
    weights = np.array([[1.0, 9.0], [4.0, 0.0], [0.0, 2.0]])
    (path,), _ = best_paths(hops, weights, [0], [2], 5, 10)
    assert (path.hops, path.layers, path.weight) == ((0, 1), (2, 3), 3.0)
    weights[2, 1] = -6.0  # now layer 1 and then layer 2 is best
    (path,), _ = best_paths(hops, weights, [0], [2], 5, 10)
    assert (path.layers, path.weight) == ((1, 2), 0.5)


def test_equal_edges_are_one_hop_with_the_weights_of_all():
    to, come, rel = torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 0, 0])
    hops = Hops.of(build_layout(to, come, rel, 2, 2))
    assert hops.dst.tolist() == [1, 1, 0] and hops.rel.tolist() == [0, 1, 0]
    assert [sorted(hops.edges(i)) for i in range(3)] == [[0, 2], [1], [3]]
    assert hops.weights(np.array([[1.0, 10.0, 100.0, 1000.0]])).tolist() == [[101.0, 10.0, 1000.0]]


def test_the_search_says_that_it_stopped(monkeypatch, world, small):
    for module in ("path_search", "explain"):
        monkeypatch.setattr(importlib.import_module(f"ragkit.gfm.{module}"), "MAX_EXTENSIONS", 0)
    found = explain(small, world, torch.ones(8), ["lima"], "chile")
    assert not found.paths and "stopped after 0 partial paths, with 0 of 10 paths" in str(found)
    assert "No path" not in found.note


def test_the_search_says_that_the_beam_was_narrow(small):
    graph = KnowledgeGraph.from_triples([(a, "r", b) for a, b in ("ab", "ac", "bd", "cd", "de")])
    graph.rel_emb = torch.ones(2, 8)
    narrow = explain(small, graph, torch.ones(8), ["a"], "e", beam=1)
    assert len(narrow.paths) == 1 and "1 of 10 paths: the beam cut off others" in narrow.note
    assert len(explain(small, graph, torch.ones(8), ["a"], "e").paths) == 2


# ---- deleting edges ----


def test_deleting_the_best_path_changes_more_than_deleting_other_edges(case):
    changes = []
    for seed in range(16):
        c = case(seed=seed, nodes=30, triples=70, questions=1, dtype=torch.float64)
        starts = [0, 1]
        found = explain(c.model, c.graph, c.embeddings[0], starts, 2, top_paths=20, beam=100)
        if not found.paths:
            continue
        on_paths = {edge for path in found.paths for step in path.steps for edge in step.edges}
        best = [edge for step in found.paths[0].steps for edge in step.edges]
        others = np.setdiff1d(np.arange(140), list(on_paths))
        g = np.random.default_rng(seed)
        drops = [best, *(g.choice(others, len(best), replace=False).tolist() for _ in range(10))]
        moved = []
        for drop in drops:
            keep = torch.ones(140, dtype=torch.bool)
            keep[drop] = False
            with torch.no_grad():
                moved.append(
                    abs(float(score_of(c.model, c.graph, c.embeddings[0], starts, 2, None, keep)) - found.score)
                )
        changes.append((moved[0], np.mean(moved[1:])))
    mine, random = map(np.array, zip(*changes, strict=True))
    assert len(mine) >= 12
    assert (mine > random).mean() >= 0.8
    assert np.median(mine) > 3 * np.median(random)


# ---- names and texts ----


def test_paths_by_hand(world, small):
    found = explain(small, world, torch.ones(8), ["lima"], "chile", text="Which country?")
    assert [str(path) for path in found.paths] == ["lima --[capital of]--> peru --[borders]--> chile"]
    (path,) = found.paths
    first, second = path.steps
    assert (first.head, first.relation, first.tail, first.inverse) == ("lima", "capital of", "peru", False)
    assert (first.head_id, first.relation_id, first.tail_id) == (0, 0, 1)
    assert first.edges == (3,) and second.edges == (4,)  # the message from lima to peru is that of the inverse edge
    assert world.edge_index[:, 3].tolist() == [1, 0] and world.edge_type[3] == 2
    assert path.weight == pytest.approx((first.weight + second.weight) / 2)
    assert first.layer < second.layer <= 3
    assert first.total == pytest.approx(float(found.edge_gradient[3]), abs=1e-12)
    lines = str(found).splitlines()
    assert lines[:2] == ["question: Which country?", "from: lima"]
    assert lines[2].startswith("target: chile (entity), logit ")
    assert lines[3] == f"lima --[capital of]--> peru --[borders]--> chile   {path.weight:.3g}"

    back = explain(small, world, torch.ones(8), ["chile", "chile"], 0)  # an id; the other way round
    assert [str(p) for p in back.paths] == ["chile <--[borders]-- peru <--[capital of]-- lima"]
    assert [s.edges for s in back.paths[0].steps] == [(1,), (0,)] and all(s.inverse for s in back.paths[0].steps)
    both = explain(small, world, torch.ones(8), ["peru"], "santiago")
    assert [str(p) for p in both.paths] == ["peru --[borders]--> chile <--[capital of]-- santiago"]


def test_to_dict_is_json(world, small):
    found = explain(small, world, torch.ones(8), ["lima"], "Chile", text="q")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["target"] == "Chile" and plain["question_entities"] == [{"id": 0, "name": "lima"}]
    assert [len(p["steps"]) for p in plain["paths"]] == [len(p.steps) for p in found.paths]
    step = plain["paths"][0]["steps"][0]
    assert step["head"] == "lima" and step["inverse"] is False and step["edges"] == [3]


def test_html_is_escaped_and_works_without_matplotlib(monkeypatch):
    bad = '<script>"&$x$'
    graph = KnowledgeGraph.from_triples([(bad, "<b>rel</b>", "t>")])
    graph.rel_emb = torch.ones(2, 8)
    model = GNNRetriever(GFMSettings(rel_emb_dim=8, input_dim=4, hidden_dims=[4]))
    page = explain(model, graph, torch.ones(8), [bad], "t>", text="<i>")._repr_html_()
    assert "<svg" in page and "<script" not in page and "<b>" not in page and "<i>" not in page
    assert html.escape(f"{bad} --[<b>rel</b>]--> t>") in page

    def no_library(*_):
        raise ImportError("this needs the library matplotlib; install it with: pip install x")

    monkeypatch.setattr(paths_module, "draw_paths", no_library)
    page = explain(model, graph, torch.ones(8), [bad], "t>")._repr_html_()
    assert "<svg" not in page and "<table" in page and "pip install x" in page


def test_graphs_of_pyg(case):
    c = case(questions=1)
    by_id = explain(c.model, c.graph, c.embeddings[0], [0], 5)
    assert by_id.target == "entity 5" and by_id.paths
    for step in (step for path in by_id.paths for step in path.steps):
        assert step.relation in {"relation 0", "relation 1", "relation 2"}
        to, come = c.graph.edge_index[:, step.edges[0]].tolist()
        assert (come, to) == (step.start[0], step.end[0])
        assert int(c.graph.edge_type[step.edges[0]]) == step.relation_id + (0 if step.inverse else 3)
    c.graph.entity_names = [f"e{i}" for i in range(23)]
    c.graph.relation_names = list("abc") + [f"inverse_{x}" for x in "abc"]
    named = explain(c.model, c.graph, c.embeddings[0], ["e0"], "e5")
    assert [p.weight for p in named.paths] == [p.weight for p in by_id.paths]
    assert {s.relation for p in named.paths for s in p.steps} <= set("abc")
    with pytest.raises(GraphError, match="no documents"):
        explain(c.model, c.graph, c.embeddings[0], ["e0"], "e5", target_kind="document")
    half = c.graph.without(torch.arange(80) >= 40)  # no inverse edges: every relation has its own name
    half.relation_names = list("abcdef")
    found = explain(c.model, half, c.embeddings[0], [0], int(half.edge_index[0][half.edge_index[1] == 0][0]))
    assert found.paths and all(s.inverse for p in found.paths for s in p.steps)


# ---- what surrounds a call ----


def test_a_text_goes_through_the_encoder(world, small, letters):
    encoder = letters()
    by_text = explain(small, world, "a bad cab", ["lima"], "chile", encoder=encoder)
    by_hand = explain(small, world, encoder.encode(["a bad cab"], "query"), ["lima"], "chile")
    assert by_text.question == "a bad cab" and by_hand.question == ""
    assert by_text.score == by_hand.score and by_text.paths == by_hand.paths
    with pytest.raises(ValueError, match="give encoder="):
        explain(small, world, "a bad cab", ["lima"], "chile")


def test_the_model_is_left_as_it_was_and_inference_mode_does_not_matter(world, small):
    before = {name: p.clone() for name, p in small.named_parameters()}
    with torch.inference_mode():
        small(world, torch.ones(1, 8), [[0]])  # keeps tables that were made in inference mode
        inside = explain(small, world, torch.ones(8), ["lima"], "chile")
    with torch.no_grad():
        outside = explain(small, world, torch.ones(8), ["lima"], "chile")
    assert inside.paths == outside.paths and inside.score == outside.score
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])


def test_half_precision_gives_nearly_the_same(world, small):
    wide = explain(small, world, torch.ones(8), ["lima"], "chile")
    narrow = explain(small.bfloat16(), world, torch.ones(8), ["lima"], "chile")
    assert narrow.score == pytest.approx(wide.score, abs=0.05)
    assert [str(p) for p in narrow.paths] == [str(p) for p in wide.paths]


def test_targets_without_a_path(small):
    graph = KnowledgeGraph.from_triples(
        [("a", "r", "b"), ("b", "r", "c"), ("c", "r", "d"), ("d", "s", "e"), ("x", "s", "y")],
        {"one": ["a", "b"], "none": []},
    )
    graph.rel_emb = torch.ones(4, 8)
    for target, says in (("y", "no path of at most 3 hops"), ("e", "no path of at most 3 hops")):
        found = explain(small, graph, torch.ones(8), ["a"], target)
        assert isinstance(found, Explanation) and not found.paths and says in found.note
        assert says in str(found) and says in html.unescape(found._repr_html_())
    assert explain(small, graph, torch.ones(8), ["a"], "d").paths  # three hops: as many as layers
    empty = explain(small, graph, torch.ones(8), ["a"], "none")
    assert not empty.paths and empty.score == 0 and "has no entities" in empty.note
    itself = explain(small, graph, torch.ones(8), ["a"], "a")
    assert not itself.paths and "in the question itself" in itself.note
    unweighted = explain(small, graph, torch.ones(8), ["x"], "y", entities_weight=entity_weights(graph))
    assert not unweighted.paths and "entities_weight is 0" in unweighted.note


def test_what_is_refused(world, small):
    e = torch.ones(8)
    with pytest.raises(GraphError, match=r"no entity or document 'chille' \(did you mean 'chile'"):
        explain(small, world, e, ["lima"], "chille")
    with pytest.raises(GraphError, match=r"no document 'Santiagoo' \(did you mean 'Santiago'"):
        explain(small, world, e, ["lima"], "Santiagoo", target_kind="document")
    with pytest.raises(GraphError, match=r"question_entities: the graph has no entity 'limaa' \(did you mean 'lima'"):
        explain(small, world, e, ["limaa"], "chile")
    with pytest.raises(ValueError, match="question_entities is empty"):
        explain(small, world, e, [], "chile")
    with pytest.raises(ValueError, match="id in 0 ... 3, found 4"):
        explain(small, world, e, [4], "chile")
    with pytest.raises(ValueError, match="target: expected a name or an id in 0 ... 3, found -1"):
        explain(small, world, e, ["lima"], -1)
    with pytest.raises(ValueError, match="'idf_topk' cannot be explained.*no gradient.*score_weighted_idf"):
        explain(small, world, e, ["lima"], "Chile", ranker="idf_topk")
    with pytest.raises(ValueError, match="there is no such"):
        explain(small, world, e, ["lima"], "Chile", ranker="best")
    with pytest.raises(ValueError, match="beam: expected a whole number from 1, found 0"):
        explain(small, world, e, ["lima"], "chile", beam=0)
    with pytest.raises(ValueError, match="the model wants 8"):
        explain(small, world, torch.ones(5), ["lima"], "chile")
    with pytest.raises(ValueError, match="target_kind"):
        explain(small, world, e, ["lima"], "chile", target_kind="passage")
    with pytest.raises(TypeError, match="GNNRetriever, found a QueryGNN"):
        explain(QueryGNN(small.settings), world, e, ["lima"], "chile")
    both = KnowledgeGraph.from_triples([("a", "r", "b")], {"a": ["b"]})
    both.rel_emb = torch.ones(2, 8)
    with pytest.raises(GraphError, match="'a' is an entity and a document; say target_kind="):
        explain(small, both, e, ["b"], "a")
    assert explain(small, both, e, ["a"], "a", target_kind="document").target_entities == {1: "b"}


def test_on_a_real_graph():
    folder = SHARED / "data" / "wiki2_mini"
    if not folder.is_dir():
        pytest.skip("no data/wiki2_mini in RAGKIT_SHARED or ../shared")
    graph = KnowledgeGraph.load(folder)
    torch.manual_seed(0)
    graph.rel_emb = torch.randn(2 * graph.num_relations, 16)
    model = GNNRetriever(GFMSettings(rel_emb_dim=16, input_dim=32, hidden_dims=[32] * 4)).eval()
    rows = json.loads((folder / "processed" / "stage1" / "test.json").read_text(encoding="utf-8"))
    row = next(row for row in rows if len(row["supporting_facts"]) > 1)
    weight = entity_weights(graph)
    found = explain(
        model, graph, torch.ones(16), row["question_entities"], row["supporting_facts"][-1],
        target_kind="document", entities_weight=weight,
    )  # fmt: skip
    assert found.paths
    weights = [path.weight for path in found.paths]
    assert weights == sorted(weights, reverse=True)
    triples = set(zip(graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist(), strict=True))
    for path in found.paths:
        nodes = [path.steps[0].start[0], *(step.end[0] for step in path.steps)]
        assert nodes[0] in found.question_entities and nodes[-1] in found.target_entities
        assert len(set(nodes)) == len(nodes) <= 5
        for step in path.steps:
            assert (step.head_id, step.relation_id, step.tail_id) in triples
