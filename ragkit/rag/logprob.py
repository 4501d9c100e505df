"""Log-probabilities of responses under a causal LM: one forward pass, and no logits for the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ragkit.rag.lm_head import core_of, hidden_states, read_head

try:  # of transformers 4.54 and later; without it nothing is shared
    from transformers.cache_utils import DynamicLayer
except ImportError:  # pragma: no cover
    DynamicLayer = None  # type: ignore[assignment,misc]


class SharingError(RuntimeError):
    """A model whose prompts cannot share the computation of their beginning."""


def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    shared: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """The log-probability of each response after its prompt, summed over its tokens.

    Args:
        model: A transformers causal LM (adapters inside its layers are fine).
        prompts: B lists of token ids, none empty.
        responses: B lists of token ids.
        pad_id: Fills the batch up on the right, where a causal model never looks back from.
        shared: Runs of pairs whose prompts begin alike, as (pairs, tokens that they share): the beginning of each run
            is computed once. The runs make up the batch, and at least one token of each prompt stands after it. ():
            nothing is shared.

    Returns:
        float64 [B], in nats; differentiable where gradients are on.

    Raises:
        SharingError: `shared` is given, and the model keeps no plain key-value cache (sliding windows, states).
    """
    of_row, logprobs = response_token_logprobs(model, prompts, responses, pad_id, shared)
    # In double precision and one after the other: the sum of a long response, the same in every batch. Not every
    # accelerator has float64, so it is made on the CPU.
    return torch.zeros(len(prompts), dtype=torch.float64).index_add(0, of_row, logprobs.cpu().double())


def response_token_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    shared: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """The log-probability of each token of each response; arguments and errors as of `response_logprobs`.

    Returns:
        The row of each of the N tokens, int64 [N] on the CPU, and its log-probability, float32 [N].
    """
    if not all(prompts):
        raise ValueError("an empty prompt predicts nothing: a prompt needs at least one token")
    device = model.device
    starts = [tokens for pairs, tokens in shared for _ in range(pairs)] or [0] * len(prompts)
    # The last token of a response predicts nothing that is asked for.
    tails = [[*p[start:], *r[:-1]] for p, r, start in zip(prompts, responses, starts, strict=True)]
    ids, mask = _padded(tails, pad_id)  # [B, T]
    rows: list[int] = []  # of each response token: its row,
    positions: list[int] = []  # and the position that predicts it, one to the left of its own
    for number, (prompt, response, start) in enumerate(zip(prompts, responses, starts, strict=True)):
        rows += [number] * len(response)
        positions += range(len(prompt) - start - 1, len(prompt) - start - 1 + len(response))
    of_row, position = torch.tensor(rows).long(), torch.tensor(positions).long()  # [N]
    targets = torch.tensor([token for response in responses for token in response]).long()  # [N]
    width = ids.shape[1]
    ids, mask, targets = ids.to(device), mask.to(device), targets.to(device)
    options: dict[str, Any] = {"attention_mask": mask}
    if shared:
        options = _after_beginnings(model, prompts, shared, starts, pad_id, mask)
    head = read_head(model)
    if head is not None:
        hidden = hidden_states(model, ids, **options)  # [B, T, D]
        place = (of_row * width + position).to(device)  # [N]
        logprobs = head.token_logprobs(hidden.flatten(0, 1), targets, place)  # [N]
    else:
        # Only the logits from the first needed position on, where the model can leave the others out.
        first = min(positions, default=0)
        if "logits_to_keep" in inspect.signature(core_of(model).forward).parameters:
            options["logits_to_keep"] = torch.arange(first, width, device=device)
        options.setdefault("use_cache", False)
        logits = model(input_ids=ids, **options).logits  # [B, width - first, V]
        place = (of_row * logits.shape[1] + position - (width - logits.shape[1])).to(device)  # [N]
        logprobs = torch.log_softmax(logits.flatten(0, 1)[place].float(), dim=-1)  # [N, V]
        logprobs = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1)  # [N]
    return of_row, logprobs


def _padded(lists: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T] each, filled up on the right."""
    width = max(map(len, lists))
    ids, mask = torch.full((len(lists), width), pad_id), torch.zeros(len(lists), width, dtype=torch.long)
    for number, tokens in enumerate(lists):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, : len(tokens)] = 1
    return ids, mask


def _after_beginnings(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    shared: Sequence[tuple[int, int]],
    starts: Sequence[int],
    pad_id: int,
    mask: Tensor,
) -> dict[str, Any]:
    """Runs each beginning once; returns the arguments that let the rest of the prompts follow them.

    Beginnings of different length are padded on the right, so that in a row's cache a gap may stand between its
    beginning and its rest. The mask hides it, and positions are given, not counted from the cache.
    """
    first = 0
    beginnings = []
    for pairs, tokens in shared:
        beginnings.append(list(prompts[first][:tokens]))
        first += pairs
    ids, begun = (tensor.to(mask.device) for tensor in _padded(beginnings, pad_id))  # [G, P]
    body = core_of(model).base_model
    cache = getattr(body(input_ids=ids, attention_mask=begun, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if type(cache) is not DynamicCache or not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise SharingError("the model keeps no plain key-value cache")
    run = torch.tensor([number for number, (pairs, _) in enumerate(shared) for _ in range(pairs)], device=mask.device)
    cache.batch_select_indices(run)  # [G, ...] -> [B, ...]
    options = {"attention_mask": torch.cat([begun[run], mask], 1), "past_key_values": cache, "use_cache": True}
    if "position_ids" in inspect.signature(body.forward).parameters:
        start = torch.tensor(starts, device=mask.device).unsqueeze(1)  # [B, 1]
        # Counted by the mask: padding stays where the row ended, within the positions that the model has.
        options["position_ids"] = start + (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    return options
