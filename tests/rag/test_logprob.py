"""Log-probabilities of answers against the model's own loss: batches, adapters, and models that change logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel, GraniteConfig

from ragkit.rag.generator import Generator
from ragkit.rag.lm_head import read_head


def test_logprob_is_minus_loss_times_tokens(generator, pairs, hf_logprob):
    found = generator.sequence_logprob(*pairs)
    expected = [hf_logprob(generator.model, p, r) for p, r in zip(*pairs, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.dtype == torch.float64 and not found.requires_grad


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


def test_dropout_is_off_while_scoring_and_modes_come_back(tokenizer, pairs, hf_logprob):
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
def test_models_that_cap_or_scale_their_logits_are_scored_by_their_head(
    tokenizer, pairs, config_class, over, hf_logprob
):
    model = _small(config_class, tokenizer, **over)
    assert read_head(model) is not None
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
    with pytest.warns(UserWarning, match="its own logits are used"):
        assert read_head(tiny_lm) is not None and read_head(model) is None
    found = Generator(model, tokenizer).sequence_logprob(*pairs)
    prompt, response = pairs[0][0], pairs[1][0]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
    assert found[0].item() == pytest.approx(
        float(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).sum()), abs=1e-4
    )


@pytest.mark.parametrize("over", [{}, {"modules_to_save": ["lm_head"]}])
def test_adapters_are_active_in_logprobs_and_answers(generator, tokenizer, pairs, over, hf_logprob, add_lora):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_from_its_own_hidden_states(tiny_lm, tokenizer, pairs, dtype):
    """The logits go into the log-sum-exp in float32, so the scores are nearer to the truth than the model's loss."""
    model = tiny_lm.to(dtype)
    found = Generator(model, tokenizer).sequence_logprob(*pairs)
    for value, prompt, response in zip(found.tolist(), *pairs, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[
                0, len(prompt) - 1 : -1
            ]
        logits = hidden.double() @ model.lm_head.weight.double().T
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).sum().item()
        # What is left is the rounding of the layers in a batch of other shape.
        assert value == pytest.approx(wanted, abs=(0.3 if dtype == torch.bfloat16 else 0.04) * len(response))
