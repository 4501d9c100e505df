"""Gradient checkpointing: the same gradients, less memory."""

from __future__ import annotations

import pytest
import torch

from ragkit.gfm import GFMSettings, GNNRetriever, QueryGNN

KINDS = [
    {},
    {"message_func": "transe", "aggregate_func": "max"},
    {"aggregate_func": "mean", "concat_hidden": True},
    {"aggregate_func": "pna", "hidden_dims": [6, 5]},
    {"layer_norm": False, "short_cut": False, "hidden_dims": [6, 6, 4]},
]


def gradients(model, c, autocast=False):
    embeddings, mask = (t.clone().requires_grad_() for t in (c.embeddings, c.mask))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(c.graph, embeddings, mask)
    return logits, *torch.autograd.grad(logits.sin().sum(), [*model.parameters(), embeddings, mask])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_same_logits_and_gradients(case, kinds, autocast):
    c = case(dtype=torch.float32 if autocast else torch.float64, **kinds)
    wanted = gradients(c.model, c, autocast)
    c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(c.model, c, autocast)
    c.model.gradient_checkpointing_disable()
    again = gradients(c.model, c, autocast)
    for a, b, same in zip(found, wanted, again, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-9, atol=2e-2 if autocast else 1e-9)
        assert torch.equal(same, b)


def test_link_prediction_with_hidden_edges(case):
    c = case(dtype=torch.float64)
    model = QueryGNN(c.model.settings).double().train()
    batch = torch.tensor([[[0, 1, 2], [0, 5, 2]], [[3, 4, 0], [7, 4, 0]]])

    def run():
        scores = model(c.graph, batch)
        return scores, *torch.autograd.grad(scores.sin().sum(), list(model.parameters()))

    wanted = run()
    model.gradient_checkpointing_enable()
    for a, b in zip(run(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_only_the_states_between_the_layers_are_held(case):
    c = case(nodes=200, triples=400, hidden_dims=[6] * 6)
    c.model.rows = "dense"

    def held():
        """Bytes of the tensors that autograd keeps, each once."""
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = c.model(c.graph, c.embeddings, [[0], [1, 2], [3]])
        assert logits.requires_grad
        weights = {p.untyped_storage().data_ptr() for p in c.model.parameters()}
        return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)

    before = held()
    c.model.gradient_checkpointing_enable()
    state = 200 * 3 * 6 * 4  # N B D float32
    # Without: [x ; u] and the product in each of the layers. With: the states alone.
    assert before - held() > 5 * 2 * state * 0.9


def test_without_gradient_nothing_changes(case):
    c = case()
    with torch.no_grad():
        wanted = c.model(c.graph, c.embeddings, c.mask)
        c.model.gradient_checkpointing_enable()
        assert torch.equal(c.model(c.graph, c.embeddings, c.mask), wanted)


def test_a_kind_that_there_is_not():
    model = GNNRetriever(GFMSettings(rel_emb_dim=4, input_dim=4, hidden_dims=[4]))
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers=1"):
        model.activation_checkpointing_enable(every_n_layers=2)
