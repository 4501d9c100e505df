"""The model against a plain one in all its settings, its caches, its inputs, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import GFMSettings, GNNRetriever, QueryGNN, entity_model
from ragkit.gfm.easy_edges import EdgeIndex
from ragkit.gfm.graph_view import _views, view_of
from ragkit.graph import GraphError, KnowledgeGraph

KINDS = [
    {},
    {"message_func": "transe"},
    {"aggregate_func": "mean", "short_cut": False},
    {"aggregate_func": "max", "message_func": "transe"},
    {"aggregate_func": "max"},
    {"aggregate_func": "pna"},
    {"aggregate_func": "pna", "message_func": "transe", "layer_norm": False, "hidden_dims": [6, 5]},
    {"layer_norm": False},
    {"hidden_dims": [6, 6, 4]},
    {"hidden_dims": [5]},
    {"concat_hidden": True, "hidden_dims": [6, 6, 4]},
    {"concat_hidden": True, "aggregate_func": "pna"},
    {"num_mlp_layer": 1},
    {"num_mlp_layer": 3},
    {"num_mlp_layer": 4, "concat_hidden": True},
]


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_logits_and_all_gradients_equal_the_plain_model(case, plain, kinds):
    c = case(dtype=torch.float64, **kinds)
    weight = torch.rand(c.graph.num_nodes, dtype=torch.float64) + 0.5
    graph_grads = []
    for run in (plain, lambda model, *inputs: model(*inputs)):
        embeddings = c.embeddings.clone().requires_grad_()
        mask = c.mask.clone().requires_grad_()
        logits = run(c.model, c.graph, embeddings, mask, weight)
        grads = torch.autograd.grad((logits.sin()).sum(), [*c.model.parameters(), embeddings, mask])
        graph_grads.append((logits, *grads))
    for wanted, found in zip(*graph_grads, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_without_gradient_in_small_blocks_the_same_logits(case, kinds, monkeypatch):
    c = case(**kinds)
    wanted = c.model(c.graph, c.embeddings, c.mask).detach()
    monkeypatch.setattr(entity_model, "CHUNK_NUMBERS", 100)
    with torch.no_grad():
        close(c.model(c.graph, c.embeddings, c.mask), wanted, 1e-5)
        close(c.model.eval()(c.graph, c.embeddings, c.mask), wanted, 1e-5)


def test_autocast_gives_about_the_same(case):
    c = case()
    wanted = c.model(c.graph, c.embeddings, c.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = c.model(c.graph, c.embeddings, c.mask)
    found.sum().backward()
    assert found.dtype == torch.float32
    close(found, wanted, 0.1)
    half = copy.deepcopy(c.model).bfloat16()
    close(half(c.graph, c.embeddings, c.mask), wanted, 0.1)


def test_flipped_edges_give_other_logits(case):
    c = case()
    a, b = (c.model(graph, c.embeddings, c.mask) for graph in (c.graph, c.graph.flipped()))
    assert float((a - b).detach().abs().max()) > 1e-3


def test_a_message_goes_from_tail_to_head(case):
    """With one edge (head 0, tail 1), node 0 hears of what node 1 starts with, and node 1 nothing of node 0."""
    c = case(triples=1, nodes=3, relations=1, hidden_dims=[6], questions=1)
    c.graph.edge_index, c.graph.edge_type = torch.tensor([[0], [1]]), torch.tensor([0])
    start = c.model(c.graph, c.embeddings, [[]])
    for node, wanted in ((1, [True, True, False]), (0, [True, False, False])):
        moved = (c.model(c.graph, c.embeddings, [[node]]) - start)[0].abs() > 1e-6
        assert moved.tolist() == wanted


# ---- edge weights and masks ----


def states(c, graph, **edges):
    view = view_of(graph)
    query, mask = c.model.inputs(view, c.embeddings, c.mask)
    layout = view.layout(torch.device("cpu"))
    found = c.model.entity_model.states(layout, c.model.relation_tables(graph), mask, query, **edges)
    return c.model.entity_model.score(found, query).t()


@pytest.mark.parametrize("kinds", [{}, {"aggregate_func": "max"}, {"aggregate_func": "pna"}, {"concat_hidden": True}])
def test_edge_weights_of_one_change_nothing_and_have_the_same_direction(case, plain, kinds):
    c = case(dtype=torch.float64, **kinds)
    E = c.graph.edge_index.shape[1]
    ones = torch.ones(E, dtype=torch.float64, requires_grad=True)
    wanted = plain(c.model, c.graph, c.embeddings, c.mask, None, ones)
    found = states(c, c.graph, edge_weight=ones)
    close(found, c.model(c.graph, c.embeddings, c.mask))
    a, b = (torch.autograd.grad(z[0, 3] + z[1, 5].sin(), ones)[0] for z in (wanted, found))
    close(b, a)
    assert a.abs().max() > 0
    layers = [ones.detach().clone().requires_grad_() for _ in range(c.model.settings.num_layers)]
    each = torch.autograd.grad(states(c, c.graph, edge_weight=layers)[0, 3], layers)
    close(sum(each), torch.autograd.grad(states(c, c.graph, edge_weight=ones)[0, 3], ones)[0])
    with pytest.raises(ValueError, match="one tensor for each of the 3 layers, found 2"):
        states(c, c.graph, edge_weight=layers[:2])


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "pna"])
def test_masked_edges_are_as_if_they_were_not_there(case, kind):
    c = case(dtype=torch.float64, aggregate_func=kind)
    drop = torch.rand(c.graph.edge_index.shape[1], generator=torch.Generator().manual_seed(3)) < 0.4
    close(states(c, c.graph, edge_mask=~drop), c.model(c.graph.without(drop), c.embeddings, c.mask))


def test_a_graph_without_edges(case):
    for kind in ("sum", "pna"):
        c = case(aggregate_func=kind)
        graph = c.graph.without(torch.ones(c.graph.edge_index.shape[1], dtype=torch.bool))
        assert torch.isfinite(c.model(graph, c.embeddings, c.mask)).all()


# ---- inputs ----


def test_list_masks_equal_dense_masks(case):
    c = case()
    lists = [[4, 0, 4], torch.tensor([7]), []]
    dense = torch.zeros(3, 23)
    dense[0, [0, 4]], dense[1, 7] = 1.0, 1.0
    weight = torch.rand(23)
    wanted = c.model(c.graph, c.embeddings, dense, weight)
    assert torch.equal(c.model(c.graph, c.embeddings, lists, weight), wanted)
    assert torch.equal(c.model(c.graph, c.embeddings, dense.bool(), weight), wanted)
    assert torch.equal(c.model(c.graph, c.embeddings, dense * weight), wanted)


def test_a_knowledge_graph_equals_its_pyg_data(world):
    pytest.importorskip("torch_geometric")
    world.rel_emb = torch.randn(4, 7)
    model = GNNRetriever(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6]))
    inputs = torch.randn(2, 7), [[0], [1, 3]]
    data = world.to_pyg()
    assert torch.equal(model(world, *inputs), model(data, *inputs))
    back = KnowledgeGraph.from_pyg(data)
    assert torch.equal(model(world, *inputs), model(back, *inputs))


def test_what_does_not_fit_is_refused(case):
    c = case()

    def refused(message, *inputs, graph=c.graph, error=ValueError):
        with pytest.raises(error, match=re.escape(message)):
            c.model(graph, *inputs)

    e, m = c.embeddings, c.mask
    refused("the encoder gives 9, the model wants 7", torch.randn(3, 9), m)
    refused("expected floats [B, 7], found torch.float32 [7]", e[0], m)
    refused("row 1 holds NaN", e.clone().index_fill_(0, torch.tensor([1]), torch.nan), m)
    refused("row 2 holds NaN or infinity", e, m.clone().index_fill_(0, torch.tensor([2]), torch.inf))
    refused("expected [3, 23] (questions, entities) or 3 lists, found [2, 23]", e, m[:2])
    refused("2 lists for 3 questions", e, [[0], [1]])
    refused("row 1: id 23 is not in 0 ... 22", e, [[0], [23], [2]])
    refused("row 0: id -1", e, [[-1], [2], [2]])
    refused("row 2: expected a list of ids", e, [[1], [2], [0.5]])
    refused("entities_weight: expected [23], found [5]", e, m, torch.ones(5))
    refused("entities_weight holds NaN", e, m, torch.full((23,), torch.nan))

    def broken(message, **changes):
        graph = c.graph.without(torch.zeros(80, dtype=torch.bool))
        vars(graph).update(changes)
        refused(message, e, m, graph=graph, error=GraphError)

    broken("has no relation embeddings", rel_emb=None)
    broken("expected floats [6, 7]: a row for each relation", rel_emb=torch.randn(3, 7))
    broken("rel_emb: the encoder gives 8 numbers for a text, the model wants 7", rel_emb=torch.randn(6, 8))
    broken(
        "1 of 6 rows hold NaN or infinity (first: row 4)",
        rel_emb=torch.eye(6, 7).index_fill_(0, torch.tensor(4), torch.inf),
    )  # noqa: E501
    broken("has no edge_type", edge_type=None)
    broken("edge_index[0], edge 0: id", num_nodes=int(c.graph.edge_index[0, 0]))
    broken("edge_type, edge", edge_type=c.graph.edge_type + 1)
    broken("edge_type, edge 0: id -1 is out of range for num_relations = 6", edge_type=c.graph.edge_type * 0 - 1)
    broken("edge_index must be [2, E] and edge_type [E], found [2, 80] and [79]", edge_type=c.graph.edge_type[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"message_func": "rotate"}, "message_func: 'rotate' is not supported; there is distmult, transe"),
        ({"aggregate_func": "min"}, "aggregate_func: 'min' is not supported; there is sum, mean, max, pna"),
        ({"message_func": "distmul"}, "did you mean 'distmult'?"),
        ({"activation": "gelu"}, "there is relu"),
        ({"hidden_dims": [5, 6]}, "all but the last must equal input_dim = 6"),
        ({"hidden_dims": []}, "hidden_dims is empty"),
        ({"num_mlp_layer": 0}, "num_mlp_layer: expected a whole number from 1, found 0"),
    ],
)
def test_settings_that_there_are_not(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GFMSettings(**{"input_dim": 6, "hidden_dims": [6, 6], **settings})


# ---- caches ----


def test_relation_tables_are_made_once_and_follow_every_change(case, plain):
    c = case()
    model, other = c.model.eval(), case(seed=5).graph
    calls = []
    model.rel_mlp.register_forward_hook(lambda *_: calls.append(1))

    def run(graph, calls_more):
        before = len(calls)
        with torch.no_grad():
            found = model(graph, c.embeddings, c.mask)
            assert len(calls) - before == calls_more
            close(found, plain(model, graph, c.embeddings, c.mask), 1e-5)

    run(c.graph, 1)
    run(c.graph, 0)
    run(other, 1)
    run(c.graph, 1)
    with torch.no_grad():
        model.entity_model.layers[1].relation_projection[2].weight.mul_(1.5)  # as an optimiser does
    run(c.graph, 1)
    run(c.graph, 0)
    model.rel_mlp.weight.data = model.rel_mlp.weight.data * 2
    run(c.graph, 1)
    model.load_state_dict({name: tensor * 0.7 for name, tensor in model.state_dict().items()})
    run(c.graph, 1)
    model.rel_mlp.bias.data.add_(1)  # PyTorch does not count this one; setting the mode does
    model.train().eval()
    run(c.graph, 1)
    c.graph.rel_emb.add_(1)
    run(c.graph, 1)
    c.graph.rel_emb = torch.randn(6, 7)
    run(c.graph, 1)
    run(c.graph, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        model(c.graph, c.embeddings, c.mask)
    run(c.graph, 1)


def test_a_copy_and_a_pickle_have_their_own_tables(case, plain):
    c = case()
    model = c.model.eval()
    with torch.no_grad():
        model(c.graph, c.embeddings, c.mask)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.rel_mlp.weight.add_(1)
            close(twin(c.graph, c.embeddings, c.mask), plain(twin, c.graph, c.embeddings, c.mask), 1e-5)


def test_training_never_uses_kept_tables(case):
    c = case()
    with torch.no_grad():
        c.model.eval()(c.graph, c.embeddings, c.mask)
    c.model(c.graph, c.embeddings, c.mask).sum().backward()
    assert c.model.rel_mlp.weight.grad.abs().max() > 0


def test_embeddings_of_inference_mode_are_checked_and_never_stale(case, plain):
    c = case()
    model = c.model.eval()
    with torch.inference_mode():
        c.graph.rel_emb = torch.randn(6, 7)
        close(model(c.graph, c.embeddings, c.mask), plain(model, c.graph, c.embeddings, c.mask), 1e-5)
        c.graph.rel_emb.mul_(2)
        close(model(c.graph, c.embeddings, c.mask), plain(model, c.graph, c.embeddings, c.mask), 1e-5)


def test_a_graph_is_laid_out_once_until_it_changes_and_is_not_kept_alive(case, plain):
    c = case()
    view = view_of(c.graph)
    assert view_of(c.graph) is view
    c.graph.edge_index[0, 0] = (c.graph.edge_index[0, 0] + 1) % 23  # in place
    assert view_of(c.graph) is not view
    close(c.model(c.graph, c.embeddings, c.mask), plain(c.model, c.graph, c.embeddings, c.mask), 1e-5)
    c.graph.edge_index = c.graph.edge_index.flip(0)  # another tensor
    close(c.model(c.graph, c.embeddings, c.mask), plain(c.model, c.graph, c.embeddings, c.mask), 1e-5)
    view = view_of(c.graph)
    c.graph.num_nodes = 40
    assert view_of(c.graph).num_nodes == 40
    gc.collect()  # graphs of earlier tests that only a cycle keeps go now, and not with this one
    key, count = id(c.graph), len(_views)
    del c.graph
    gc.collect()
    assert key not in _views and len(_views) == count - 1


# ---- link prediction ----


def test_easy_edges_are_those_of_the_batch_and_their_inverses(case):
    c = case(relations=2, triples=30, nodes=9)
    graph = c.graph
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6]))
    head, tail, kind = (int(graph.edge_index[0, 3]), int(graph.edge_index[1, 3]), int(graph.edge_type[3]))
    others = [t for t in range(9) if t != tail][:3]
    batch = torch.tensor([[[head, tail, kind], *([head, t, kind] for t in others)]])
    drop = torch.zeros(60, dtype=torch.bool)
    for h, t, r in batch[0].tolist():
        drop |= (graph.edge_index[0] == h) & (graph.edge_index[1] == t) & (graph.edge_type == r)
        drop |= (graph.edge_index[0] == t) & (graph.edge_index[1] == h) & (graph.edge_type == (r + 2) % 4)
    assert drop.sum() >= 2
    wanted = model(graph.without(drop), batch, remove_easy_edges=False)
    close(model.train()(graph, batch), wanted, 1e-5)
    close(model.eval()(graph, batch), model(graph, batch, remove_easy_edges=False), 0)
    assert float((model(graph, batch) - wanted).detach().abs().max()) > 1e-4


def test_rows_with_other_heads_are_asked_the_other_way_round(case):
    c = case()
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6])).eval()
    other_heads = torch.tensor([[[4, 2, 1], [5, 2, 1], [6, 2, 1]], [[4, 2, 4], [0, 2, 4], [1, 2, 4]]])
    other_tails = torch.tensor([[[2, 4, 4], [2, 5, 4], [2, 6, 4]], [[2, 4, 1], [2, 0, 1], [2, 1, 1]]])
    close(model(c.graph, other_heads), model(c.graph, other_tails), 0)
    score = model(c.graph, other_tails[:1])
    close(score, model(c.graph, other_tails)[:1], 1e-6)
    retriever = GNNRetriever(model.settings)
    retriever.load_state_dict(model.state_dict(), strict=False)
    tables = retriever.relations(c.graph)
    view = view_of(c.graph)
    query, mask = tables.base[[4]], torch.zeros(23, 1).index_fill_(0, torch.tensor([2]), 1.0)
    full = retriever.entity_model.states(view.layout(torch.device("cpu")), tables.layers, mask, query)
    close(retriever.entity_model.score(full, query)[[4, 5, 6], 0], score[0], 1e-5)


def test_batches_that_are_refused(case):
    c = case()
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6]))
    for rows, message in (
        ([[[0, 23, 0]]], "batch_htr[0, 0]: tail 23 is not in 0 ... 22"),
        ([[[0, 1, 0], [-1, 1, 0]]], "batch_htr[0, 1]: head -1"),
        ([[[0, 1, 6]]], "relation 6 is not in 0 ... 5"),
        ([[[0, 1, 0], [2, 3, 0]]], "row 0: a row must have one relation, and one head or one tail"),
        ([[[0, 1, 0], [0, 3, 1]]], "one relation"),
        ([[0, 1, 0]], "expected integer [B, 1 + negatives, 3]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model(c.graph, torch.tensor(rows))


@settings(max_examples=60)
@given(st.data())
def test_edges_are_found_by_what_they_say(data):
    from ragkit_kernels.relational_conv import build_layout

    nodes, relations = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    triple = st.tuples(st.integers(0, nodes - 1), st.integers(0, relations - 1), st.integers(0, nodes - 1))
    edges, asked = data.draw(st.lists(triple, max_size=30)), data.draw(st.lists(triple, max_size=12))
    columns = torch.tensor(edges, dtype=torch.int64).reshape(-1, 3).unbind(1)
    index = EdgeIndex(build_layout(columns[0], columns[2], columns[1], nodes, relations))
    keep = index.mask_without(*torch.tensor(asked, dtype=torch.int64).reshape(-1, 3).unbind(1))
    assert keep.tolist() == [edge not in asked for edge in edges]
