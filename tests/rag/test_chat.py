"""Chat templates in the manner of well-known models: prompt and response are the tokens of the whole conversation."""

from __future__ import annotations

import copy

import pytest

from ragkit.rag.chat import AnswerFrame, answer_frame, render_chat
from ragkit.rag.generator import Generator

LOOP = "{% for m in messages %}"
# name: (template, the end of a turn, white space before the answer)
TEMPLATES = {
    "chatml": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "",
    ),
    "llama 3": (
        "<s>" + LOOP + "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
        "<|eot_id|>",
        "",
    ),
    "gemma": (
        "<s>" + LOOP + "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
        "<end_of_turn>",
        "",
    ),
    "mistral": (
        "<s>" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
        " ",
    ),
}


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"], special_tokens=True)
    return own


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_prompt_and_response_are_the_conversation(tiny_lm, chat_tokenizer, name, system_prompt):
    template, end, prefix = TEMPLATES[name]
    chat_tokenizer.chat_template = template
    end_id = chat_tokenizer.convert_tokens_to_ids(end)
    assert answer_frame(chat_tokenizer, system_prompt) == AnswerFrame(prefix, end_id)
    generator = Generator(tiny_lm, chat_tokenizer, chat_template=True, system_prompt=system_prompt)
    prompt = generator.encode_prompt("plain", "Q?", ["P."])
    for answer in ("Lima", "the Nile, and Sudan", "42"):
        ids = prompt + generator.encode_response(f" {answer}\n", template="plain")
        whole = render_chat(chat_tokenizer, "Passage: P.\nQuestion: Q?\nAnswer:", system_prompt, answer)
        wanted = chat_tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert ids == wanted[: len(ids)] and chat_tokenizer.decode(wanted[len(ids) :]).strip() == ""
        assert ids.count(chat_tokenizer.bos_token_id) == whole.count("<s>")
    assert generator.encode_response("Lima", eos=False)[-1] != end_id == generator.end_id
    assert {end_id, generator.eos_id} == set(generator._decoding(4).eos_token_id)  # where an answer ends


def test_what_no_frame_can_be_read_from_ends_with_eos(tiny_lm, chat_tokenizer):
    plain = AnswerFrame("", chat_tokenizer.eos_token_id)
    for template in (
        LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "{{ messages[0]['content'] }}\nmodel:",  # shows no answer
        LOOP + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}model:{% endif %}",  # does not go on
    ):
        chat_tokenizer.chat_template = template
        assert answer_frame(chat_tokenizer) == plain
    # An empty block of thoughts is none of the answer, but its end of turn is.
    chat_tokenizer.chat_template = TEMPLATES["chatml"][0].replace(
        "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}{{ m.content }}"
    )
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_frame(chat_tokenizer) == AnswerFrame("", end)
    generator = Generator(tiny_lm, chat_tokenizer, chat_template=True)
    assert chat_tokenizer.decode(generator.encode_response("Lima")) == "Lima<|im_end|>"


def test_without_a_chat_template_a_response_ends_with_eos(tiny_lm, chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATES["gemma"][0]
    generator = Generator(tiny_lm, chat_tokenizer)
    assert generator.end_id == generator.eos_id == generator.encode_response("Lima")[-1]
