"""Losses on documents against plain PyTorch in float64, and rows that have nothing to find."""

from __future__ import annotations

import pytest
import torch

from ragkit.config import GFMFinetuneConfig
from ragkit.gfm import Incidence
from ragkit.gfm.document_losses import document_scores, share_loss
from ragkit.gfm.finetune import QuestionLoss
from ragkit.gfm.losses import bce_loss, listce_loss
from ragkit.gfm_config import LossConfig

DOCUMENTS = [[0, 1, 2], [2, 3], [], [5, 0], [2]]  # 4 is in none, 2 in three
N = 6
TARGETS = [[0, 3], [], [1], [4, 2]]


def incidence():
    dense = torch.zeros(N, len(DOCUMENTS))
    for document, entities in enumerate(DOCUMENTS):
        dense[entities, document] = 1
    return Incidence.of(dense), dense.double()


def logits(rows=4, **options):
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64, **options)


def lists(targets=TARGETS):
    return [torch.tensor(ids, dtype=torch.long) for ids in targets]


@pytest.mark.parametrize("kind", ["simple", "score_weighted_idf"])
def test_scores_are_sums_over_the_documents_entities(kind):
    sparse, dense = incidence()
    z = logits()
    frequency = dense.sum(1)
    weights = z if kind == "simple" else z.sigmoid() / frequency.clamp(min=1)
    torch.testing.assert_close(document_scores(z, sparse, kind), weights @ dense)
    z = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: document_scores(z, sparse, kind), (z,))
    with pytest.raises(ValueError, match="kind: found 'idf', expected score_weighted_idf or simple"):
        document_scores(z, sparse, "idf")


def test_share_loss_by_hand():
    scores = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    one, two = -torch.log(torch.tensor([0.75, 0.25], dtype=torch.float64)).mean(), torch.tensor(0.5).log()
    found = share_loss(scores, lists([[0, 1], [2]]))
    assert found.item() == pytest.approx((one - two).item() / 2, abs=1e-4)  # the formula's 1e-5 aside


def plain_share(scores, targets):
    rows = []
    for row, ids in zip(scores, targets, strict=True):
        if ids:
            share = row / (row.sum() + 1e-5)
            rows.append(torch.stack([-(share[i] + 1e-5).log() for i in ids]).mean())
    return torch.stack(rows).mean() if rows else scores.sum() * 0


@pytest.mark.parametrize("targets", [TARGETS, [[0], [1], [2], [4]], [[], [], [3], []]])
def test_share_loss_equals_the_formula_with_its_gradient(targets):
    sparse, _ = incidence()
    found, wanted = logits().requires_grad_(), logits().requires_grad_()
    a = share_loss(document_scores(found, sparse, "score_weighted_idf"), lists(targets))
    b = plain_share(document_scores(wanted, sparse, "score_weighted_idf"), targets)
    torch.testing.assert_close(a, b)
    a.backward(), b.backward()
    torch.testing.assert_close(found.grad, wanted.grad)
    z = logits().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: share_loss(document_scores(z, sparse, "score_weighted_idf"), lists(targets)), (z,)
    )


def test_share_loss_is_listce_where_each_document_is_one_entity():
    alone = Incidence.of(torch.eye(N))
    z = logits()
    found = share_loss(document_scores(z, alone, "score_weighted_idf"), lists())
    torch.testing.assert_close(found, listce_loss(z, lists()))


@pytest.mark.parametrize("name", ["share", "listce", "bce"])
@pytest.mark.parametrize("rows", [0, 4])
def test_a_batch_without_any_target_is_finite(name, rows):
    z = logits(rows).requires_grad_()
    sparse, _ = incidence()
    nothing = lists([[]] * rows)
    loss = {
        "share": lambda: share_loss(document_scores(z, sparse, "score_weighted_idf"), nothing),
        "listce": lambda: listce_loss(z, nothing),
        "bce": lambda: bce_loss(z, nothing),
    }[name]()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    if name != "bce" or not rows:  # bce still pushes the negatives down, as in v1
        assert loss == 0 and not z.grad.any()


def test_extreme_scores_stay_finite():
    sparse, _ = incidence()
    for size in (-1e4, 1e4):
        z = torch.full((2, N), size).requires_grad_()
        loss = share_loss(document_scores(z, sparse, "score_weighted_idf"), lists([[0], [2]]))  # document 2 is empty
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ({"name": "listce"}, lambda z, d, e, t: listce_loss(z, e)),
        ({"name": "bce", "adversarial_temperature": 0.5}, lambda z, d, e, t: bce_loss(z, e, 0.5)),
        ({"name": "bce", "is_doc_loss": True}, lambda z, d, e, t: bce_loss(z @ d, t)),
        ({"name": "listce", "is_doc_loss": True, "doc_score": "simple"}, lambda z, d, e, t: listce_loss(z @ d, t)),
        (
            {"name": "listce", "is_doc_loss": True},
            lambda z, d, e, t: plain_share(z.sigmoid() / d.sum(1).clamp(min=1) @ d, [ids.tolist() for ids in t]),
        ),
    ],
)
def test_each_term_on_its_scores_and_targets(term, expected, world):
    """On a graph: entities or documents, weighted, and added to the other terms."""
    from ragkit.gfm.datasets import GraphQuestions

    dense = torch.zeros(world.num_entities, world.num_documents, dtype=torch.float64)
    for document in range(world.num_documents):
        dense[world.entities_of(document), document] = 1
    entities, documents = lists([[0, 2], [1]]), lists([[1], [0, 2]])
    z = torch.randn(2, world.num_entities, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = {"w": GraphQuestions("w", world, None)}
    terms = [LossConfig(**term, weight=0.4), LossConfig(name="bce", weight=2.0), LossConfig(weight=0)]
    module = QuestionLoss(torch.nn.Linear(1, 1), data, terms, init_entities_weight=False)
    wanted = 0.4 * expected(z, dense, entities, documents) + 2 * bce_loss(z, entities)
    torch.testing.assert_close(module.loss(z, "w", entities, documents), wanted, rtol=1e-6, atol=1e-6)


def test_a_binary_loss_takes_no_sums_of_shares():
    with pytest.raises(ValueError, match="a bce loss on documents takes logits, doc_score: simple"):
        LossConfig(name="bce", is_doc_loss=True, doc_score="score_weighted_idf")
    assert [(term.name, term.weight) for term in GFMFinetuneConfig().task.losses] == [("bce", 0.3), ("listce", 0.7)]
