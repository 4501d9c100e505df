"""The head of small random models of many architectures against the models' own logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from silence import no_warning
from transformers import AutoModelForCausalLM

from ragkit.rag.lm_head import hidden_states, read_head

VOCABULARY = 160
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.4,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4}
# name -> (configuration class, its own settings, the scale and the cap that are to be found)
MODELS = {
    "llama": ("LlamaConfig", {}, 1, None),
    "qwen2": ("Qwen2Config", {}, 1, None),
    "qwen3": ("Qwen3Config", {}, 1, None),
    "mistral": ("MistralConfig", {"sliding_window": 4}, 1, None),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 5.0}, 1, 5),
    "gemma2, large cap": ("Gemma2Config", {"final_logit_softcapping": 500.0}, 1, 500),
    "gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 30.0, "sliding_window": 8}, 1, 30),
    "gemma3, no cap": ("Gemma3TextConfig", {"sliding_window": 8}, 1, None),
    "gpt2": ("GPT2Config", GPT2, 1, None),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}, 0.25, None),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, 0.0625, None),
    "cohere2": ("Cohere2Config", {"logit_scale": 3.0, "sliding_window": 8}, 3, None),
    "phi": ("PhiConfig", {}, 1, None),  # its head has a bias
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 16}, 1, None),
    "gpt-neox": ("GPTNeoXConfig", {}, 1, None),
    "olmo2": ("Olmo2Config", {}, 1, None),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}, 1, None),
    "minicpm3": ("MiniCPM3Config", {"dim_model_base": 16, **MLA}, 0.5, None),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 4.0}, 4, None),
    "recurrent-gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 16}, 1, 30),
    "nanochat": ("NanoChatConfig", {"final_logit_softcapping": 15.0}, 1, 15),
}


def make(name, **over):
    config_name, own, *_ = MODELS[name]
    config_class = getattr(transformers, config_name, None)
    if config_class is None:
        pytest.skip(f"this transformers has no {config_name}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**COMMON, **own, **over})).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: nothing that goes wrong would show
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_those_of_the_models_own_logits(name, tied):
    model = make(name, tie_word_embeddings=tied)
    head = read_head(model)
    assert head is not None
    assert (head.logit_scale, head.softcap) == pytest.approx(MODELS[name][2:])
    if MODELS[name][0] not in ("OPTConfig",):
        assert (head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, T, V]
        hidden = hidden_states(model, ids, mask)  # [B, T, D]
    wanted = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
    found = head.token_logprobs(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(head.logits(hidden), logits, atol=1e-3, rtol=1e-4)


def test_gradients_reach_a_frozen_heads_layers_and_a_free_head():
    model = make("llama", tie_word_embeddings=False)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden = hidden_states(model, ids)
    loss = -read_head(model).token_logprobs(hidden[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten()).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_a_lora_in_the_layers_is_active_and_its_head_is_read(add_lora):
    plain = make("llama", tie_word_embeddings=False)
    ids = torch.arange(3, 11).unsqueeze(0)
    before = hidden_states(plain, ids)
    model = add_lora(plain, exclude_modules=["lm_head"])
    head = read_head(model)
    assert head is not None and head.weight is model.get_base_model().lm_head.weight
    torch.testing.assert_close(head.logits(hidden_states(model, ids)), model(input_ids=ids).logits)
    assert not torch.allclose(before, hidden_states(model, ids), atol=0.1)


@pytest.mark.parametrize(
    "over",
    [
        {"target_modules": ["lm_head"], "init_lora_weights": True},  # adds nothing yet, but will once it is trained
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}},
    ],
)
def test_an_adapter_on_the_head_is_seen_even_if_put_on_later(over):
    from peft import LoraConfig, get_peft_model

    model = make("llama", tie_word_embeddings=False)
    assert read_head(model) is not None
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **over))
    with pytest.warns(UserWarning, match="instead of one linear layer"):
        assert read_head(adapted) is None
    with no_warning():  # said once
        assert read_head(adapted) is None


def changed(model, change):
    """The model with its logits changed by a function."""
    kind = type(model)

    class Changed(kind):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.01,
        lambda z: 100 * torch.tanh(z / 100),  # only large logits show it
        lambda z: z.clamp(max=200),
        lambda z: z + 0.01 * torch.arange(z.shape[-1]),
        lambda z: z[..., : VOCABULARY - 1],
    ],
)
def test_what_a_model_does_without_saying_so_is_found_out(change):
    assert read_head(make("llama")) is not None
    with pytest.warns(UserWarning, match="ChangedForCausalLM|Changed"):
        assert read_head(changed(make("llama"), change)) is None


def test_a_setting_that_is_changed_later_is_read_again():
    model = make("gemma2")
    assert read_head(model).softcap == 5
    model.config.final_logit_softcapping = 7.0
    assert read_head(model).softcap == 7
    model.config.final_logit_softcapping = None
    assert read_head(model).softcap is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "granite", "cohere", "opt"])
def test_heads_in_half_precision_are_read(name, dtype):
    head = read_head(make(name).to(dtype))
    assert (head.logit_scale, head.softcap) == pytest.approx(MODELS[name][2:])


def test_modes_and_random_numbers_are_left_as_they_were():
    model = make("gpt2").train()
    state = torch.get_rng_state()
    assert read_head(model) is not None
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert not model.transformer._forward_hooks and not model.lm_head._forward_pre_hooks
