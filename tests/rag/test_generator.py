"""The generator: batches against single prompts, prompts as token ids, and tokenizers of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from silence import no_warning
from transformers import GPT2Config, GPT2LMHeadModel

from ragkit.prompts import PromptError
from ragkit.rag.generator import Generator, TokenizerError

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
    with no_warning():
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
