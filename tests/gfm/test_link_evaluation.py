"""`QueryGNN.score_all` and filtered ranking, against `forward`, GFM-RAG v1's numbers and slow Python."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import GFMSettings, QueryGNN, TrueTriples, evaluate_links, graph_triples
from ragkit.gfm.easy_edges import inverse
from ragkit.gfm.link_evaluation import question_ids
from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.names import Names
from ragkit.graph.parts import GraphParts

KINDS = [
    {},
    {"message_func": "transe", "aggregate_func": "max"},
    {"aggregate_func": "pna"},
    {"concat_hidden": True, "hidden_dims": [6, 6, 4]},
    {"num_mlp_layer": 1, "hidden_dims": [5]},
]


# ---- scores of all entities ----


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_all_scores_are_those_of_all_candidates(case, kinds):
    graph = case().graph
    model = QueryGNN(GFMSettings(**{"rel_emb_dim": 7, "input_dim": 6, "hidden_dims": [6, 6], **kinds}))
    head, rel = torch.tensor([4, 0, 4, 22]), torch.tensor([1, 5, 1, 0])
    batch = torch.stack(torch.broadcast_tensors(head[:, None], torch.arange(23), rel[:, None]), -1)  # [B, N, 3]
    for mode in (True, False):
        found = model.train(mode).score_all(graph, head, rel)
        assert found.shape == (4, 23)
        torch.testing.assert_close(found, model(graph, batch, remove_easy_edges=False))
    with torch.no_grad():
        torch.testing.assert_close(model.score_all(graph, head.int(), rel.int()), found.detach())
    other = torch.tensor([[[h, 3, 2] for h in range(23)]])  # other heads of (?, 2, 3)
    wanted = model(graph, other, remove_easy_edges=False)
    torch.testing.assert_close(model.score_all(graph, torch.tensor([3]), torch.tensor([5])), wanted)


@pytest.mark.parametrize("name", ["distmult_sum", "default_depth", "transe_mean", "distmult_max", "distmult_pna"])
def test_v1s_scores_are_among_them(golden, name):
    """v1 hides the batch's edges; on the graph without them its scores are ours of all entities."""
    g = golden(name)
    graph, batch, wanted = g.graph, g.t["pretrain.batch_htr"], g.t["pretrain.score"]
    R = graph.num_relations
    hidden = {(h, t, r) for h, t, r in batch.flatten(0, 1).tolist()}
    hidden |= {(t, h, (r + R // 2) % R) for h, t, r in hidden}
    edges = zip(*graph.edge_index.tolist(), graph.edge_type.tolist(), strict=True)
    rest = graph.without(torch.tensor([edge in hidden for edge in edges]))
    heads, tails, rel = batch.unbind(-1)  # [B, 8] each
    other_tails = (heads == heads[:, :1]).all(1)
    assert 0 < other_tails.sum() < len(batch)
    source = torch.where(other_tails, heads[:, 0], tails[:, 0])
    asked = torch.where(other_tails, rel[:, 0], inverse(rel[:, 0], R))
    scores = g.pretrained.eval().score_all(rest, source, asked)  # [B, N]
    found = scores.gather(1, torch.where(other_tails[:, None], tails, heads))
    assert float((found - wanted).detach().abs().max()) < 1e-5 * float(wanted.abs().max())


def test_questions_that_are_refused(case):
    graph = case().graph
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6]))
    for head, rel, message in (
        ([23], [0], "head 23 is not in 0 ... 22"),
        ([0], [6], "relation 6 is not in 0 ... 5"),
        ([0, 1], [0], "expected head [B] and relation [B], found [2] and [1]"),
        ([[0]], [[0]], "found [1, 1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.score_all(graph, torch.tensor(head), torch.tensor(rel))
    graph.num_relations = 7
    with pytest.raises(GraphError, match="7 relations: link prediction needs an inverse"):
        model.score_all(graph, torch.tensor([0]), torch.tensor([0]))


# ---- ranking ----


class Table(torch.nn.Module):
    """Scores from a table [N, R, N]; remembers the sizes of its batches."""

    def __init__(self, table):
        super().__init__()
        self.table, self.sizes, self.modes = table, [], []

    def score_all(self, graph, head, relation):
        self.sizes.append(len(head))
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.table[head, relation]


def make_graph(N, R, rows):
    head, tail, rel = np.array(rows, np.int64).reshape(-1, 3).T
    names = Names([f"e{i}" for i in range(N)], "entity"), Names([f"r{i}" for i in range(R)], "relation")
    return KnowledgeGraph(GraphParts(*names, head, rel, tail))


def slow_ranks(table, N, R, facts, asked):
    """Places in all orders that the ties allow, by the definition."""
    true = {(h, r, t) for h, t, r in facts} | {(t, r + R, h) for h, t, r in facts}
    out = []
    for h, t, r in asked:
        for source, rel, gold in ((h, r, t), (t, (r + R) % (2 * R), h)):
            scores = [float(table[source, rel, e]) for e in range(N) if e != gold and (source, rel, e) not in true]
            best = 1 + sum(score > float(table[source, rel, gold]) for score in scores)
            worst = 1 + sum(score >= float(table[source, rel, gold]) for score in scores)
            out.append((best + worst) / 2)
    return out


@settings(max_examples=80)
@given(st.data())
def test_ranks_are_those_of_slow_python(data):
    N, R = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    end = st.integers(0, N - 1)
    facts = data.draw(st.lists(st.tuples(end, end, st.integers(0, R - 1)), min_size=1, max_size=20))
    asked = data.draw(st.lists(st.sampled_from(sorted(set(facts))), min_size=1, max_size=5, unique=True))
    levels = data.draw(st.integers(1, 4))  # few, so that scores tie
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    table = torch.randint(levels, (N, 2 * R, N), generator=generator).float()
    graph, triples = make_graph(N, R, facts), torch.tensor(asked)
    batch_size = data.draw(st.integers(1, 12))
    model = Table(table)
    found = evaluate_links(model, graph, triples, TrueTriples.of(graph), (1, 2), batch_size, bootstrap=10)
    wanted = np.array(slow_ranks(table, N, R, facts, asked))
    assert found.values["mr"].tolist() == wanted.tolist()
    assert found.values["mrr"].tolist() == (1 / wanted).tolist()
    assert found.values["hits@1"].tolist() == (wanted <= 1).tolist()
    assert found.values["hits@2"].tolist() == (wanted <= 2).tolist()
    assert sum(model.sizes) == 2 * len(asked) and max(model.sizes) <= batch_size


def test_by_hand(world):
    """(lima, capital of, ?) and its inverse; santiago is a capital of chile, and here of peru too."""
    extra = torch.tensor([[3, 1, 0]])
    index = TrueTriples.of(world, extra)
    table = torch.zeros(4, 4, 4)
    table[3, 0] = torch.tensor([0.5, 0.5, 9.0, 0.1])  # chile (2) is true and does not compete; lima (0) ties: rank 1.5
    table[1, 2] = torch.tensor([7.0, 8.0, 1.0, 1.0])  # lima (0) is true; peru (1) is above, chile (2) ties: rank 2.5
    found = evaluate_links(Table(table), world, extra, index, ks=(3, 1, 2), bootstrap=10)
    assert found.ids == ["santiago|capital of|peru: tail", "santiago|capital of|peru: head"]
    assert {name: column.tolist() for name, column in found.values.items()} == {
        "mrr": [1 / 1.5, 1 / 2.5],
        "mr": [1.5, 2.5],
        "hits@1": [0, 0],
        "hits@2": [1, 0],
        "hits@3": [1, 1],
    }
    assert found.bootstrap == 10


def perfect(index, N, R):
    table = torch.zeros(N, R, N)
    head, rel, tail = torch.cartesian_prod(torch.arange(N), torch.arange(R), torch.arange(N)).unbind(1)
    table[head, rel, tail] = index.contains(head, rel, tail).float()
    return table


def test_a_perfect_and_a_constant_model():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(12, (60, 3), generator=generator) % torch.tensor([12, 12, 3])
    graph = make_graph(12, 3, rows.tolist())
    index, triples = TrueTriples.of(graph), graph_triples(graph).unique(dim=0)
    best = evaluate_links(Table(perfect(index, 12, 6)), graph, triples, index, bootstrap=10)
    assert best["mrr"] == best["mr"] == best["hits@1"] == best["hits@10"] == 1
    constant = evaluate_links(Table(torch.full((12, 6, 12), -3.0)), graph, triples, index, bootstrap=10)
    counts = torch.stack(
        [
            index.count(triples[:, 0], triples[:, 2]),
            index.count(triples[:, 1], triples[:, 2] + 3),
        ],
        1,
    ).flatten()
    expected = (1 + (12 - counts + 1)).double() / 2  # the middle of the 12 - (true others) places
    assert constant.values["mr"].tolist() == expected.tolist()
    assert constant["mrr"] == pytest.approx(float((1 / expected).mean()))


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_shards_are_places_of_the_triples(world_size):
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.arange(17), torch.randint(17, (17,), generator=generator), torch.arange(17) % 2], 1)
    graph, model = make_graph(17, 2, rows.tolist()), Table(torch.randn(17, 4, 17, generator=generator))
    index = TrueTriples.of(graph)
    whole = evaluate_links(model, graph, rows, index, bootstrap=10)
    assert len(whole.ids) == 34 and whole.ids[:2] == [f"e0|r0|e{rows[0, 1]}: tail", f"e0|r0|e{rows[0, 1]}: head"]
    for rank in range(world_size):
        part = evaluate_links(model, graph, rows, index, shard=(rank, world_size), bootstrap=10)
        places = [2 * i + side for i in range(rank, 17, world_size) for side in (0, 1)]
        assert part.ids == [whole.ids[i] for i in places]
        assert all(np.array_equal(part.values[name], whole.values[name][places]) for name in whole.values)


def test_ids_of_different_facts_differ():
    names = ["a", "a|b", "b", "b|r", "\\", "a\\", "|b"]
    graph = KnowledgeGraph.from_triples([(h, r, t) for h in names for r in ("r", "b|r", "r|a") for t in names])
    ids = question_ids(graph, graph_triples(graph))
    assert len(set(ids)) == len(ids) == 2 * graph.num_triples == 2 * 147
    assert ids[:2] == ["a|r|a: tail", "a|r|a: head"] and "a\\|b|r\\|a|\\\\: head" in ids


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(world, training):
    index, triples = TrueTriples.of(world), graph_triples(world)
    model = Table(torch.zeros(4, 4, 4)).train(training)
    evaluate_links(model, world, triples, index, bootstrap=10)
    assert model.modes == [(False, False)] and model.training is training
    model.table = torch.full((4, 4, 4), torch.nan)
    with pytest.raises(ValueError, match=re.escape("scores of (entity 0, relation 0, ?) hold NaN")):
        evaluate_links(model, world, triples, index)
    assert model.training is training and torch.is_grad_enabled()


def test_a_real_model_and_a_graph_without_names(world):
    world.rel_emb = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6]))
    index, held = TrueTriples.of(world), graph_triples(world)[1:2]
    train = world.with_triples(np.array([True, False, True]))
    found = evaluate_links(model, train, held, index, batch_size=1, bootstrap=10)
    tails = model.eval().score_all(train, torch.tensor([1, 2]), torch.tensor([1, 3])).detach()
    assert found.values["mr"].tolist() == slow_ranks(
        {(s, r, e): tails[i, e] for i, (s, r) in enumerate(((1, 1), (2, 3))) for e in range(4)},
        4,
        2,
        graph_triples(world).tolist(),
        held.tolist(),
    )

    class Data:
        edge_index, edge_type, num_nodes, num_relations = train.edge_index, train.edge_type, 4, 4
        rel_emb = world.rel_emb

    bare = evaluate_links(model, Data(), held, index, bootstrap=10)
    assert bare.ids == ["1|1|2: tail", "1|1|2: head"] and bare.values["mr"].tolist() == found.values["mr"].tolist()


def test_what_is_refused(world):
    index, triples = TrueTriples.of(world), graph_triples(world)
    model = Table(torch.zeros(4, 4, 4))
    for given_triples, given_index, more, message in (
        (triples[:0], index, {}, "there are no triples to evaluate"),
        (
            triples[[0, 1, 0]],
            index,
            {},
            "1 of 3 triples stand there before, for example (head, tail, relation) = (0, 1, 0)",
        ),
        (torch.tensor([[0, 1, 0], [0, 2, 0]]), index, {}, "1 of 2 triples are not in the index (first: row 1)"),
        (torch.tensor([[1, 0, 2]]), index, {}, "row 0 of the triples has an inverse relation"),
        (torch.tensor([[0, 4, 0]]), index, {}, "row 0: tail 4 is not in 0 ... 3"),
        (
            triples,
            TrueTriples(triples, 5, 4),
            {},
            "the graph has 4 entities and 4 relations with inverses, the index 5",
        ),
        (triples, index, {"shard": (2, 2)}, "shard: expected (rank, world) with 0 <= rank < world, found (2, 2)"),
        (triples, index, {"ks": ()}, "each k 1 or more"),
        (triples, index, {"batch_size": 0}, "batch_size 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate_links(model, world, given_triples, given_index, **more)
    assert model.sizes == []
