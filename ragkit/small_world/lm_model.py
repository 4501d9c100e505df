"""The tiny LM's tokenizer and its starting point: a plain Llama whose first two layers already know how to copy."""

from __future__ import annotations

import math
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkit.small_world.lm_rows import BOS, EOS, PAD, prompt_text, scene
from ragkit.small_world.synthetic import words

VOCABULARY, HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS = 2048, 128, 4, 4, 344, 1024
ROPE_BASE = 10000.0


def make_tokenizer(seed: int = 5, scenes: int = 5000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on made scenes and on the words of MiniLM's vocabulary.

    No real fact is in its training text.
    """
    rng = random.Random(seed)
    texts = [w.capitalize() for w in words()]
    for _ in range(scenes):
        passages, asked = scene(rng, 1.0)
        texts += [prompt_text(passages, asked[0][0])] + [f"\nQuestion: {q}\nAnswer: {a}" for q, a in asked[1:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """A Llama of about 1.06 million parameters with `teach_copying` done to it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    teach_copying(model, seed)
    return model


@torch.no_grad()
def teach_copying(model: LlamaForCausalLM, seed: int = 1, heads: int = 3, spread: float = 0.05) -> None:
    """Sets the first two layers to an induction circuit, so that training starts with "what came after this before?".

    Layer 0: `heads` heads look one token back (query and key biases whose rotary phase peaks at lag 1) and write what
    they see into their own directions. Layer 1: as many heads match the current token against those directions, on
    the slow rotary dimensions only, and copy the token found. After Olsson et al., "In-context Learning and Induction
    Heads", 2022. The result is a plain Llama checkpoint.
    """
    config = model.config
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    half = head_dim // 2
    generator = torch.Generator().manual_seed(seed)
    angle = ROPE_BASE ** (-torch.arange(half) / half)  # radians a position
    slow = [i for i in range(half) if angle[i] < 0.03]
    dims = slow + [i + half for i in slow]

    def orthonormal(rows: int) -> torch.Tensor:
        q, _ = torch.linalg.qr(torch.randn(hidden, rows, generator=generator))
        return q.T  # [rows, hidden]

    model.model.embed_tokens.weight.normal_(0, spread, generator=generator)
    back, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    written = orthonormal(heads * head_dim)
    for head in range(heads):
        at = slice(head * head_dim, (head + 1) * head_dim)
        size = torch.zeros(half)
        size[:6] = math.sqrt(20)
        back.q_proj.bias[at] = torch.cat([size, torch.zeros(half)])
        back.k_proj.bias[at] = torch.cat([size * torch.cos(angle), size * torch.sin(angle)])
        back.q_proj.weight[at] *= 0.1
        back.k_proj.weight[at] *= 0.1
        seen = orthonormal(head_dim)
        back.v_proj.weight[at] = seen
        back.o_proj.weight[:, at] = written[at].T * spread
        query, key = torch.zeros(head_dim, hidden), torch.zeros(head_dim, hidden)
        query[dims] = seen[: len(dims)]
        key[dims] = written[at][: len(dims)]
        match.q_proj.weight[at] = query * 2.0
        match.k_proj.weight[at] = key * 2.0
        copied = orthonormal(head_dim)
        match.v_proj.weight[at] = copied
        match.o_proj.weight[:, at] = copied.T * spread * 9.0
