"""Log-probabilities of responses under a causal LM, with no logits for the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from ragkit_kernels.linear_logprob import token_logprobs
from torch import Tensor, nn
from transformers import PreTrainedModel

from ragkit.rag.loading import evaluating

# Settings of models whose logits are more than `head(hidden)`: Gemma 2 caps them, Granite, Cohere, MiniCPM and
# Falcon-H1 scale them. The probe below would miss a cap on small logits.
NOT_PLAIN = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "dim_model_base")

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def response_logprobs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Tensor:
    """The log-probability of each response after its prompt, summed over its tokens.

    Args:
        model: A transformers causal LM (adapters inside its layers are fine).
        prompts: B lists of token ids, none empty.
        responses: B lists of token ids.
        pad_id: Fills the batch up on the right, where a causal model never looks back from.

    Returns:
        float32 [B], in nats; differentiable where gradients are on.
    """
    if not all(prompts):
        raise ValueError("an empty prompt predicts nothing: a prompt needs at least one token")
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(lengths)
    ids = torch.full((len(prompts), width), pad_id)  # [B, T]
    mask = torch.zeros_like(ids)
    rows: list[int] = []  # of each response token: its row,
    positions: list[int] = []  # and the position that predicts it, one to the left of its own
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
        mask[row, : lengths[row]] = 1
        rows += [row] * len(response)
        positions += range(len(prompt) - 1, lengths[row] - 1)
    device = model.device
    ids, mask = ids.to(device), mask.to(device)
    row_index, position = (
        torch.tensor(rows, device=device).long(),
        torch.tensor(positions, device=device).long(),
    )  # [N]
    targets = ids[row_index, position + 1]  # [N]
    if has_plain_head(model):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # [B, T, D]
        head = model.get_output_embeddings()
        chosen = hidden[row_index, position]  # [N, D]
        logprobs = token_logprobs(chosen, head.weight, targets, bias=getattr(head, "bias", None))
    else:
        # Only the logits from the first needed position on, where the model can leave the others out.
        start = min(positions, default=0)
        keep = torch.arange(start, width, device=device)
        accepts = "logits_to_keep" in inspect.signature(model.forward).parameters
        extra = {"logits_to_keep": keep} if accepts else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits  # [B, width - start, V]
        if logits.shape[1] == width:
            start = 0
        chosen = logits[row_index, position - start].float()  # [N, V]
        logprobs = torch.log_softmax(chosen, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return torch.zeros(len(prompts), device=device).index_add(0, row_index, logprobs.float())


def has_plain_head(model: PreTrainedModel) -> bool:
    """True if the model's logits are its output embeddings applied to its base model's last hidden state.

    Decided by the configuration, then, once for a model, by comparing both on a few tokens.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in NOT_PLAIN):
        return False
    # An adapter on the head replaces it with a layer that adds to the product: no longer one weight.
    if type(head) is not nn.Linear or model.base_model is model:
        return False
    if model not in _plain:
        _plain[model] = _probe(model, head)
    return _plain[model]


@torch.no_grad()
def _probe(model: PreTrainedModel, head: nn.Linear) -> bool:
    ids = torch.arange(8, device=model.device).unsqueeze(0) % head.weight.shape[0]
    with evaluating(model):
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        logits = model(input_ids=ids, use_cache=False).logits
    if hidden is None or hidden.shape[-1] != head.weight.shape[1]:
        return False
    return torch.allclose(head(hidden).float(), logits.float(), rtol=1e-3, atol=1e-3)
