"""RALT's loss on models with windows, caps and norms of their own, packed or not; trainings that end early."""

from __future__ import annotations

import warnings

import pytest
import torch
from silence import no_warning
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from ragkit.config import RALTConfig
from ragkit.engine import NonFiniteLossError
from ragkit.tuning.fused_loss import packing_works, training_loss
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.ralt_rows import Collator, RALTRow

SIZES = {
    "vocab_size": 89,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than an instance: a mask that forgets the window would show
MODELS = {
    "gemma 2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=3.0)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW)),
    "qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=1.0)),
}


def instance(number, prompt, response):
    draw = torch.Generator().manual_seed(number)
    ids = [tuple(torch.randint(3, 89, (n,), generator=draw).tolist()) for n in (prompt, response)]
    return RALTRow(f"q{number}", "?", (), *ids, "", "")


ROWS = [instance(0, 6, 3), instance(1, 9, 1), instance(2, 2, 6), instance(3, 7, 2), instance(4, 4, 1)]


def batch_of(pack=None):
    return {name: value for name, value in Collator(0, pack)(ROWS).items() if name != "ids"}


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_and_packed_loss_are_the_models_own(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it: its attention has a cap")
    with no_warning():  # a head that is not read would say so
        model.config.use_cache = False
        model.set_attn_implementation(attention)
        assert packing_works(model)
        wanted, grads = loss_and_gradients(model, batch_of())
        packed = batch_of(pack=20)
        assert packed["input_ids"].shape[0] < len(ROWS)
        found = [loss_and_gradients(model, packed)]
        with training_loss(model) as fused:
            assert fused
            found += [loss_and_gradients(model, batch) for batch in (batch_of(), packed)]
    for loss, own in found:
        assert loss == pytest.approx(wanted, abs=1e-5) and own.keys() == grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(own[key], grad, rtol=1e-4, atol=1e-5 * max(1.0, float(grad.abs().max())))


def test_packing_is_refused_where_only_a_row_that_stands_alone_is_told_apart():
    torch.manual_seed(0)
    model = MODELS["mistral"]()
    whole = model.model.forward

    def like_flash_attention(input_ids, position_ids=None, **options):
        given = {"position_ids": position_ids} if len(input_ids) == 1 else {}
        return whole(input_ids=input_ids, **given, **options)

    model.model.forward = like_flash_attention
    assert not packing_works(model)


# ---- trainings that end early ----


class Interrupt(TrainerCallback):
    """Ctrl-C after the first step."""

    def on_step_end(self, *_, **__):
        raise KeyboardInterrupt


def settings(folder, method="lora", **train):
    train = {"batch_size": 3, "learning_rate": 5e-3, "max_steps": 4, "warmup_steps": 0, **train}
    return RALTConfig(method=method, top_k=2, output_dir=str(folder), train=train)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_training_leaves_the_models_forward_as_it_was(system, questions, tmp_path, method):
    trainer = RALTTrainer(system, questions, settings(tmp_path, method, precision="bf16"))
    trainer.callbacks.append(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model, core = system.generator.model, system.generator.core
    # accelerate puts the method it found back into the instance
    assert all(part.forward.__func__ is type(part).forward for part in (model, core))
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        assert torch.equal(out.logits, core.lm_head(core.model(ids).last_hidden_state))
    assert out.logits.dtype == torch.float32 and not model.training


def test_hidden_states_that_are_no_numbers_end_a_fused_training(system, questions, tmp_path):
    trainer = RALTTrainer(system, questions, settings(tmp_path, "full", max_steps=2))
    broken = trainer.rows()[0].prompt_ids[-1]
    assert broken > 8  # the head is tried out on the first eight tokens
    with torch.no_grad():
        system.generator.core.get_input_embeddings().weight[broken] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with training_loss(system.generator.model) as fused:
            assert fused
        with pytest.raises(NonFiniteLossError, match="the loss is nan at step 1 in the batch of the questions q-"):
            trainer.train()


def test_adapters_accumulate_batches_of_unequal_length(make_system, questions, tmp_path):
    """Four small batches with unequal numbers of answer tokens are one large batch, adapters in mixed lengths too."""
    longer = [{**q, "answer": " ".join([q["answer"]] * (1 + 3 * (n % 2)))} for n, q in enumerate(questions)]
    curves = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        train = {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        result = RALTTrainer(make_system(), longer, settings(tmp_path, **train)).train()
        curves.append([event["loss"] for event in result.history if event.get("loss") is not None])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5) and len(set(curves[0])) == 2
