"""Facts, negatives and held-out facts against slow Python."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.gfm import GFMSettings, QueryGNN, TrueTriples, corrupt, graph_triples, hold_out
from ragkit.gfm.ragged import Ragged
from ragkit.graph import KnowledgeGraph
from ragkit.graph.names import Names
from ragkit.graph.parts import GraphParts

SHARED = Path(os.environ.get("RAGKIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


@st.composite
def facts(draw, fewest=0, most=25):
    """(N, relations without inverses, rows (head, tail, relation), some of them twice)."""
    N, R = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    end = st.integers(0, N - 1)
    rows = draw(st.lists(st.tuples(end, end, st.integers(0, R - 1)), min_size=fewest, max_size=most))
    return N, R, rows


def tensor(rows):
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def both_ways(rows, R):
    """All (head, relation, tail), inverses included."""
    return {(h, r, t) for h, t, r in rows} | {(t, r + R, h) for h, t, r in rows}


def make_graph(N, R, rows):
    head, tail, rel = np.array(rows, np.int64).reshape(-1, 3).T
    names = Names([f"e{i}" for i in range(N)], "entity"), Names([f"r{i}" for i in range(R)], "relation")
    return KnowledgeGraph(GraphParts(*names, head, rel, tail))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the index ----


@given(facts())
def test_the_index_knows_what_is_true(case):
    N, R, rows = case
    index, true = TrueTriples(tensor(rows), N, 2 * R), both_ways(rows, R)
    head, rel, tail = torch.cartesian_prod(torch.arange(N), torch.arange(2 * R), torch.arange(N)).unbind(1)
    found = index.contains(head, rel, tail)
    assert found.tolist() == [fact in true for fact in zip(head.tolist(), rel.tolist(), tail.tolist(), strict=True)]
    head, rel = torch.cartesian_prod(torch.arange(N), torch.arange(2 * R)).unbind(1)
    lists = index.true_tails(head, rel)
    wanted = [[t for t in range(N) if (h, r, t) in true] for h, r in zip(head.tolist(), rel.tolist(), strict=True)]
    assert isinstance(lists, Ragged) and [lists[i].tolist() for i in range(len(lists))] == wanted
    assert index.count(head, rel).tolist() == [len(tails) for tails in wanted]
    for h, r, tails in zip(head, rel, wanted, strict=True):
        wrong = [e for e in range(N) if e not in tails]
        number = torch.arange(len(wrong))
        assert index.wrong_tail(h.expand_as(number), r.expand_as(number), number).tolist() == wrong
        with pytest.raises(ValueError, match="fewer wrong tails"):
            index.wrong_tail(h[None], r[None], torch.tensor([len(wrong)]))


def test_the_index_of_a_graph_and_more(world):
    assert graph_triples(world).tolist() == [[0, 1, 0], [1, 2, 1], [3, 2, 0]]
    index = TrueTriples.of(world, torch.tensor([[3, 1, 0]], dtype=torch.int32))
    assert (index.num_entities, index.num_relations) == (4, 4)
    assert index.true_tails(torch.tensor([3, 1, 2, 0]), torch.tensor([0, 2, 3, 1])).at(range(4))[1].tolist() == [0, 3]
    assert index.true_tails(torch.tensor([3]), torch.tensor([0]))[0].tolist() == [1, 2]
    assert len(index.true_tails(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))) == 0


def test_ids_whose_product_does_not_fit_64_bits():
    """N · R · N is about 2^65 here; (head, relation, tail) in one number would wrap round."""
    N, R = 1 << 22, 1 << 21
    rows = [(N - 1, N - 2, R // 2 - 1), (0, N - 1, 0), (N - 1, 0, R // 2 - 1)]
    index = TrueTriples(tensor(rows), N, R)
    ends, rel = torch.tensor([N - 1, N - 2, 1]), torch.tensor([R // 2 - 1, R - 1, 0])
    assert [t.tolist() for t in index.true_tails(ends, rel).at(range(3))] == [[0, N - 2], [N - 1], []]
    number = torch.tensor([0, N - 4, N - 3])
    assert index.wrong_tail(ends[[0, 0, 0]], rel[[0, 0, 0]], number).tolist() == [1, N - 3, N - 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([[0, 1, 0], [0, 3, 1]]), "triples, row 1: tail 3 is not in 0 ... 2"),
        (torch.tensor([[-1, 1, 0]]), "row 0: head -1"),
        (torch.tensor([[0, 1, 4]]), "relation 4 is not in 0 ... 3"),
        (torch.zeros(2, 3), r"expected integer \[B, 3\] \(head, tail, relation\), found torch.float32 \[2, 3\]"),
        (torch.zeros(3, dtype=torch.int64), r"found torch.int64 \[3\]"),
    ],
)
def test_triples_that_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        TrueTriples(rows, 3, 4)


def test_sizes_and_queries_that_are_refused():
    with pytest.raises(ValueError, match="an inverse r"):
        TrueTriples(tensor([]), 3, 5)
    index = TrueTriples(tensor([(0, 1, 0)]), 3, 2)
    with pytest.raises(ValueError, match="relation: id 2 is not in 0 ... 1"):  # else it would be (head + 1, 0)
        index.true_tails(torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="tail: id 3"):
        index.contains(torch.tensor([0]), torch.tensor([0]), torch.tensor([3]))


# ---- negatives ----


@settings(max_examples=150)
@given(facts(fewest=1), st.booleans(), st.integers(0, 2**31), st.data())
def test_negatives(case, strict, seed, data):
    N, R, rows = case
    index, true = TrueTriples(tensor(rows), N, 2 * R), both_ways(rows, R)
    ways = sorted((h, t, r) for h, r, t in true)
    chosen = data.draw(st.lists(st.sampled_from(ways), min_size=1, max_size=7))  # inverse relations too
    kept_tails = [all((h, r, e) in true for e in range(N)) for h, t, r in chosen]
    kept_heads = [all((e, r, t) in true for e in range(N)) for h, t, r in chosen]
    hopeless = strict and any(a and b for a, b in zip(kept_tails, kept_heads, strict=True))
    if hopeless or N == 1:
        with pytest.raises(ValueError, match=f"has no negatives: each of the {N} entities makes a true triple of it"):
            corrupt(tensor(chosen), index, 4, strict, seeded(seed))
        return
    batch = corrupt(tensor(chosen), index, 4, strict, seeded(seed))
    assert batch.dtype == torch.int64 and tuple(batch.shape) == (len(chosen), 5, 3)
    assert torch.equal(batch, corrupt(tensor(chosen), index, 4, strict, seeded(seed)))
    sides = []
    for row, fact in zip(batch.tolist(), chosen, strict=True):
        assert tuple(row[0]) == fact and list(fact) not in row[1:]
        assert all(r == fact[2] for _, _, r in row)
        other_tails = all(h == fact[0] for h, _, _ in row)
        assert other_tails or all(t == fact[1] for _, t, _ in row)
        assert not strict or not any((h, r, t) in true for h, t, r in row[1:])
        sides.append(other_tails)
    half = len(chosen) // 2
    first, last = range(half), range(len(chosen) - half, len(chosen))
    assert all(sides[i] or strict and kept_tails[i] for i in first)
    assert not any(sides[i] and not (strict and kept_heads[i]) for i in last)


def test_a_row_in_the_middle_gets_either_side():
    index = TrueTriples(tensor([(0, 1, 0), (2, 3, 0), (4, 5, 0)]), 9, 2)
    generator = seeded(1)
    for B in (1, 3):
        sides = [corrupt(tensor([(0, 1, 0), (2, 3, 0), (4, 5, 0)])[:B], index, 3, True, generator) for _ in range(60)]
        tails = [[bool((row[:, 0] == row[0, 0]).all()) for row in batch] for batch in sides]
        assert all(row[: B // 2] == [True] * (B // 2) and row[(B + 1) // 2 :] == [False] * (B // 2) for row in tails)
        assert 15 < sum(row[B // 2] for row in tails) < 45


@pytest.mark.parametrize("strict", [True, False])
def test_negatives_are_even(strict):
    """Chi-square of 40,000 draws for a tail and for a head; the bound is the 0.999 quantile for 12 degrees at most."""
    N, draws = 12, 20_000
    rows = [(3, t, 0) for t in (0, 3, 4, 11)] + [(h, 4, 0) for h in (7, 8)]
    index, true = TrueTriples(tensor(rows), N, 2), both_ways(rows, 1)
    batch = corrupt(tensor([(3, 4, 0)] * 2), index, draws, strict, seeded(5))
    for column, row, gold in ((1, batch[0], 4), (0, batch[1], 3)):
        fact = (lambda e: (3, 0, e)) if column == 1 else (lambda e: (e, 0, 4))
        allowed = [e for e in range(N) if e != gold and not (strict and fact(e) in true)]
        assert len(allowed) == (11 if not strict else 8 if column == 1 else 9)
        counts = Counter(row[1:, column].tolist())
        assert set(counts) == set(allowed)
        expected = draws / len(allowed)
        assert sum((counts[e] - expected) ** 2 / expected for e in allowed) < 32.9


def test_the_negatives_come_from_the_generator_alone():
    index = TrueTriples(tensor([(0, 1, 0), (2, 3, 0)]), 50, 2)
    torch.manual_seed(0)
    first = corrupt(tensor([(0, 1, 0), (2, 3, 0)]), index, 20, True, seeded(7))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, corrupt(tensor([(0, 1, 0), (2, 3, 0)]), index, 20, True, seeded(7)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, corrupt(tensor([(0, 1, 0), (2, 3, 0)]), index, 20, True, seeded(8)))


def test_a_question_that_everything_answers_is_asked_the_other_way():
    index = TrueTriples(tensor([(0, t, 0) for t in range(4)]), 4, 2)
    batch = corrupt(tensor([(0, 1, 0), (0, 2, 0)]), index, 9, True, seeded())
    assert set(batch[0, 1:, 0].tolist()) == {1, 2, 3} and (batch[0, :, 1] == 1).all()
    full = TrueTriples(tensor([(h, t, 0) for h in range(3) for t in range(3)]), 3, 2)
    with pytest.raises(ValueError, match=r"row 0: \(head, tail, relation\) = \(0, 1, 0\) has no negatives: each of"):
        corrupt(tensor([(0, 1, 0)]), full, 1, True, seeded())
    assert corrupt(tensor([(0, 1, 0)]), full, 1, False, seeded()).shape == (1, 2, 3)


def test_negatives_that_are_refused():
    index = TrueTriples(tensor([(0, 1, 0)]), 3, 2)
    with pytest.raises(ValueError, match=r"row 1: \(head, tail, relation\) = \(1, 0, 0\) is not in the index"):
        corrupt(tensor([(0, 1, 0), (1, 0, 0)]), index, 2, True, seeded())
    assert len(corrupt(tensor([(0, 1, 0), (1, 0, 0)]), index, 2, False, seeded())) == 2
    with pytest.raises(ValueError, match="num_negative: expected 1 or more, found 0"):
        corrupt(tensor([(0, 1, 0)]), index, 0, True, seeded())
    with pytest.raises(ValueError, match="row 0: tail 3"):
        corrupt(tensor([(0, 3, 0)]), index, 2, False, seeded())


def test_the_model_takes_the_batch(world):
    world.rel_emb = torch.randn(4, 7, generator=seeded())
    index = TrueTriples.of(world)
    model = QueryGNN(GFMSettings(rel_emb_dim=7, input_dim=6, hidden_dims=[6, 6]))
    batch = corrupt(graph_triples(world), index, 5, True, seeded())
    scores = model(world, batch)
    assert scores.shape == (3, 6) and bool(scores.isfinite().all())


# ---- held-out facts ----


@settings(max_examples=150)
@given(facts(most=40), st.floats(0, 0.99), st.integers(0, 2**31), st.none() | st.integers(0, 5))
def test_held_out_facts(case, share, seed, most):
    N, R, rows = case
    graph = make_graph(N, R, rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep, held = hold_out(graph, share, seed, most)
        again = hold_out(graph, share, seed, most)
    assert torch.equal(keep, again[0]) and torch.equal(held, again[1])
    assert keep.dtype == torch.bool and held.dtype == torch.int64 and held.shape == (len(held), 3)
    out, stay = [tuple(row) for row in held.tolist()], [r for r, k in zip(rows, keep.tolist(), strict=True) if k]
    distinct = list(dict.fromkeys(rows))
    assert not set(out) & set(stay) and set(out) | set(stay) == set(rows)
    assert out == [row for row in distinct if row in set(out)]  # once each, in the graph's order
    ends = {end for row in stay for end in row[:2]}
    assert ends == {end for row in rows for end in row[:2]}
    wanted = min(round(share * len(distinct)), len(distinct) if most is None else most)
    assert len(out) <= wanted and (len(out) < wanted) == bool(caught)
    assert graph.with_triples(keep).num_triples == len(stay)


def test_held_out_facts_are_a_random_choice():
    rows = [(h, t, 0) for h in range(12) for t in range(12) if h != t]
    graph = make_graph(12, 1, rows)
    counts = Counter()
    for seed in range(400):
        counts.update(tuple(row) for row in hold_out(graph, 0.25, seed)[1].tolist())
    assert sum(counts.values()) == 400 * 33 and len(counts) == len(rows)
    expected = 400 * 33 / len(rows)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 185  # 0.999 quantile for 131 degrees: 185; and the draws are without replacement
    assert not torch.equal(hold_out(graph, 0.25, 0)[0], hold_out(graph, 0.25, 1)[0])


def test_facts_of_rare_entities_are_held_out_as_often():
    """Rare entities have few facts besides the first, which stays; taking the last in the order evens that out."""
    rows = [(h, t, 0) for h in range(12) for t in range(12) if h != t]
    rare = [(h, t, 0) for h in range(12, 15) for t in range(12, 15) if h != t]
    graph = make_graph(15, 1, rows + rare)
    found = [int((hold_out(graph, 0.1, seed)[1][:, 0] >= 12).sum()) for seed in range(1000)]
    assert sum(found) == pytest.approx(1000 * 0.1 * len(rare), rel=0.1)


def test_too_few_facts_can_be_spared():
    star = make_graph(5, 1, [(0, t, 0) for t in range(1, 5)])
    with pytest.warns(UserWarning, match="0 of 4 facts are held out instead of 2: .* every entity keeps an edge"):
        keep, held = hold_out(star, 0.5, 0)
    assert bool(keep.all()) and len(held) == 0
    with pytest.raises(ValueError, match="share: expected 0 or more and less than 1, found 1"):
        hold_out(star, 1, 0)
    with pytest.raises(ValueError, match="most: expected 0 or more, found -1"):
        hold_out(star, 0.1, 0, -1)


@pytest.mark.parametrize("name", ["codex_s", "fb15k237_vt"])
def test_real_graphs(name):
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RAGKIT_SHARED")
    graph = KnowledgeGraph.load(folder)
    index, triples = TrueTriples.of(graph), graph_triples(graph)
    head, tail, rel = triples.unbind(1)
    assert bool(index.contains(head, rel, tail).all())
    assert bool(index.contains(tail, rel + graph.num_relations, head).all())
    true = set(map(tuple, triples.tolist()))
    batch = corrupt(triples[:200], index, 64, True, seeded())
    assert all(len(true & set(map(tuple, row))) == 1 for row in batch.tolist())
    keep, held = hold_out(graph, 0.1, 0)
    train = graph_triples(graph.with_triples(keep))
    assert len(held) == round(0.1 * len(true)) and len(train) == int(keep.sum())
    assert set(train[:, :2].flatten().tolist()) == set(triples[:, :2].flatten().tolist())
    assert not set(map(tuple, held.tolist())) & set(map(tuple, train.tolist()))
