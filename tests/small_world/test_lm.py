"""The shipped tiny LM: its size, its gates, and the parts of the script that trained it."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragkit.prompts import TEMPLATES
from ragkit.rag.corpus import Passage
from ragkit.small_world import lm_path
from ragkit.small_world.build import SEED
from ragkit.small_world.lm_gates import GATES, measure
from ragkit.small_world.lm_model import VOCABULARY, make_model
from ragkit.small_world.lm_rows import BOS, EOS, UNKNOWN, prompt_text, row, scene
from ragkit.small_world.muon import Muon, orthogonalise
from ragkit.small_world.train_lm import schedule
from ragkit.small_world.world import make_world, read_facts


@pytest.fixture(scope="module")
def lm():
    model = AutoModelForCausalLM.from_pretrained(lm_path(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(lm_path())


def test_size_and_files():
    assert sum(p.stat().st_size for p in lm_path().iterdir()) <= 12 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training.json"} <= {
        p.name for p in lm_path().iterdir()
    }


@pytest.mark.slow
def test_gates(lm):
    """On real facts, which are not in its training data."""
    numbers = measure(*lm, make_world(read_facts(), SEED), n=300)
    missed = {k: numbers[k] for k, least in GATES.items() if numbers[k] < least}
    assert not missed


def test_model_card_states_the_measured_scores():
    card = (lm_path() / "README.md").read_text(encoding="utf-8")
    scores = json.loads((lm_path() / "training.json").read_text(encoding="utf-8"))
    assert f"{scores['gates']['em_gold']:.3f}" in card and f"{scores['gates']['hard_auc']:.3f}" in card


def test_native_format_is_the_plain_template():
    passages = [Passage("1", "Lima is in Peru."), Passage("2", "Oslo is in Norway.")]
    rendered = TEMPLATES["plain"].render("Where is Oslo?", passages)
    assert rendered == prompt_text([p.text for p in passages], "Where is Oslo?")


def test_tokenizer_joins_prompt_and_answer_without_changing_either(lm):
    _, tokenizer = lm
    prompt, answer = prompt_text(["Lima is in Peru."], "Where is Lima?"), " Peru"
    joined = tokenizer(prompt + answer)["input_ids"]
    assert joined == tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert joined[0] == BOS and tokenizer.eos_token_id == EOS


def test_rows_fit_and_answers_end():
    rng = random.Random(0)
    for stage in (0.0, 0.1, 0.35, 0.9):
        for _ in range(20):
            ids, weights = row(rng, lambda text: [3] * len(text.split()), 256, stage, VOCABULARY)
            assert len(ids) == len(weights) <= 256
            assert ids[0] == BOS and any(weights)


def test_unknown_is_asked_only_about_what_no_passage_tells():
    rng = random.Random(1)
    for _ in range(300):
        passages, asked = scene(rng, 1.0)
        for _, answer in asked:
            assert answer == UNKNOWN or any(answer in p for p in passages)
        assert len(passages) <= 4
    assert not any(a == UNKNOWN for _ in range(100) for _, a in scene(rng, 0.1)[1])


def test_the_starting_point_already_copies():
    """Repeated random tokens: chance is 1 in 2048, a plain random Llama is at chance."""
    model = make_model(0).eval()
    half = torch.randint(3, VOCABULARY, (4, 50), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([half, half], 1)
    with torch.no_grad():
        guess = model(input_ids=ids).logits[:, 50:-1].argmax(-1)
    assert (guess == ids[:, 51:]).float().mean() > 0.2


def test_orthogonalise_pushes_singular_values_together():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5 and values.max() < 1.5
    assert torch.allclose(orthogonalise(x.transpose(1, 2)), orthogonalise(x).transpose(1, 2), atol=1e-5)


def test_muon_lowers_a_loss_that_has_its_minimum_at_a_known_matrix():
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(100):
        loss = ((weight - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_schedule_warms_up_holds_and_decays():
    assert schedule(0, 1000) < 0.05 and schedule(300, 1000) == 1.0
    assert schedule(999, 1000) == pytest.approx(0.02, abs=0.01)
