"""The scoring engine: batches, memory, shared beginnings, and errors that name the question."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from silence import no_warning
from transformers import AutoModelForCausalLM

from ragkit.rag import scoring
from ragkit.rag.generator import Generator
from ragkit.rag.logprob import SharingError, response_logprobs
from ragkit.rag.scoring import ScoringError, score_responses
from ragkit.rag.scoring_plan import Cost, budget_of, bytes_of, common_beginning, find_groups, plan


@pytest.fixture
def many():
    """40 pairs of 8 questions whose prompts begin alike, with answers of different lengths."""
    random = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(3, 200, (n,), generator=random).tolist()

    prompts, responses, groups = [], [], []
    for question in range(8):
        start, answer = tokens(20 + 7 * question), tokens(1 + question)
        for _ in range(5):
            prompts.append(start + tokens(int(torch.randint(1, 14, (), generator=random))))
            responses.append(answer)
            groups.append(question)
    return prompts, responses, groups


def count_tokens(model):
    """Counts the tokens, padding included, that go through the layers; [calls, tokens]."""
    seen = [0, 0]

    def hook(_, args, kwargs):
        seen[0] += 1
        seen[1] += kwargs["input_ids"].numel()

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def make(config_name, tokenizer, **over):
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }
    config = getattr(transformers, config_name)(**{**common, **over})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("batch_size", "memory"), [(1, None), (3, None), (7, 1), (64, 1), (64, None)])
def test_values_do_not_depend_on_batches_and_memory(generator, many, batch_size, memory):
    prompts, responses, groups = many
    alone = torch.cat([generator.sequence_logprob([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    for asked in (None, groups):
        found = generator.sequence_logprob(prompts, responses, batch_size, memory_mib=memory, groups=asked)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("config_name", "over"),
    [
        ("LlamaConfig", {}),
        (
            "GPT2Config",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 96},
        ),  # learnt positions, and few
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("Qwen3Config", {}),
        ("GraniteConfig", {"logits_scaling": 2.0}),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}),  # takes no positions
    ],
)
def test_a_shared_beginning_changes_nothing_but_the_work(tokenizer, many, config_name, over):
    prompts, responses, groups = many
    model = make(config_name, tokenizer, **over)
    whole = score_responses(model, prompts, responses, 0, batch_size=16)
    seen = count_tokens(model)
    with no_warning():
        shared = score_responses(model, prompts, responses, 0, batch_size=16, groups=groups)
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=1e-5)
    assert scoring._can_share[model]
    seen[:] = [0, 0]
    score_responses(model, prompts, responses, 0, batch_size=16, groups=groups)
    assert seen[1] < 0.6 * sum(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))


def test_padding_stays_within_the_positions_of_the_model(tokenizer):
    """A long beginning with a short rest, beside a short beginning with a long rest."""
    model = make("GPT2Config", tokenizer, n_embd=32, n_layer=2, n_head=4, max_position_embeddings=56)
    prompts = [[5] * 50 + [n] for n in (6, 7)] + [[9] * 32 + [n] * 4 for n in (6, 7)]
    responses, groups = [[8], [8], [8] * 20, [8] * 20], [0, 0, 1, 1]
    whole = score_responses(model, prompts, responses, 0, batch_size=1)
    shared = score_responses(model, prompts, responses, 0, batch_size=4, groups=groups)
    assert scoring._can_share[model]
    torch.testing.assert_close(shared, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config_name", "over"),
    [
        ("MistralConfig", {"sliding_window": 8}),
        ("Gemma3TextConfig", {"sliding_window": 8}),
        ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 16}),
    ],
)
def test_windows_and_states_are_not_shared(tokenizer, many, config_name, over):
    prompts, responses, groups = many
    model = make(config_name, tokenizer, **over)
    whole = score_responses(model, prompts, responses, 0, batch_size=16)
    assert torch.equal(score_responses(model, prompts, responses, 0, batch_size=16, groups=groups), whole)
    assert not scoring._can_share[model]


def test_a_plain_cache_is_asked_for(tokenizer, many):
    prompts, responses, _ = many
    with pytest.raises(SharingError):
        model = make("MistralConfig", tokenizer, sliding_window=8)
        response_logprobs(model, prompts[:5], responses[:5], 0, [(5, 10)])


def test_sharing_that_gives_other_numbers_is_found_out(generator, many, monkeypatch):
    prompts, responses, groups = many
    whole = generator.sequence_logprob(prompts, responses)
    real = response_logprobs

    def wrong(*args):
        return real(*args) + (0.5 if args[4] else 0)

    monkeypatch.setattr(scoring, "response_logprobs", wrong)
    with pytest.warns(UserWarning, match="differ by .* nats per token from whole ones"):
        found = generator.sequence_logprob(prompts, responses, groups=groups)
    assert torch.allclose(found, whole)


def test_sharing_goes_with_the_models_own_logits_too(generator, tokenizer, many, add_lora):
    prompts, responses, groups = many
    adapted = Generator(add_lora(generator.model, modules_to_save=["lm_head"]), tokenizer)
    whole = adapted.sequence_logprob(prompts, responses)
    found = adapted.sequence_logprob(prompts, responses, groups=groups)
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-5)
    assert scoring._can_share[adapted.core]


def test_out_of_memory_halves_the_batches_and_is_said_once(generator, many, monkeypatch):
    prompts, responses, groups = many
    wanted = generator.sequence_logprob(prompts, responses)
    real, sizes, done = response_logprobs, [], []

    def small_gpu(core, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(core, prompts, *rest)

    monkeypatch.setattr(scoring, "response_logprobs", small_gpu)
    for asked in (None, groups):
        sizes.clear(), done.clear()
        with pytest.warns(UserWarning, match="ran out of memory with") as warned:
            found = generator.sequence_logprob(
                prompts, responses, 40, groups=asked, on_batch=lambda pairs, _: done.extend(pairs)
            )
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        assert len(warned) == 1 and sum(size > 5 for size in sizes) <= 5
        assert sorted(done) == list(range(40))  # each once


def test_a_single_pair_that_does_not_fit_is_an_error(generator, many, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "response_logprobs", no_memory)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        generator.sequence_logprob(*many[:2])


def test_numbers_that_are_not_finite_name_the_question(generator, pairs):
    generator.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ScoringError, match=r"question 'b': .*log-probability is nan; its weights \(float32\)"):
        generator.sequence_logprob([*pairs[0][:2]], [[], pairs[1][1]], names=["question 'a'", "question 'b'"])


def test_added_tokens_without_rows_name_the_fix(generator, pairs):
    rows = generator.model.lm_head.weight.shape[0]
    prompts, responses = copy.deepcopy(pairs)
    responses[1].append(rows)
    expected = rf"number 1: token {rows}, .*0..{rows - 1}.*model.resize_token_embeddings\(len\(tokenizer\)\)"
    with pytest.raises(ScoringError, match=expected):
        generator.sequence_logprob(prompts, responses)
    with pytest.raises(ScoringError, match="token -1"):
        generator.sequence_logprob([[3, -1]], [[4]])
    generator.model.resize_token_embeddings(rows + 1)
    assert torch.isfinite(generator.sequence_logprob(prompts, responses)).all()


def test_the_bar_is_silent_where_it_should_be(generator, pairs, monkeypatch, capsys):
    generator.sequence_logprob(*pairs, progress="LM scores")  # a short job
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with scoring._bar("LM scores", 10) as bar:
        assert bar.disable
        bar.update(10)
    monkeypatch.delenv("TQDM_DISABLE")
    with scoring._bar(None, 10) as bar:
        assert bar.disable
    assert capsys.readouterr() == ("", "")


def test_budgets(generator):
    assert budget_of(torch.device("cpu"), 3) == 3 * 2**20
    assert budget_of(torch.device("cpu"), None) == 48 * 2**20
    cost = Cost.of(generator.core)
    assert cost.token > 32 * 4 * 4 and cost.cached == 2 * 2 * 2 * 8 * 4
    generator.core.config._attn_implementation = "eager"
    assert Cost.of(generator.core).square > cost.square


def test_the_common_beginning_leaves_a_token_that_predicts():
    assert common_beginning([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_beginning([[1, 2], [1, 2, 4]]) == 1
    assert common_beginning([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_beginning([[5], [6, 7]]) == 0


lists = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=40)


@given(lists, st.integers(1, 12), st.integers(1, 200))
def test_plans_hold_every_pair_once_within_the_limits(shapes, batch_size, budget):
    groups = [group for group, _, _ in shapes]
    prompts = [[group] * 20 + [9 + i] * tokens for i, (group, tokens, _) in enumerate(shapes)]
    responses = [[1] * n for _, _, n in shapes]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    cost = Cost(token=1, square=0, cached=1)
    grouped, alone = find_groups(prompts, responses, groups, range(len(shapes)))
    batches = plan(lengths, grouped, alone, cost, budget * 10, batch_size)
    assert sorted(i for batch in batches for i in batch.pairs) == list(range(len(shapes)))
    for batch in batches:
        assert len(batch.pairs) <= batch_size
        runs = sum(pairs for pairs, _ in batch.shared)
        assert runs in (0, len(batch.pairs))
        fits = bytes_of(batch, lengths, cost) <= budget * 10
        assert fits or len(batch.pairs) == 1 or (len(batch.shared) == 1 and len(batch.pairs) == 1)
        first = 0
        for pairs, shared in batch.shared:
            members = [prompts[i] for i in batch.pairs[first : first + pairs]]
            assert all(len(p) > shared and p[:shared] == members[0][:shared] for p in members)
            first += pairs
