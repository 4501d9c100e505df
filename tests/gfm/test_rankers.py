"""Document rankers and losses by hand-worked numbers, against dense products, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.gfm import RANKERS, Incidence, bce_loss, entity_weights, link_prediction_loss, listce_loss
from ragkit.gfm.rankers import best, rank

# Entities 0 ... 3, documents {0, 1}, {1, 2}, {} and {1}; entity 3 is in no document.
DENSE = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
LOGITS = torch.tensor([[2.0, 3.0, -1.0, 9.0], [0.5, 0.5, 0.5, 0.5]])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    third = 1 / 3  # entity 1 is in three documents
    wanted = {
        "simple": ([5.0, 2.0, 0.0, 3.0], {}),
        "idf": ([3.0, 0.0, 0.0, 1.0], {}),
        "topk": ([1.0, 1.0, 0.0, 1.0], {"k": 2}),  # entities 3 and 1
        "idf_topk": ([third, third, 0.0, third], {"k": 2}),
        "score_weighted_idf": (
            [sigmoid(2) + sigmoid(3) / 3, sigmoid(3) / 3 + sigmoid(-1), 0.0, sigmoid(3) / 3],
            {},
        ),
    }
    assert set(wanted) == set(RANKERS)
    for documents in (DENSE, DENSE.to_sparse(), Incidence.of(DENSE)):
        for name, (scores, more) in wanted.items():
            assert RANKERS[name](LOGITS, documents, **more)[0].tolist() == pytest.approx(scores), name
        top = RANKERS["score_weighted_idf"](LOGITS, documents, k=2)[0]
        assert top.tolist() == pytest.approx([sigmoid(3) / 3, sigmoid(3) / 3, 0, sigmoid(3) / 3])
        assert entity_weights(documents).tolist() == pytest.approx([1, third, 1, 0])


def test_equal_logits_take_the_lower_ids():
    assert best(LOGITS, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert RANKERS["topk"](LOGITS, DENSE, k=1)[1].tolist() == [1, 0, 0, 0]
    assert best(LOGITS, 9).all()
    scores, ids = rank(torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]), 4)
    assert ids.tolist() == [[1, 2, 4, 0]] and scores.tolist() == [[3, 3, 3, 1]]


@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 6))
def test_best_is_a_stable_sort_cut_off(rows, k):
    scores = torch.tensor(rows, dtype=torch.float32)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(best(scores, k), torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True))
    assert torch.equal(rank(scores, k)[1], order)


def test_a_knowledge_graph_and_its_matrix_rank_alike(world):
    dense = torch.zeros(world.num_entities, world.num_documents)
    for document in range(world.num_documents):
        dense[torch.from_numpy(world.entities_of(document)).long(), document] = 1
    logits = torch.randn(3, world.num_entities)
    for name, ranker in RANKERS.items():
        assert torch.allclose(ranker(logits, world), ranker(logits, dense)), name
    assert torch.allclose(RANKERS["simple"](logits, world), logits @ dense, atol=1e-6)
    assert entity_weights(world).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1])


def test_scores_have_gradients_and_the_same_bits_in_blocks(monkeypatch):
    from ragkit.gfm import rankers

    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: RANKERS["simple"](z, DENSE), logits)
    assert torch.autograd.gradcheck(lambda z: RANKERS["score_weighted_idf"](z, DENSE), logits)
    whole = RANKERS["idf"](logits, DENSE)
    monkeypatch.setattr(rankers, "CHUNK_NUMBERS", 7)
    assert torch.equal(RANKERS["idf"](logits, DENSE), whole)


def test_ranker_edges():
    assert RANKERS["idf_topk"](torch.zeros(0, 4), DENSE).shape == (0, 4)
    assert RANKERS["simple"](torch.ones(2, 4), torch.zeros(4, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert RANKERS["simple"](torch.ones(2, 4), torch.zeros(4, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match="expected \\[B, 4\\], found \\[2, 5\\]"):
        RANKERS["simple"](torch.ones(2, 5), DENSE)
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        RANKERS["topk"](torch.tensor([[0.0] * 4, [0, 1, math.nan, 0]]), DENSE)
    with pytest.raises(ValueError, match="k: expected a whole number from 1"):
        RANKERS["topk"](LOGITS, DENSE, k=0)
    with pytest.raises(ValueError, match="expected a KnowledgeGraph"):
        RANKERS["simple"](LOGITS, [[0]])


# ---- losses ----


def test_bce_by_hand():
    z = torch.tensor([[1.0, -2.0, 0.5]])
    positive, negatives = math.log(1 + math.exp(-1)), [math.log(1 + math.exp(x)) for x in (-2, 0.5)]
    hard = [math.exp(x / 0.2) for x in (-2, 0.5)]
    wanted = (positive + sum(h * n for h, n in zip(hard, negatives, strict=True)) / sum(hard)) / 2
    assert float(bce_loss(z, [[0]])) == pytest.approx(wanted, rel=1e-6)
    assert float(bce_loss(z, [[0]], temperature=0)) == pytest.approx((positive + sum(negatives) / 2) / 2, rel=1e-6)
    assert float(link_prediction_loss(z, 0.2)) == pytest.approx(wanted, rel=1e-6)


def test_listce_by_hand():
    p = [sigmoid(1), sigmoid(-2), sigmoid(0.5)]
    wanted = -sum(math.log(p[i] / (sum(p) + 1e-5) + 1e-5) for i in (0, 2)) / 2
    z = torch.tensor([[1.0, -2.0, 0.5], [9.0, 9.0, 9.0]])
    assert float(listce_loss(z, [[0, 2], []])) == pytest.approx(wanted, rel=1e-6)  # the empty row has no part


def test_targets_without_a_positive_or_without_a_negative_are_finite():
    for target in ([[], []], [[0, 1, 2], []], [[0, 1, 2], [0, 1, 2]]):
        z = torch.randn(2, 3, requires_grad=True)
        for loss in (bce_loss(z, target), bce_loss(z, target, temperature=0), listce_loss(z, target)):
            (grad,) = torch.autograd.grad(loss, z)
            assert torch.isfinite(loss) and torch.isfinite(grad).all()
    z = torch.randn(2, 3, requires_grad=True)
    loss = listce_loss(z, [[], []])
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, z)[0].any()


def test_negative_weights_have_no_gradient():
    z = torch.tensor([[0.3, 0.2, -0.4]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(bce_loss(z, [[0]]), z)
    weight = torch.softmax(z.detach()[0, 1:] / 0.2, 0)
    assert torch.allclose(grad[0, 1:], weight * torch.sigmoid(z.detach()[0, 1:]) / 2)


def test_large_logits_and_bfloat16_stay_finite():
    z = torch.tensor([[500.0, -500.0, 500.0]], dtype=torch.bfloat16)
    assert torch.isfinite(bce_loss(z, [[1]])) and torch.isfinite(listce_loss(z, [[1]]))


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match="target, row 0: id 3 is not in 0 ... 2"):
        bce_loss(torch.zeros(1, 3), [[3]])
    with pytest.raises(ValueError, match="target: 2 lists for 1 questions"):
        listce_loss(torch.zeros(1, 3), [[0], [1]])
    with pytest.raises(ValueError, match="temperature"):
        bce_loss(torch.zeros(1, 3), [[0]], temperature=-1)
