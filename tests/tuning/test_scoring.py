"""LM scores of passages: what they are, that none is made twice, and what happens when the process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ragkit.config import LSRConfig
from ragkit.rag.corpus import Passage
from ragkit.rag.generator import Generator
from ragkit.rag.lm_digest import lm_digest
from ragkit.rag.scoring import ScoringError
from ragkit.tuning.qa_data import DataError, load_qa
from ragkit.tuning.scoring import cache_folder, score_passages

QUESTION_FIRST = (
    "Read the question, then the source below it, and give the shortest answer.\nQuestion: {question}\nSource: "
    "{passages}\nAnswer:"
)


@pytest.fixture
def generator(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return Generator(LlamaForCausalLM(config).eval(), tokenizer, device="cpu")


@pytest.fixture
def pairs(questions, corpus):
    """Six questions with 4, 1, 4, ... passages."""
    passages = [Passage(id=row["id"], text=row["text"]) for row in corpus]
    return [(example, passages[n : n + (1 if n == 1 else 4)]) for n, example in enumerate(load_qa(questions)[:6])]


@pytest.fixture
def config(tmp_path):
    return lambda **over: LSRConfig(**{"output_dir": str(tmp_path / "runs"), "score_batch_size": 4, **over})


@pytest.fixture
def forwards(generator):
    """Counts the forward calls of the layers."""
    calls = []
    generator.core.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def minus_loss(generator, example, passage, config):
    """-(the model's own loss x tokens), the definition."""
    prompt = generator.encode_prompt(config.prompt, example.question, [passage])
    response = generator.encode_response(example.answer, eos=config.include_eos, template=config.prompt)
    ids = torch.tensor([prompt + response])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return -generator.model(input_ids=ids, labels=labels).loss.item() * len(response), len(response)


@pytest.mark.parametrize("prompt", ["plain", "sources", QUESTION_FIRST])
@pytest.mark.parametrize("eos", [True, False])
def test_scores_are_minus_the_models_loss_times_tokens(generator, pairs, config, prompt, eos):
    settings = config(prompt=prompt, include_eos=eos, score="logprob")
    sums = score_passages(generator, pairs, settings)
    means = score_passages(generator, pairs, settings.model_copy(update={"score": "mean_logprob"}))
    for (example, found), values, per_token in zip(pairs, sums, means, strict=True):
        assert len(values) == len(found)
        for passage, value, mean in zip(found, values, per_token, strict=True):
            wanted, tokens = minus_loss(generator, example, passage, settings)
            assert value == pytest.approx(wanted, abs=1e-4) and mean == pytest.approx(value / tokens)


@pytest.mark.parametrize("over", [{"score_batch_size": 1}, {"score_batch_size": 64}, {"score_memory": 1}])
def test_scores_do_not_depend_on_the_micro_batch(generator, pairs, config, over):
    wanted = score_passages(generator, pairs, config(score_cache=None, prompt=QUESTION_FIRST, score_batch_size=3))
    found = score_passages(generator, pairs, config(score_cache=None, prompt=QUESTION_FIRST, **over))
    for left, right in zip(found, wanted, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_a_second_pass_calls_the_model_not_once(generator, pairs, config, forwards, capsys):
    first = score_passages(generator, pairs, config())
    assert forwards
    forwards.clear()
    again = score_passages(generator, pairs, config(gamma=0.5, beta=3, direction="KL(Q_LM||P_R)", score="logprob"))
    other = score_passages(generator, pairs[::-1], config(score_batch_size=1, name="a resumed run"))
    assert not forwards
    assert other[::-1] == first
    tokens = [len(generator.encode_response(example.answer, template="plain")) for example, _ in pairs]
    for sums, means, n in zip(again, first, tokens, strict=True):
        assert [value / n for value in sums] == means
    assert "21 LM scores were read from" in capsys.readouterr().out


def test_only_new_pairs_are_scored(generator, pairs, config, forwards, corpus):
    score_passages(generator, pairs[:3], config())
    forwards.clear()
    extra = Passage(id="new", text="A passage that was not there before.")
    twin = replace(pairs[0][1][0], id="the same text under another id")
    more = [(pairs[0][0], [*pairs[0][1], extra, twin, twin]), *pairs[1:3]]
    scores = score_passages(generator, more, config(score_batch_size=1))
    assert len(forwards) == 1
    assert scores[0][5] == scores[0][0] == scores[0][6]
    assert score_passages(generator, more, config(score_cache=None))[0] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("over", [{"prompt": "sources"}, {"include_eos": False}, {"score_cache": None}])
def test_what_changes_the_tokens_is_scored_anew(generator, pairs, config, forwards, over):
    score_passages(generator, pairs, config())
    forwards.clear()
    score_passages(generator, pairs, config(**over))
    assert forwards


def test_a_chat_template_is_scored_anew(generator, pairs, config, forwards, tokenizer):
    plain = score_passages(generator, pairs, config())
    chat = Generator(generator.model, tokenizer, device="cpu")
    chat.tokenizer.chat_template, before = "{{ messages[0]['content'] }}\nmodel:", chat.tokenizer.chat_template
    try:
        chat.chat_template = True
        assert score_passages(chat, pairs, config()) != plain
    finally:
        chat.tokenizer.chat_template = before


def test_another_model_never_reads_these_scores(generator, pairs, config, forwards):
    settings = config()
    before = score_passages(generator, pairs, settings)
    with torch.no_grad():
        generator.model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5  # one number of all
    forwards.clear()
    after = score_passages(generator, pairs, settings)
    assert forwards and after != before
    assert len(list(cache_folder(settings).glob("*.sqlite"))) == 2
    with torch.no_grad():
        generator.model.model.layers[0].mlp.up_proj.weight[3, 5] -= 0.5
    forwards.clear()
    assert score_passages(generator, pairs, settings) == before and not forwards


def test_a_truncated_cache_is_set_aside_and_scored_again(generator, pairs, config, capsys):
    settings = config()
    wanted = score_passages(generator, pairs, settings)
    (file,) = cache_folder(settings).glob("*.sqlite")
    file.write_bytes(file.read_bytes()[:5000])
    assert score_passages(generator, pairs, settings) == wanted
    assert "cannot be used" in capsys.readouterr().out


def test_where_the_scores_are_kept(config, tmp_path):
    assert cache_folder(config()) == tmp_path / "runs" / "lm_scores"
    assert cache_folder(config(score_cache=str(tmp_path / "x"))) == tmp_path / "x"
    assert cache_folder(config(score_cache=None)) is None


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_answer_without_tokens_names_the_question(generator, pairs, config, answer):
    empty = (replace(pairs[0][0], answers=(answer,)), pairs[0][1])
    with pytest.raises(DataError, match="question 'q-Peru': its answer '.*' has no token"):
        score_passages(generator, [empty], config(include_eos=True))


def test_numbers_that_are_not_finite_name_question_and_passage_and_are_not_kept(generator, pairs, config):
    score_passages(generator, pairs[:1], config())
    generator.model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(ScoringError, match="'q-.*', passage '"):
        score_passages(generator, pairs, config())
    assert all(file.stat().st_size for file in cache_folder(config()).glob("*.sqlite"))
    generator.model.model.norm.weight.data[0] = 1
    assert torch.isfinite(torch.tensor(sum(score_passages(generator, pairs, config()), []))).all()


def test_the_digest_is_that_of_the_function(generator, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = generator.model
    first = lm_digest(model)
    assert lm_digest(model) == first
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert lm_digest(loaded) == first
    assert lm_digest(loaded.to(torch.bfloat16)) != first
    seen = {first, lm_digest(loaded)}

    def new(digest):
        assert digest not in seen
        seen.add(digest)

    model.model.layers[0].mlp.up_proj.weight.data[0, 1] += 1e-3  # `.data` leaves no trace in the version counter
    new(lm_digest(model))
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 1] += 1e-3  # not among the numbers that are sampled
    new(lm_digest(model))
    model.config.rms_norm_eps *= 10
    new(lm_digest(model))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    new(lm_digest(adapted))
    on = lm_digest(adapted)
    with adapted.disable_adapter():
        new(lm_digest(adapted))
    assert lm_digest(adapted) == on
    adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    new(lm_digest(adapted))


KILLED = """
import os, sys, time
import torch
from ragkit.config import LSRConfig
from ragkit.rag.corpus import Passage
from ragkit.rag.generator import Generator
from ragkit.tuning.qa_data import load_qa
from ragkit.tuning.scoring import score_passages
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, after = sys.argv[1], int(sys.argv[2])
generator = Generator(folder + "/model", AutoTokenizer.from_pretrained(folder + "/model"), device="cpu")
calls = []

def count(*_):
    calls.append(1)
    print("forward", len(calls), flush=True)
    if len(calls) == after:
        time.sleep(600)  # in the middle of a batch

passages = [Passage(id=str(n), text=f"{n} is its number.") for n in range(4)]
examples = load_qa([{"id": str(n), "question": f"Is {n} odd?", "answer": "yes"} for n in range(8)])
pairs = [(example, passages) for example in examples]
config = LSRConfig(output_dir=folder + "/runs", score_batch_size=4, score="logprob")
generator.core.generation_config = None
from ragkit.rag.lm_head import read_head
read_head(generator.core)  # tries the head out, with forwards of its own
generator.core.model.register_forward_pre_hook(count)
print("scores", score_passages(generator, pairs, config), flush=True)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_keeps_every_batch_that_was_done(generator, config, tmp_path):
    generator.model.save_pretrained(tmp_path / "model")
    generator.tokenizer.save_pretrained(tmp_path / "model")

    def start(after):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(after)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    first = start(6)  # of 8 batches
    for line in first.stdout:
        if line.startswith("forward 6"):
            break
    else:
        pytest.fail(first.stderr.read())
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = start(0)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert out.count("forward") == 3  # the five that were done are read
    assert "20 LM scores were read from" in out and "cannot be used" not in out
    found = json.loads(out[out.index("[[") :])
    passages = [Passage(id=str(n), text=f"{n} is its number.") for n in range(4)]
    examples = load_qa([{"id": str(n), "question": f"Is {n} odd?", "answer": "yes"} for n in range(8)])
    wanted = score_passages(generator, [(e, passages) for e in examples], config(score="logprob", score_cache=None))
    assert len(found) == 8 and all(a == pytest.approx(b, abs=1e-5) for a, b in zip(found, wanted, strict=True))
