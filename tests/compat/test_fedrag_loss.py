"""FedRAG's loss and collators: its numbers on request, and batches that train what they should."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ragkit.compat.fedrag import DataCollatorForLSR, DataCollatorForRALT, LSRLoss, ReductionMode
from ragkit.compat.fedrag_loss import left_padded, padding_id
from ragkit.prompts import PromptError
from ragkit.rag.generator import TokenizerError
from ragkit.tuning.qa_data import DataError

RETRIEVAL = [[1.0, 2.0, 0.5], [0.3, 0.1, 0.2]]
LM = [[0.2, 0.1, 0.7], [0.5, 0.9, 0.1]]


def softmax(row, temperature):
    exps = [math.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def by_hand(reverse, gamma=1.0, beta=1.0):
    """The divergence of each row in plain Python."""
    losses = []
    for retrieval, lm in zip(RETRIEVAL, LM, strict=True):
        p, q = softmax(retrieval, gamma), softmax(lm, beta)
        first, second = (q, p) if reverse else (p, q)
        losses.append(sum(a * math.log(a / b) for a, b in zip(first, second, strict=True)))
    return losses


@pytest.mark.parametrize("direction", ["reverse", "paper", "KL(P_R||Q_LM)", "KL(Q_LM||P_R)"])
@pytest.mark.parametrize(("gamma", "beta"), [(1.0, 1.0), (0.1, 0.5)])
def test_loss_is_the_divergence_worked_by_hand(direction, gamma, beta):
    scores = torch.tensor(RETRIEVAL, dtype=torch.float64, requires_grad=True)
    lm = torch.tensor(LM, dtype=torch.float64)
    expected = by_hand(direction in ("reverse", "KL(Q_LM||P_R)"), gamma, beta)
    mean = LSRLoss(direction=direction, gamma=gamma, beta=beta)(scores, lm)
    total = LSRLoss(reduction="sum", direction=direction, gamma=gamma, beta=beta)(scores, lm)
    assert mean.item() == pytest.approx(sum(expected) / 2, rel=1e-9)
    assert total.item() == pytest.approx(sum(expected), rel=1e-9)
    mean.backward()
    assert scores.grad.abs().max() > 0


def test_by_default_it_gives_fedrags_numbers():
    """log_softmax and softmax without temperatures into PyTorch's kl_div."""
    scores, lm = torch.tensor(RETRIEVAL), torch.tensor(LM)
    theirs = torch.nn.functional.kl_div(scores.log_softmax(1), lm.softmax(1), reduction="batchmean")
    torch.testing.assert_close(LSRLoss()(scores, lm), theirs)
    torch.testing.assert_close(LSRLoss(ReductionMode.SUM)(scores, lm), theirs * 2)


def test_bad_values_of_the_loss_are_named():
    with pytest.raises(ValueError, match="reduction: found 'meen', expected one of mean, sum; did you mean 'mean'"):
        LSRLoss(reduction="meen")
    with pytest.raises(ValueError, match="direction: found 'revers'.*did you mean 'reverse'"):
        LSRLoss(direction="revers")


@pytest.fixture
def features(rows):
    return [{"query": query, "response": answer} for query, answer in zip(*rows.values(), strict=True)]


def test_lsr_collator_scores_with_gradient(make_fedrag, features):
    rag = make_fedrag(top_k=3)
    batch = DataCollatorForLSR(rag_system=rag)(features)
    assert set(batch) == {"retrieval_scores", "lm_scores"}
    assert all(tensor.shape == (3, 3) for tensor in batch.values())  # [B, k]
    stored = [[node.score for node in rag.retrieve(row["query"])] for row in features]
    torch.testing.assert_close(batch["retrieval_scores"].detach().cpu(), torch.tensor(stored), atol=1e-5, rtol=0)
    assert not batch["lm_scores"].requires_grad and (batch["lm_scores"] < 0).all()
    # As the model itself scores a response: its mean loss over the response's tokens.
    generator, template = rag.generator.core, "plain"
    node = rag.core.retrieve(features[0]["query"])[1]
    prompt = generator.encode_prompt(template, features[0]["query"], [node])
    answer = generator.encode_response("Lima", template=template)
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        loss = generator.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
    assert batch["lm_scores"][0, 1].item() == pytest.approx(-loss.item(), rel=1e-4)
    # The gradient reaches the encoder; in FedRAG it ends at a fresh leaf.
    LSRLoss()(batch["retrieval_scores"], batch["lm_scores"]).backward()
    grads = [parameter.grad for parameter in rag.retriever.encoder.parameters() if parameter.grad is not None]
    assert grads and max(grad.abs().max() for grad in grads) > 0


def test_lsr_collator_templates_and_bad_rows(make_fedrag, features):
    rag = make_fedrag()
    given = DataCollatorForLSR(rag, prompt_template="{context}\n{query}\n", target_template="Reply: {response}")
    assert given.template.text == "{passages}\n{question}\nReply: "
    plain = DataCollatorForLSR(rag)(features)["lm_scores"]
    assert not torch.allclose(given(features)["lm_scores"], plain)
    with pytest.raises(PromptError, match="only the response is scored; leave out what follows it"):
        DataCollatorForLSR(rag, target_template="<response>{response}</response>")
    with pytest.raises(PromptError, match=r"must hold \{response\} exactly once, found 0"):
        DataCollatorForLSR(rag, target_template="nothing")
    for collator in (DataCollatorForLSR(rag), DataCollatorForRALT(rag)):
        with pytest.raises(ValueError, match="return_tensors: found 'np', expected \"pt\""):
            collator(features, return_tensors="np")
        with pytest.raises(DataError, match="row 1: 'response' is None"):
            collator([features[0], {"query": "x"}])
    with pytest.raises(ValueError, match="return_tensors"):
        DataCollatorForRALT(rag, default_return_tensors="tf")
    for kind in (DataCollatorForLSR, DataCollatorForRALT):
        with pytest.raises(TypeError, match="rag_system: expected a RAGSystem, found str"):
            kind("rag")
        with pytest.raises(TypeError, match="unknown argument 'template'"):
            kind(rag, template="x")
    rag.knowledge_store.clear()
    with pytest.raises(DataError, match="the knowledge store is empty"):
        DataCollatorForLSR(rag)(features)


def test_ralt_collator_labels_the_response_alone(make_fedrag, features):
    rag = make_fedrag(top_k=2)
    batch = DataCollatorForRALT(rag_system=rag)(features)
    tokenizer = rag.generator.tokenizer
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {tensor.shape for tensor in batch.values()} == {batch["input_ids"].shape} and len(batch["labels"]) == 6
    for number in range(6):
        row = {name: tensor[number] for name, tensor in batch.items()}
        padded = int((row["attention_mask"] == 0).sum())
        assert (row["attention_mask"][padded:] == 1).all()  # on the left
        assert (row["input_ids"][:padded] == tokenizer.pad_token_id).all() and (row["labels"][:padded] == -100).all()
        labelled = row["labels"][row["labels"] != -100]
        assert tokenizer.decode(labelled) == f" {features[number // 2]['response']}</s>"
        assert (row["labels"][-len(labelled) :] == row["input_ids"][-len(labelled) :]).all()
    texts = [tokenizer.decode(ids) for ids in batch["input_ids"]]
    assert "Lima is the capital of Peru." in texts[0] and "Lima is the capital" not in texts[1]
    assert (batch["attention_mask"] == 0).any()  # or nothing was padded here


def test_ralt_collator_learns_what_follows_the_response(make_fedrag, features):
    rag = make_fedrag(top_k=1)
    template = "<q>{query}</q>\n<c>{context}</c>\n<response>\n{response}\n</response>\n"
    batch = DataCollatorForRALT(rag, example_template=template)(features[:1])
    tokenizer = rag.generator.tokenizer
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "Lima\n</response></s>"
    with pytest.raises(PromptError, match="response} comes last"):
        DataCollatorForRALT(rag, example_template="{query}\n{response}\n{context}")


def test_padding_falls_back_to_eos(tokenizer):
    batch = left_padded([[5], [6, 7, 8]], [[9, 2], [2]], pad_id=2)
    assert batch["input_ids"].tolist() == [[2, 5, 9, 2], [6, 7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]  # an end token that is not padding counts
    assert batch["labels"].tolist() == [[-100, -100, 9, 2], [-100, -100, -100, 2]]
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    assert padding_id(without) == tokenizer.eos_token_id
    without.eos_token = None
    with pytest.raises(TokenizerError, match="neither a pad nor an EOS token"):
        padding_id(without)

    class Negative:
        pad_token_id, eos_token_id = -1, 2

    with pytest.raises(TokenizerError, match="has the id -1"):
        padding_id(Negative())
