"""Ensemble decoding against a plain loop in float64 without cache or padding."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from ragkit.evaluation import evaluate
from ragkit.rag.corpus import RetrievedPassage
from ragkit.rag.ensemble import EnsembleProcessor, ensemble_batches, ensemble_logprob, passage_weights
from ragkit.rag.generator import Generator
from ragkit.rag.scoring import ScoringError
from ragkit.rag.system import RAGSystem
from ragkit.tuning.qa_data import load_qa

SOURCES = [
    "Lima is the capital of Peru.",
    "Paris is the capital of France, a country.",
    "The Nile flows through Egypt.",
]
QUESTIONS = ["What is the capital of Peru?", "Capital?", "Which river flows through Egypt and Sudan?"]


def plain(model, prompts, weights, limit, ends):
    """Token by token: Σ_d w_d p(y | prompt_d, so far), every prompt on its own and as a whole."""
    answer = []
    while len(answer) < limit:
        mixed = 0
        for prompt, weight in zip(prompts, weights, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, -1]
            mixed = mixed + weight * logits.softmax(-1)
        token = int(mixed.argmax())
        if token in ends:
            break
        answer.append(token)
    return answer


@pytest.fixture
def generator(tiny_lm, tokenizer):
    return Generator(tiny_lm, tokenizer, max_new_tokens=10)


@torch.no_grad()
def test_equals_a_plain_loop_in_float64(generator, tiny_lm):
    exact = copy.deepcopy(tiny_lm).double()
    prompts, weights = [], []
    for number, question in enumerate(QUESTIONS):
        own = SOURCES[: number + 1]
        prompts.append([generator.encode_prompt("plain", question, [source]) for source in own])
        weights.append(torch.rand(len(own), generator=torch.Generator().manual_seed(number)).softmax(0).tolist())
    wanted = [
        generator.tokenizer.decode(plain(exact, p, w, 10, {generator.eos_id}), skip_special_tokens=True).strip()
        for p, w in zip(prompts, weights, strict=True)
    ]
    assert generator.generate_ensemble(prompts, weights) == wanted
    assert len(set(wanted)) == len(wanted) and all(wanted)
    for size in (1, 4):  # one question at a time, two
        generator.batch_size = size
        assert generator.generate_ensemble(prompts, weights) == wanted
    assert generator.generate_ensemble([], []) == []
    single = [p[:1] for p in prompts]
    assert generator.generate_ensemble(single, [[1.0]] * 3) == generator.generate_ids([p[0] for p in single])


def test_an_end_token_ends_the_answer(generator, tiny_lm):
    ids = generator.encode_prompt("plain", QUESTIONS[0], SOURCES[:1])
    with torch.no_grad():
        first = int(tiny_lm(torch.tensor([ids])).logits[0, -1].argmax())
    tiny_lm.generation_config.eos_token_id = [generator.eos_id, first]
    other = generator.encode_prompt("plain", QUESTIONS[1], SOURCES[1:])
    answers = generator.generate_ensemble([[ids], [other, other]], [[1.0], [0.5, 0.5]])
    assert answers == generator.generate_ids([ids, other])
    assert answers[0] == generator.tokenizer.decode([first]).strip()  # nothing after it


def test_weights_decide():
    scores = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 9.0]])
    mix = EnsembleProcessor([[0.9, 0.1], [1.0]], torch.device("cpu"))(torch.zeros(3, 1), scores)
    assert mix.argmax(-1).tolist() == [0, 0, 2]
    torch.testing.assert_close(mix.exp().sum(-1), torch.ones(3))
    by_hand = (0.9 * scores[0].softmax(0) + 0.1 * scores[1].softmax(0)).log()
    torch.testing.assert_close(mix[0], by_hand)
    assert torch.equal(mix[0], mix[1])
    sure = EnsembleProcessor([[0.0, 1.0], [1.0]], torch.device("cpu"))(torch.zeros(3, 1), scores)
    assert sure.argmax(-1).tolist() == [1, 1, 2] and torch.isfinite(sure).all()


def test_weights_come_from_the_retriever():
    found = [RetrievedPassage("a", "", "x", {}, 0.6), RetrievedPassage("b", "", "y", {}, 0.5)]
    assert passage_weights(found, 0.1) == pytest.approx(torch.tensor([1.0, 0.0]).softmax(0).tolist())
    assert passage_weights(["x", "y"], 0.1) == [0.5, 0.5]


def test_batches_hold_whole_questions():
    prompts = [[[1]], [[1] * 3] * 3, [[1] * 2] * 2, [[1] * 9] * 6]
    weights = [[1 / len(p)] * len(p) for p in prompts]
    assert ensemble_batches(prompts, weights, 4) == [[3], [1], [2, 0]]
    with pytest.raises(ValueError, match="question number 1 has 0 prompts and 0 weights"):
        ensemble_batches([[[1]], []], [[1.0], []], 4)
    with pytest.raises(ValueError, match="question number 0 has 1 prompts and 2 weights"):
        ensemble_batches([[[1]]], [[0.5, 0.5]], 4)


def test_a_system_answers_from_an_ensemble_also_after_loading(generator, minilm, tmp_path):
    system = RAGSystem.from_documents(
        SOURCES, retriever=None, generator=generator, prompt="plain", answer_from="ensemble", top_k=2, device="cpu"
    )
    found = system.retrieve(QUESTIONS[0])
    prompts = [generator.encode_prompt("plain", QUESTIONS[0], [p], reserve=10) for p in found]
    (wanted,) = generator.generate_ensemble([prompts], [passage_weights(found, 0.05)])
    assert system.query(QUESTIONS[0]).text == wanted
    assert (
        system.generate(QUESTIONS[0], [])
        == generator.generate_ids([generator.encode_prompt("plain", QUESTIONS[0], [], reserve=10)])[0]
    )
    loaded = RAGSystem.load(system.save(tmp_path / "system"), device="cpu")
    assert loaded.query(QUESTIONS[0]).text == wanted
    system.config.answer_from = "joined"
    assert system.query(QUESTIONS[0]).text != wanted


@torch.no_grad()
def test_logprob_of_an_answer_equals_the_formula_in_float64(generator, tiny_lm):
    exact = copy.deepcopy(tiny_lm).double()
    prompts = [[generator.encode_prompt("plain", q, [s]) for s in SOURCES[: n + 1]] for n, q in enumerate(QUESTIONS)]
    weights = [[1.0], [0.3, 0.7], [0.2, 0.0, 0.8]]
    responses = [generator.encode_response(answer) for answer in ("Lima", "Paris in France", "the Nile")]
    wanted = []
    for own, shares, response in zip(prompts, weights, responses, strict=True):
        total = 0.0
        for t, token in enumerate(response):
            share = [exact(torch.tensor([p + response[:t]])).logits[0, -1].softmax(-1)[token] for p in own]
            total += sum(w * p for w, p in zip(shares, share, strict=True)).log()
        wanted.append(total)
    for size in (1, 4, 16):
        generator.batch_size = size
        found = ensemble_logprob(generator, prompts, weights, responses)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-4)
    single = generator.sequence_logprob([p[0] for p in prompts], responses)
    found = ensemble_logprob(generator, [p[:1] for p in prompts], [[1.0]] * 3, responses)
    torch.testing.assert_close(found, single, rtol=0, atol=1e-5)
    assert ensemble_logprob(generator, prompts, weights, [[], responses[1], []]).tolist()[::2] == [0.0, 0.0]
    assert ensemble_logprob(generator, [], [], []).shape == (0,)
    with pytest.raises(ScoringError, match="question number 1, prompt number 1: prompt and response: token 99999"):
        ensemble_logprob(generator, [*prompts[:1], [prompts[1][0], [99999]]], weights[:2], responses[:2])


def test_an_evaluation_reads_the_ensemble(generator, minilm):
    system = RAGSystem.from_documents(
        SOURCES, generator=generator, prompt="plain", answer_from="ensemble", top_k=2, device="cpu"
    )
    texts = [answer.text for answer in system.batch_query(QUESTIONS)]
    rows = [{"id": str(n), "question": q, "answer": texts[n]} for n, q in enumerate(QUESTIONS)]
    assert evaluate(system, load_qa(rows)).metrics["em"].mean == 1.0
    system.config.answer_from = "joined"
    assert evaluate(system, load_qa(rows)).metrics["em"].mean < 1.0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [2.0, -1.0], [float("nan"), 1.0], [1.0, float("nan")], [1.0, 1.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    """They would make a distribution of NaN, and an empty answer of it."""
    with pytest.raises(ValueError, match="question number 1 has the weights"):
        ensemble_batches([[[5]], [[5], [6]]], [[1.0], weights], 8)
    ensemble_batches([[[5]], [[5], [6]]], [[1.0], [1.0, 0.0]], 8)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_scores_without_a_softmax_are_refused(score):
    passages = [SimpleNamespace(score=score), SimpleNamespace(score=score)]
    with pytest.raises(ValueError, match="finite ones are needed"):
        passage_weights(passages, 0.05)
