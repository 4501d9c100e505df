"""The generator: log-probs against the model's own loss, batches against single prompts, tokenizers of every kind."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel, GraniteConfig

from ragkit.prompts import PromptError
from ragkit.rag import logprob
from ragkit.rag.generator import Generator, TokenizerError

SOURCES = [
    "Lima is the capital of Peru.",
    "Paris is the capital of France.",
    "The Nile flows through Egypt and Sudan.",
]
QUESTIONS = ["What is the capital of Peru?", "Capital?", "Through which countries does the long river Nile flow?"]
ANSWERS = ["Lima", "Paris is the answer", "Egypt and Sudan"]


@pytest.fixture
def generator(tiny_lm, tokenizer):
    return Generator(tiny_lm, tokenizer, max_new_tokens=8)


@pytest.fixture
def pairs(generator):
    prompts = [generator.encode_prompt("plain", q, [s]) for q, s in zip(QUESTIONS, SOURCES, strict=True)]
    return prompts, [generator.encode_response(answer) for answer in ANSWERS]


def hf_logprob(model, prompt, response):
    """-(HF loss x tokens) with -100 on the prompt: the definition."""
    ids = torch.tensor([prompt + response])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return float(-model(input_ids=ids, labels=labels).loss) * len(response)


def add_lora(model, **over):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **over)
    return get_peft_model(model, config).eval()


# ---------------------------------------------------------------------------------------------------- log-probs


def test_logprob_is_minus_loss_times_tokens(generator, pairs):
    found = generator.sequence_logprob(*pairs)
    expected = [hf_logprob(generator.model, p, r) for p, r in zip(*pairs, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_logprob_does_not_depend_on_the_batch(generator, pairs, batch_size):
    prompts, responses = pairs
    alone = torch.cat([generator.sequence_logprob([p], [r]) for p, r in zip(*pairs, strict=True)])
    found = generator.sequence_logprob(prompts[::-1], responses[::-1], batch_size=batch_size)
    assert torch.allclose(found.flip(0), alone, atol=1e-4)


def test_logprob_of_an_empty_response_is_zero_and_of_nothing_is_nothing(generator, pairs):
    assert generator.sequence_logprob([pairs[0][0], pairs[0][1]], [[], pairs[1][1]]).tolist()[0] == 0
    assert generator.sequence_logprob([], []).shape == (0,)


def test_logprob_errors(generator):
    with pytest.raises(ValueError, match="2 prompts, but 1 responses"):
        generator.sequence_logprob([[3], [4]], [[5]])
    with pytest.raises(ValueError, match="an empty prompt"):
        generator.sequence_logprob([[]], [[5]])
    with pytest.raises(ValueError, match="number 1 have 300 tokens, the model has positions for 256"):
        generator.sequence_logprob([[3], [5] * 299], [[5], [5]])


def test_a_learnt_answer_has_probability_one(generator, pairs):
    """An off-by-one in the positions would leave this near zero."""
    prompt, response = pairs[0][0], pairs[1][0]
    model = generator.model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ids = torch.tensor([prompt + response])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert generator.sequence_logprob([prompt], [response]).exp().item() > 0.95
    assert generator.generate_ids([prompt]) == ["Lima"]  # and it stops at the EOS token


def test_a_long_answer_stays_finite(generator):
    value = generator.sequence_logprob([[5, 6]], [[7 + i % 50 for i in range(200)]])
    assert torch.isfinite(value).all() and value.item() < -200


def test_dropout_is_off_while_scoring_and_modes_come_back(tokenizer, pairs):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    generator = Generator(GPT2LMHeadModel(config), tokenizer)
    generator.model.train()
    assert torch.equal(generator.sequence_logprob(*pairs), generator.sequence_logprob(*pairs))
    assert generator.model.training
    expected = [hf_logprob(generator.model.eval(), p, r) for p, r in zip(*pairs, strict=True)]
    assert generator.sequence_logprob(*pairs).tolist() == pytest.approx(expected, abs=1e-4)


def _small(config_class, tokenizer, **over):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.4,
        pad_token_id=0,
        **over,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config_class", "over"),
    [(Gemma2Config, {"final_logit_softcapping": 5.0}), (GraniteConfig, {"logits_scaling": 4.0})],
)
def test_models_that_cap_or_scale_their_logits_are_scored_by_them(tokenizer, pairs, config_class, over):
    model = _small(config_class, tokenizer, **over)
    assert not logprob.has_plain_head(model)
    found = Generator(model, tokenizer).sequence_logprob(*pairs, batch_size=2)
    expected = [hf_logprob(model, p, r) for p, r in zip(*pairs, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_model_that_does_more_without_saying_so_is_found_out(tiny_lm, tokenizer, pairs):
    class Scaled(type(tiny_lm)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model = Scaled(tiny_lm.config).eval()
    assert logprob.has_plain_head(tiny_lm) and not logprob.has_plain_head(model)
    found = Generator(model, tokenizer).sequence_logprob(*pairs)
    prompt, response = pairs[0][0], pairs[1][0]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
    assert found[0].item() == pytest.approx(
        float(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).sum()), abs=1e-4
    )


@pytest.mark.parametrize("over", [{}, {"modules_to_save": ["lm_head"]}])
def test_adapters_are_active_in_logprobs_and_answers(generator, tokenizer, pairs, over):
    plain = generator.sequence_logprob(*pairs)
    adapted = Generator(add_lora(generator.model, **over), tokenizer, max_new_tokens=8)
    found = adapted.sequence_logprob(*pairs)
    expected = [hf_logprob(adapted.model, p, r) for p, r in zip(*pairs, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4) and not torch.allclose(found, plain, atol=0.1)
    ids = torch.tensor([pairs[0][0]])
    alone = adapted.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert adapted.generate_ids([pairs[0][0]]) == [text]


def test_adapters_that_prepend_tokens_are_refused(tiny_lm, tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_lm, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prepends virtual tokens"):
        Generator(model, tokenizer)


# --------------------------------------------------------------------------------------------------- generation


def test_answers_of_a_batch_are_those_of_single_prompts(generator, pairs):
    prompts = pairs[0]
    assert len({len(prompt) for prompt in prompts}) == 3
    alone = [generator.generate_ids([prompt])[0] for prompt in prompts]
    assert len(set(alone)) > 1  # the prompt matters to this LM
    for batch_size in (1, 2, 16):
        generator.batch_size = batch_size
        assert generator.generate_ids(prompts) == alone
        assert generator.generate_ids(prompts[::-1]) == alone[::-1]
    assert generator.generate_ids([]) == []


def test_absolute_positions_survive_left_padding(tokenizer, pairs):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4
    )
    generator = Generator(GPT2LMHeadModel(config), tokenizer, max_new_tokens=6)
    assert generator.generate_ids(pairs[0]) == [generator.generate_ids([prompt])[0] for prompt in pairs[0]]


def test_a_models_sampling_settings_do_not_leak_and_nothing_is_printed(generator, pairs, capfd, caplog):
    greedy = generator.generate_ids(pairs[0])
    config = generator.model.generation_config
    config.do_sample, config.temperature, config.top_p, config.repetition_penalty = True, 9.0, 0.5, 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generator.generate_ids(pairs[0]) == greedy == generator.generate_ids(pairs[0])
    assert generator.model.generation_config is config and config.temperature == 9.0
    captured = capfd.readouterr()
    assert captured.out == captured.err == "" and not caplog.records


def test_max_new_tokens(generator, pairs):
    short = generator.generate_ids(pairs[0][:1], max_new_tokens=1)[0]
    long = generator.generate_ids(pairs[0][:1])[0]
    assert long.startswith(short) and len(short) < len(long)


# ---------------------------------------------------------------------------------------------- prompts, tokens


def test_prompt_and_response_join_as_ids(generator, tokenizer):
    prompt, response = generator.encode_prompt("plain", "Q?", ["P."]), generator.encode_response("Paris")
    assert tokenizer.decode(prompt + response) == "Passage: P.\nQuestion: Q?\nAnswer: Paris</s>"
    assert response[-1] == tokenizer.eos_token_id and generator.encode_response("Paris", eos=False) == response[:-1]
    assert generator.encode_response("  Paris \n") == response


def test_passages_are_cut_to_the_models_positions_and_the_reserve(generator):
    long = "The Nile flows through Egypt. " * 40
    prompt = generator.encode_prompt("plain", "Where?", [long], reserve=16)
    assert 200 < len(prompt) <= 240
    assert generator.tokenizer.decode(prompt).endswith("\nQuestion: Where?\nAnswer:")
    generator.max_prompt_tokens = 60
    assert len(generator.encode_prompt("plain", "Where?", [long], reserve=16)) <= 60
    with pytest.raises(PromptError, match="even with its 1 passages empty"):
        generator.encode_prompt("plain", "Where is it? " * 50, [long])


def test_no_warning_about_long_texts(generator, caplog, capfd):
    generator.tokenizer = copy.deepcopy(generator.tokenizer)
    generator.tokenizer.model_max_length = 20
    generator.encode_prompt("plain", "Where?", ["The Nile flows. " * 30])
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tiny_lm, tokenizer):
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    generator = Generator(tiny_lm, ending)
    prompt, response = generator.encode_prompt("plain", "Q?", ["P."]), generator.encode_response("Paris")
    assert prompt[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in prompt
    assert response.count(tokenizer.eos_token_id) == 1 and tokenizer.bos_token_id not in response


def test_chat_template(tiny_lm, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    generator = Generator(tiny_lm, chat, chat_template=True, system_prompt="Be brief.")
    prompt = generator.encode_prompt("plain", "Q?", ["P."])
    expected = "<system>Be brief.\n<user>Passage: P.\nQuestion: Q?\nAnswer:\n<assistant>\n"
    assert chat.decode(prompt) == expected
    assert chat.decode(prompt + generator.encode_response("Lima")) == expected + "Lima</s>"
    assert len(generator.encode_prompt("plain", "Q?", ["The Nile flows. " * 60], reserve=9)) <= 247


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": True}, "chat_template is on, but the tokenizer has none"),
        ({"system_prompt": "Be brief."}, "system_prompt needs chat_template"),
        ({"tokenizer": None}, "a live model needs its tokenizer"),
    ],
)
def test_tokenizer_errors(tiny_lm, tokenizer, options, message):
    with pytest.raises(TokenizerError, match=message):
        Generator(tiny_lm, **{"tokenizer": tokenizer, **options})


def test_a_tokenizer_without_pad_uses_eos(tiny_lm, tokenizer, generator, pairs):
    no_pad = copy.deepcopy(tokenizer)
    no_pad.pad_token = None
    other = Generator(tiny_lm, no_pad, max_new_tokens=8)
    assert other.pad_id == tokenizer.eos_token_id
    assert other.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])
    assert torch.allclose(other.sequence_logprob(*pairs), generator.sequence_logprob(*pairs), atol=1e-5)


def test_a_tokenizer_without_pad_and_eos_is_refused(tiny_lm, tokenizer):
    neither = copy.deepcopy(tokenizer)
    neither.pad_token = neither.eos_token = None
    with pytest.raises(TokenizerError, match="neither a pad nor an EOS token"):
        Generator(tiny_lm, neither)
    neither.pad_token = "<pad>"
    with pytest.raises(TokenizerError, match="no EOS token to end the response with"):
        Generator(tiny_lm, neither).encode_response("Lima")


# -------------------------------------------------------------------------------------------------- save, load


def test_from_a_folder_and_saved_again(generator, pairs, tmp_path):
    generator.model.save_pretrained(tmp_path / "lm")
    generator.tokenizer.save_pretrained(tmp_path / "lm")
    loaded = Generator(tmp_path / "lm", device="cpu", max_new_tokens=8, batch_size=3, max_prompt_tokens=99)
    assert loaded.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])
    loaded.save(tmp_path / "g")  # the folder may not exist elsewhere, so the weights are in
    assert (tmp_path / "g" / "model" / "model.safetensors").is_file()
    again = Generator.load(tmp_path / "g", device="cpu")
    assert again.generate_ids(pairs[0]) == generator.generate_ids(pairs[0])
    assert (again.max_new_tokens, again.batch_size, again.max_prompt_tokens) == (8, 3, 99)


@pytest.fixture
def named(generator, tmp_path, monkeypatch):
    """A generator called "default" as the shipped one is, with the tiny LM in its place."""
    from ragkit import small_world

    generator.model.save_pretrained(tmp_path / "shipped")
    generator.tokenizer.save_pretrained(tmp_path / "shipped")
    monkeypatch.setattr(small_world, "lm_path", lambda: tmp_path / "shipped")
    return Generator("default", device="cpu", max_new_tokens=8)


def test_an_untouched_named_model_is_kept_as_its_name(named, pairs, tmp_path):
    named.save(tmp_path / "g")
    assert not (tmp_path / "g" / "model").exists()
    assert Generator.load(tmp_path / "g", device="cpu").generate_ids(pairs[0]) == named.generate_ids(pairs[0])
    with torch.no_grad():
        named.model.model.norm.weight.add_(0.01)
    named.save(tmp_path / "g2")
    assert (tmp_path / "g2" / "model").is_dir()
    named.model.save_pretrained(tmp_path / "shipped")  # "default" now means something else
    with pytest.raises(ValueError, match="the model 'default' is not the one that was saved"):
        Generator.load(tmp_path / "g", device="cpu")


@pytest.mark.parametrize("over", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("base_trained", [False, True])
def test_adapters_are_saved_with_or_without_their_base(named, pairs, tmp_path, over, base_trained):
    if base_trained:
        with torch.no_grad():
            named.model.model.layers[0].mlp.up_proj.weight.add_(0.05)
    plain = named.sequence_logprob(*pairs)
    adapted = Generator(add_lora(named.model, **over), named.tokenizer)
    adapted.source, adapted._loaded = named.source, named._loaded
    adapted.save(tmp_path / "g")
    assert (tmp_path / "g" / "model").exists() == base_trained
    loaded = Generator.load(tmp_path / "g", device="cpu")
    assert torch.allclose(loaded.sequence_logprob(*pairs), adapted.sequence_logprob(*pairs), atol=1e-4)
    with loaded.model.disable_adapter():
        base = [hf_logprob(loaded.model, p, r) for p, r in zip(*pairs, strict=True)]
    assert plain.tolist() == pytest.approx(base, abs=1e-4)
    adapted.model.save_pretrained(tmp_path / "adapter")
    if not base_trained:
        other = Generator("default", adapter=tmp_path / "adapter", device="cpu")
        assert torch.allclose(other.sequence_logprob(*pairs), adapted.sequence_logprob(*pairs), atol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "generator.json").unlink(), "generator.json: not a saved generator"),
        (lambda d: (d / "generator.json").write_text("{"), "generator.json: not a saved generator"),
        (lambda d: (d / "generator.json").write_text(json.dumps([])), "generator.json: not a saved generator"),
        (lambda d: (d / "model").rename(d / "gone"), "model: missing"),
        (lambda d: (d / "model" / "model.safetensors").write_bytes(b"half"), "no language model could be loaded"),
    ],
)
def test_a_damaged_folder_is_named(generator, tmp_path, damage, message):
    generator.save(tmp_path / "g")
    damage(tmp_path / "g")
    with pytest.raises(ValueError, match=message) as caught:
        Generator.load(tmp_path / "g", device="cpu")
    assert str(tmp_path / "g") in str(caught.value)


def test_a_wrong_name_or_adapter_is_named(generator, tmp_path):
    with pytest.raises(ValueError, match="no language model could be loaded from .*nothing"):
        Generator(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no PEFT adapter could be loaded from .*nothing"):
        Generator(generator.model, generator.tokenizer, adapter=tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        Generator(tmp_path / "nothing", dtype="float8")


def test_dtype(generator, tmp_path):
    generator.model.save_pretrained(tmp_path / "lm")
    generator.tokenizer.save_pretrained(tmp_path / "lm")
    assert Generator(tmp_path / "lm", device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
