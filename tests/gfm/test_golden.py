"""Parity with what GFM-RAG v1.0.0 itself computed (../shared/golden)."""

from __future__ import annotations

import pytest
import torch

from ragkit.gfm import RANKERS, bce_loss, entity_weights, listce_loss, retrieval_loss

SMOOTH = ["distmult_sum", "default_depth", "transe_mean"]
TIED = ["distmult_max", "distmult_pna"]
ALL = SMOOTH + TIED


def error(found, wanted):
    """Largest difference, relative to the largest number."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize("name", ALL)
def test_logits(golden, name):
    case = golden(name)
    for mode in (True, False):
        assert error(case.model.train(mode)(case.graph, *case.inputs), case.t["entity_logits"]) < 1e-5
    with torch.no_grad():
        assert error(case.model(case.graph, *case.inputs), case.t["entity_logits"]) < 1e-5


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_all_parameters(golden, name):
    case = golden(name)
    retrieval_loss(case.model(case.graph, *case.inputs), case.t["target_entities"]).backward()
    for parameter, tensor in case.model.named_parameters():
        assert error(tensor.grad, case.t[f"grad.{parameter}"]) < 1e-4, parameter


@pytest.mark.parametrize("name", TIED)
def test_gradients_differ_from_v1_only_by_how_equal_maxima_share(golden, plain, name):
    """The golden inputs have many equal messages (zeros). There v1 gives each of them the whole gradient, which no
    derivative does; ours goes to one. The plain model with v1's rule has the golden gradients, and where nothing is
    equal ours has the plain model's (test_model.py): so that rule is all that differs."""
    case = golden(name)
    retrieval_loss(plain(case.model, case.graph, *case.inputs), case.t["target_entities"]).backward()
    for parameter, tensor in case.model.named_parameters():
        assert error(tensor.grad, case.t[f"grad.{parameter}"]) < 1e-4, parameter


@pytest.mark.parametrize("name", ALL)
def test_losses(golden, name):
    t = golden(name).t
    logits, target = t["entity_logits"], t["target_entities"]
    lists = [row.nonzero().squeeze(1) for row in target]
    for wanted in (target, lists):
        assert abs(bce_loss(logits, wanted) - t["loss.bce"]) < 1e-5
        assert abs(listce_loss(logits, wanted) - t["loss.listce"]) < 1e-5
        assert abs(retrieval_loss(logits, wanted) - t["loss.total"]) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_rankers_and_weights(golden, name):
    t = golden(name).t
    for documents in (t["ent2doc"], t["ent2doc"].to_sparse()):
        for key, ranker, more in (
            ("simple", "simple", {}),
            ("idf", "idf", {}),
            ("top5", "topk", {"k": 5}),
            ("idf_top5", "idf_topk", {"k": 5}),
        ):
            found = RANKERS[ranker](t["entity_logits"], documents, **more)
            assert error(found, t[f"docs.{key}"]) < 1e-6, ranker
        assert torch.equal(entity_weights(documents), t["entities_weight"])


@pytest.mark.parametrize("name", ALL)
def test_pretraining_scores(golden, name):
    case = golden(name)
    batch, wanted = case.t["pretrain.batch_htr"], case.t["pretrain.score"]
    model = case.pretrained.train()
    assert error(model(case.graph, batch), wanted) < 1e-5
    assert error(model.eval()(case.graph, batch, remove_easy_edges=True), wanted) < 1e-5
    assert error(model(case.graph, batch), wanted) > 1e-2  # by default eval mode hides nothing


@pytest.mark.parametrize("name", ALL)
def test_the_direction_is_pinned(golden, name):
    case = golden(name)
    assert error(case.model(case.graph.flipped(), *case.inputs), case.t["entity_logits"]) > 1e-2
