"""Active rows: found as a search by hand finds them, and exactly the dense path's logits and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.relational_conv import backends, build_layout
from relconv_graphs import GRAPHS, Edges, any_edges

from ragkit.gfm import GFMSettings, GNNRetriever, active_states, entity_weights, spread
from ragkit.gfm.active import ActiveRows, active_rows
from ragkit.graph import KnowledgeGraph


def hops_by_hand(case: Edges, seeds: set[int], layers: int) -> dict[int, int]:
    """Hop of each node that a message from the seeds reaches, edge by edge."""
    hop = dict.fromkeys(seeds, 0)
    for distance in range(1, layers + 1):
        reached = {int(d) for d, s in zip(case.dst, case.src, strict=True) if hop.get(int(s), layers) < distance}
        for node in reached - hop.keys():
            hop[node] = distance
    return hop


def seeds_of(case: Edges, seed: int, queries: int) -> list[set[int]]:
    g = torch.Generator().manual_seed(seed)
    return [set(torch.randint(case.nodes, (2,), generator=g).tolist()) for _ in range(queries)]


@settings(max_examples=80)
@given(any_edges(), st.integers(0, 99), st.integers(1, 4))
def test_rows_are_those_within_reach(case, seed, layers):
    sets = seeds_of(case, seed, queries=2)
    pairs = [(b, n) for b, s in enumerate(sets) for n in s]
    rows = active_rows(case.layout(), *torch.tensor(pairs).t(), 2, layers)
    hops = [hops_by_hand(case, s, layers) for s in sets]
    assert rows.counts == [sum(h <= k for hop in hops for h in hop.values()) for k in range(layers + 1)]
    active = rows.counts[-1]
    found = list(zip(rows.query.tolist(), rows.node.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert active == len(found)
    order = [hops[b][n] for b, n in found]
    assert order == sorted(order) and len(order) == sum(len(hop) for hop in hops)
    ptr = rows.ptr.tolist()
    edges = list(zip(case.dst.tolist(), case.src.tolist(), case.rel.tolist(), strict=True))
    for r, (b, n) in enumerate(found):
        sources, relations = rows.edges[:, ptr[r] : ptr[r + 1]].tolist()
        heard = sorted((found[s], rel) for s, rel in zip(sources, relations, strict=True))
        assert heard == sorted(((b, s), rel) for d, s, rel in edges if d == n and s in hops[b])
    for layer in range(1, layers + 1):
        check_layer(rows, layer)


def check_layer(rows, layer):
    """The layer's layout holds the edges from rows active before it to rows active after it, in all three orders."""
    before, after = rows.counts[layer - 1], rows.counts[layer]
    ptr = rows.ptr.tolist()
    wanted = sorted(
        (r, int(rows.edges[0, e]), int(rows.edges[1, e]))
        for r in range(after)
        for e in range(ptr[r], ptr[r + 1])
        if rows.edges[0, e] < before
    )
    layout = rows.layout(layer, backward=True)
    assert (layout.num_nodes, layout.num_dst, layout.num_relations) == (before, after, rows.num_relations)
    by_dst, by_src, by_rel = (
        [
            (segment, *layout_part.edges[:, e].tolist())
            for segment in range(len(layout_part.ptr) - 1)
            for e in range(int(layout_part.ptr[segment]), int(layout_part.ptr[segment + 1]))
        ]
        for layout_part in layout.parts()
    )
    placed = [(d, s, r) for d, s, r, _ in by_dst]
    assert sorted(placed) == wanted
    assert [p for *_, p in by_dst] == list(range(len(wanted)))
    assert [(d, s, r) for s, d, r, _ in by_src] == [placed[p] for *_, p in by_src]
    assert [(d, s, r) for r, d, s, _ in by_rel] == [placed[p] for *_, p in by_rel]
    assert sorted(p for *_, p in by_src) == sorted(p for *_, p in by_rel) == list(range(len(wanted)))


def test_gives_up_beyond_the_limit():
    layout = GRAPHS["random"].layout()
    assert active_rows(layout, torch.tensor([0]), torch.tensor([0]), 1, 3, most=1) is None
    assert active_rows(layout, torch.tensor([0]), torch.tensor([0]), 1, 3, most=10_000) is not None


SETTINGS = {
    "default": {},
    "mean": {"aggregate_func": "mean"},
    "transe mean": {"message_func": "transe", "aggregate_func": "mean"},
    "transe sum": {"message_func": "transe"},
    "no residual, no norm": {"short_cut": False, "layer_norm": False},
    "one layer": {"hidden_dims": [6]},
}


def model_and_graph(name: str, nodes: int = 60, triples: int = 90, doubled: bool = True):
    torch.manual_seed(0)
    given = {"rel_emb_dim": 5, "input_dim": 6, "hidden_dims": [6, 6, 6], **SETTINGS[name]}
    model = GNNRetriever(GFMSettings(**given)).double().eval()
    for parameter in model.parameters():  # biases and norms away from their start, so that the background is not empty
        torch.nn.init.normal_(parameter, std=0.5)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(nodes, (2, triples), generator=g).tolist()
    relations = torch.randint(4, (triples,), generator=g).tolist()
    graph = KnowledgeGraph.from_triples(
        [(f"e{h}", f"r{r}", f"e{t}") for h, r, t in zip(ids[0], relations, ids[1], strict=True)]
    )
    graph.rel_emb = torch.randn(2 * graph.num_relations, 5, generator=g)
    return model, graph


def ask(model, graph, rows, seeds=((0,), (3, 7), ()), weight=None):
    model.rows = rows
    questions = torch.randn(len(seeds), 5, generator=torch.Generator().manual_seed(2)).double()
    return model(graph, questions, [list(s) for s in seeds], weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_and_gradients_equal_the_dense_path(name):
    """A question without entities is the background; weights of the entities are kept."""
    model, graph = model_and_graph(name)
    weight = torch.rand(graph.num_entities, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    results = []
    for rows in ("dense", "active"):
        logits = ask(model, graph, rows, weight=weight)
        g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        results.append([logits, *torch.autograd.grad(logits, list(model.parameters()), g)])
    for dense, active in zip(*results, strict=True):
        torch.testing.assert_close(active, dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_keeps_the_background_until_a_weight_changes(dtype, monkeypatch):
    """Blocks of two rows, so that known and new rows meet in one."""
    monkeypatch.setattr(spread, "BLOCK_NUMBERS", 2 * 6)
    monkeypatch.setattr(active_states, "ROWS_AT_ONCE", 5)
    model, graph = model_and_graph("default")
    model.to(dtype)
    for step in range(2):
        with torch.inference_mode():
            dense, active, again = (ask(model, graph, rows) for rows in ("dense", "active", "active"))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(active, dense, rtol=tolerance, atol=tolerance)
        assert torch.equal(active, again)
        if step == 0:
            before = dense
            with torch.no_grad():
                model.entity_model.layers[0].linear.weight.mul_(1.5)
    assert not torch.allclose(dense, before)


def test_the_background_is_computed_once_at_inference(monkeypatch):
    from ragkit.gfm import model as module

    calls = []
    real = module.compute_background
    monkeypatch.setattr(module, "compute_background", lambda *a: calls.append(1) or real(*a))
    model, graph = model_and_graph("default")
    with torch.no_grad():
        for _ in range(3):
            ask(model, graph, "active")
    assert len(calls) == 1
    ask(model, graph, "active")  # with gradients it is part of the step
    assert len(calls) == 2


@settings(max_examples=20)
@given(any_edges(), st.integers(0, 9))
def test_any_graph_also_without_inverse_edges(case, seed):
    from ragkit.gfm.active_states import active_logits, choose_rows, compute_background

    torch.manual_seed(seed)
    model = GNNRetriever(GFMSettings(rel_emb_dim=3, input_dim=4, hidden_dims=[4, 4])).double().entity_model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    layout = build_layout(case.dst, case.src, case.rel, case.nodes, case.relations)
    tables = [torch.randn(case.relations, 4).double() for _ in range(2)]
    query = torch.randn(2, 4).double()
    mask = torch.zeros(case.nodes, 2).double()
    for b, s in enumerate(seeds_of(case, seed, 2)):
        mask[list(s), b] = 0.5
    rows = choose_rows(model, layout, mask, most=float("inf"))
    background = compute_background(model, layout, tables)
    active = active_logits(model, rows, background, tables, layout, mask, query)
    torch.testing.assert_close(active, model.score(model.states(layout, tables, mask, query), query))


def test_auto_takes_the_path_with_fewer_rows():
    """A long chain: a question at its end reaches 4 of 400 nodes. A dense little graph: it reaches all."""
    chain = KnowledgeGraph.from_triples([(f"e{i}", "next", f"e{i + 1}") for i in range(400)])
    model, small = model_and_graph("default", nodes=8, triples=60)
    layout, mask = chain.layout, torch.zeros(401, 1)
    mask[0] = 1.0
    with torch.no_grad():
        rows = model.choose_rows(layout, mask)
        assert rows is not None and rows.counts == [1, 2, 3, 4]
        everywhere = torch.zeros(small.num_entities, 1)
        everywhere[0] = 1.0
        assert model.choose_rows(small.layout, everywhere) is None
        model.background_limit = 10
        assert model.choose_rows(layout, mask) is None
    model.background_limit = 2 << 30
    assert model.choose_rows(layout, mask) is None  # with gradients the background of one question does not pay
    assert model.choose_rows(layout, mask.expand(-1, 8).contiguous()) is not None


def test_settings_without_active_rows_say_so():
    _, graph = model_and_graph("default")
    model = GNNRetriever(GFMSettings(rel_emb_dim=5, input_dim=6, hidden_dims=[6, 6], concat_hidden=True)).double()
    with pytest.raises(ValueError, match='rows="active" needs aggregate_func sum or mean, equal hidden_dims'):
        ask(model, graph, "active")
    assert ask(model, graph, "auto").shape == (3, graph.num_entities)
    with pytest.raises(ValueError, match='rows must be "auto", "dense" or "active", found \'fast\''):
        ask(model, graph, "fast")


@pytest.mark.parametrize("name", ["default", "mean", "no residual, no norm", "transe sum"])
def test_the_first_layer_from_the_rows_that_it_computes(name, monkeypatch):
    """Switched off and on, dense states and all gradients are the same."""

    model, graph = model_and_graph(name)
    results = []
    for most in (0.0, 1.0):
        monkeypatch.setattr(spread, "MOST_OF_FIRST", most)
        logits = ask(model, graph, "dense", weight=torch.full((graph.num_entities,), 0.7, dtype=torch.float64))
        g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        results.append([logits, *torch.autograd.grad(logits, list(model.parameters()), g)])
    for whole, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, whole, rtol=1e-9, atol=1e-10)


def test_the_first_layer_is_taken_whole_when_the_entities_reach_many():
    from ragkit.gfm.spread import first_states

    model, graph = model_and_graph("default", nodes=8, triples=60)
    tables = model.relation_tables(graph)
    query = torch.randn(1, 6, dtype=torch.float64)
    for seeds, taken in (([0], False), ([], True)):
        mask = torch.zeros(graph.num_entities, 1, dtype=torch.float64)
        mask[seeds] = 1.0
        layer = model.entity_model.layers[0]
        found = first_states(layer, model.settings, graph.layout, tables[0], mask, query)
        assert (found is not None) == taken


@pytest.mark.parametrize("rows", ["dense", "auto", "active"])
def test_autocast_on_every_path_and_a_training_step(rows):
    """Few entities to a question, so that the first layer, too, is computed row by row."""
    model, graph = model_and_graph("default", nodes=300, triples=320)
    model.float()
    wanted = ask_float(model, graph, rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = ask_float(model, graph, rows)
        found.square().mean().backward()
    assert found.dtype == torch.float32
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again = ask_float(model, graph, rows)
    for logits in (found, again):
        assert (logits - wanted).norm() < 0.1 * wanted.norm()


def ask_float(model, graph, rows):
    model.rows = rows
    questions = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    return model(graph, questions, [[0], [3, 7], []])


def test_the_gradient_of_a_weight_that_is_zero():
    """An entity of no document has weight 0 and is no seed; its weight's gradient is that of the plain model."""
    model, graph = model_and_graph("default")
    wanted = None
    for rows in ("dense", "auto"):
        weight = torch.ones(graph.num_entities, dtype=torch.float64)
        weight[3] = 0.0
        weight.requires_grad_()
        (found,) = torch.autograd.grad(ask(model, graph, rows, weight=weight).square().sum(), weight)
        shifted = weight.detach().clone()
        shifted[3] = 1e-6
        with torch.no_grad():
            change = ask(model, graph, "dense", weight=shifted).square().sum()
            change -= ask(model, graph, "dense", weight=weight.detach()).square().sum()
        torch.testing.assert_close(found[3], change / 1e-6, rtol=1e-3, atol=1e-6)
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match='rows="active" has no gradient for the mask'):
        ask(model, graph, "active", weight=weight)


def test_several_graphs_in_turn_and_from_two_threads(monkeypatch):
    """Each keeps its background, and no thread is given the other's tables."""
    from concurrent.futures import ThreadPoolExecutor

    from ragkit.gfm import model as module

    calls = []
    real = module.compute_background
    monkeypatch.setattr(module, "compute_background", lambda *a: calls.append(1) or real(*a))
    model, first = model_and_graph("default")
    _, second = model_and_graph("default", nodes=61, triples=95)
    second.rel_emb = second.rel_emb + 1
    with torch.no_grad():
        wanted = [ask(model, graph, "active") for graph in (first, second)]
        for _ in range(3):
            for graph, logits in zip((first, second), wanted, strict=True):
                assert torch.equal(ask(model, graph, "active"), logits)
    assert len(calls) == 2

    def work(number):
        with torch.no_grad():
            return all(torch.equal(ask(model, (first, second)[number], "active"), wanted[number]) for _ in range(60))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1, 0, 1))) == [True] * 4


def weighted_gradients(model, graph, rows):
    weight = torch.rand(graph.num_entities, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    logits = ask(model, graph, rows, weight=weight)
    return logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))


@pytest.mark.skipif(backends.available("cpu") is None, reason="no numba")
@pytest.mark.parametrize("rows", ["active", "dense"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "one layer"])
def test_one_piece_equals_plain_ops(name, rows, monkeypatch):
    """Also where a layer takes several blocks of rows; "dense" has the first layer from its active rows."""
    model, graph = model_and_graph(name, nodes=200, triples=220)
    monkeypatch.setattr(spread, "BLOCK_NUMBERS", 6 * 7)  # 7 rows
    with monkeypatch.context() as patch:
        patch.setattr(backends, "use_kernel", lambda *_: False)
        wanted = weighted_gradients(model, graph, rows)
    with monkeypatch.context() as patch:
        patch.setattr(ActiveRows, "layout", lambda *_: pytest.fail("edges were sorted"))
        found = weighted_gradients(model, graph, rows)
        with torch.no_grad():
            without = ask(model, graph, rows)
        model.requires_grad_(False)
        assert torch.equal(ask(model, graph, rows), without)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(backends.available("cpu") is None, reason="no numba")
def test_the_same_bits_on_one_and_two_threads():
    model, graph = model_and_graph("default", nodes=200, triples=220)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weighted_gradients(model.float(), graph, "active")
        torch.set_num_threads(2)
        two = weighted_gradients(model, graph, "active")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])
    for a, b in zip(one[1:], two[1:], strict=True):  # PyTorch's own products may split their sums
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sets", [[[], []], [[3], [2, 3]], [[], [0]]])
def test_questions_whose_entities_have_no_weight(sets, training):
    """No entity at all, or entities of no document: every row is the background's, on either path."""
    graph = KnowledgeGraph.from_triples(
        [("lima", "capital of", "peru"), ("peru", "borders", "chile"), ("santiago", "capital of", "chile")],
        {"Peru": ["peru", "lima"]},
    )
    weights = entity_weights(graph)
    assert weights.tolist() == [1, 1, 0, 0]
    torch.manual_seed(0)
    graph.rel_emb = torch.randn(4, 7)
    model = GNNRetriever(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6, 6])).train(training)
    e = torch.randn(2, 7)
    found = {}
    for model.rows in ("dense", "active", "auto"):
        with torch.set_grad_enabled(training):
            found[model.rows] = model(graph, e, sets, weights)
    torch.testing.assert_close(found["active"], found["dense"])
    torch.testing.assert_close(found["auto"], found["dense"])
