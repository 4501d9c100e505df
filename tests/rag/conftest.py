"""Shared by the tests of the generator: the tiny LM ready to use, prompts of three lengths, and a LoRA adapter."""

from __future__ import annotations

import pytest
import torch

from ragkit.rag.generator import Generator

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
    """Three prompts and their responses, as token ids."""
    prompts = [generator.encode_prompt("plain", q, [s]) for q, s in zip(QUESTIONS, SOURCES, strict=True)]
    return prompts, [generator.encode_response(answer) for answer in ANSWERS]


@pytest.fixture
def add_lora():
    """add_lora(model, **over): the model with a LoRA that is not zero on all its linear layers."""
    from peft import LoraConfig, get_peft_model

    def add(model, **over):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **over)
        return get_peft_model(model, config).eval()

    return add


@pytest.fixture
def hf_logprob():
    """hf_logprob(model, prompt, response): -(HF loss x tokens) with -100 on the prompt, which is the definition."""

    def logprob(model, prompt, response):
        ids = torch.tensor([prompt + response])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            return float(-model(input_ids=ids, labels=labels).loss) * len(response)

    return logprob
