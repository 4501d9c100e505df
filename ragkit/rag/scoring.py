"""Scores many responses with a causal LM: batches under a memory budget, progress, errors that name the question."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ragkit.rag.loading import evaluating
from ragkit.rag.logprob import SharingError, response_logprobs
from ragkit.rag.scoring_plan import Batch, Cost, budget_of, bytes_of, find_groups, plan

# Largest difference of a token's log-prob that two ways of computing it may have before one of them is wrong.
SAME = {torch.bfloat16: 5e-2, torch.float16: 1e-2}

_can_share: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class ScoringError(ValueError):
    """Prompts or responses that cannot be scored, or a model whose scores are no numbers."""


# (numbers of the pairs, their log-probabilities [n]) of a batch that is done
OnBatch = Callable[[Sequence[int], Tensor], None]


def score_responses(
    core: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    *,
    batch_size: int,
    max_length: int | None = None,
    memory_mib: int | None = None,
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    progress: str | None = None,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """log P(response | prompt) of N pairs, in nats, summed over the response's tokens.

    The values do not depend on how the pairs are put into batches, beyond the rounding of the model's own numbers.

    Args:
        core: A transformers causal LM.
        prompts: N lists of token ids, none empty.
        responses: N lists of token ids; an empty one has log-probability 0.
        pad_id: Fills batches up.
        batch_size: Most pairs at once.
        max_length: Most tokens of a pair.
        memory_mib: For one forward pass, by estimate; None: 48 on a CPU, half of what is free on a GPU. Where a GPU
            runs out of memory nonetheless, the batches are halved.
        groups: Of each pair, the number of its question: the beginning that all prompts of a question have in common
            is computed once where that saves a quarter of the work. None: nothing is shared.
        names: What each pair is called in errors.
        progress: Text before a progress bar, which appears after two seconds; None: no bar.
        on_batch: Called after each batch, to keep what is done.

    Returns:
        float64 [N] on the CPU, without gradient.

    Raises:
        ScoringError: An empty or too long prompt, a token that the model has no row for, scores that are not finite.
        torch.OutOfMemoryError: A single pair does not fit into the GPU's memory.
    """
    names = names or [f"prompt and response number {i}" for i in range(len(prompts))]
    check_pairs(core, prompts, responses, names, max_length)
    result = torch.zeros(len(prompts), dtype=torch.float64)
    scored = [i for i, response in enumerate(responses) if response]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    if not scored:
        return result

    def run(batch: Batch) -> Tensor:
        chosen = [prompts[i] for i in batch.pairs], [responses[i] for i in batch.pairs]
        return response_logprobs(core, *chosen, pad_id, batch.shared)

    with torch.no_grad(), evaluating(core), _bar(progress, len(scored)) as bar:
        cost, budget = Cost.of(core), budget_of(core.device, memory_mib)
        grouped, alone = find_groups(prompts, responses, groups, scored)
        if grouped and not _sharing_works(core, grouped, run, responses):
            grouped, alone = [], scored
        waiting = plan(lengths, grouped, alone, cost, budget, batch_size)
        said = False
        while waiting:
            batch = waiting[0]
            values = _unless_out_of_memory(run, batch)
            if values is None:
                budget = bytes_of(batch, lengths, cost) // 2
                left = {i for b in waiting for i in b.pairs}
                grouped = [([i for i in pairs if i in left], shared) for pairs, shared in grouped]
                grouped = [(pairs, shared) for pairs, shared in grouped if pairs]
                waiting = plan(lengths, grouped, [i for i in alone if i in left], cost, budget, batch_size)
                if not said:
                    warnings.warn(
                        f"the GPU ran out of memory with {len(batch.pairs)} pairs at once; going on with half as many "
                        "(set score_memory or score_batch_size to begin with fewer)",
                        stacklevel=3,
                    )
                    said = True
                continue
            del waiting[0]
            check_finite(values, [names[i] for i in batch.pairs], core.dtype)
            result[list(batch.pairs)] = values
            if on_batch is not None:
                on_batch(batch.pairs, values)
            bar.update(len(batch.pairs))
    return result


def _unless_out_of_memory(run: Callable[[Batch], Tensor], batch: Batch) -> Tensor | None:
    """The values of a batch; None if the GPU has no memory for it. With a single pair that is an error."""
    try:
        return run(batch)
    except torch.OutOfMemoryError:
        if len(batch.pairs) == 1:
            raise
    gc.collect()  # not in the handler: there the error still holds on to the memory
    torch.cuda.empty_cache()
    return None


def check_pairs(
    core: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    names: Sequence[str],
    max_length: int | None,
) -> None:
    """Refuses, before anything is computed, pairs that the model cannot score."""
    rows = core.get_input_embeddings().weight.shape[0]
    head = getattr(core.get_output_embeddings(), "out_features", rows)
    for name, prompt, response in zip(names, prompts, responses, strict=True):
        if not prompt:
            raise ScoringError(f"{name}: an empty prompt predicts nothing: a prompt needs at least one token")
        length = len(prompt) + len(response)
        if max_length is not None and length > max_length:
            raise ScoringError(
                f"{name} have {length} tokens, the model has positions for {max_length}; encode the prompt with "
                "reserve=len(response)"
            )
        for ids, known, what in ((prompt, rows, "embeddings"), (response, min(rows, head), "head")):
            if ids and not 0 <= min(ids) <= max(ids) < known:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ScoringError(
                    f"{name}: token {wrong}, but the model's {what} has only the tokens 0..{known - 1}; if tokens "
                    "were added to the tokenizer, call model.resize_token_embeddings(len(tokenizer))"
                )


def check_finite(values: Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """Refuses NaN and infinity, which would spoil a training without a word."""
    wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if wrong:
        advice = (
            "load it as bfloat16 or float32, float16 may overflow" if dtype == torch.float16 else "are they broken?"
        )
        raise ScoringError(
            f"{names[wrong[0]]}: the language model's log-probability is {values[wrong[0]].item()}; its weights "
            f"({str(dtype).removeprefix('torch.')}) give no finite logits here: {advice}"
        )


def _sharing_works(
    core: Any, grouped: Sequence[tuple[list[int], int]], run: Callable[[Batch], Tensor], responses: Sequence[Any]
) -> bool:
    """Whether shared beginnings give what whole prompts give: tried out once for a model, on two questions."""
    if core not in _can_share:
        by_length = sorted(grouped, key=lambda group: group[1])
        tried = [(pairs[:2], shared) for pairs, shared in {id(g): g for g in (by_length[0], by_length[-1])}.values()]
        pairs = tuple(i for group, _ in tried for i in group)
        try:
            found = run(Batch(pairs, tuple((len(group), shared) for group, shared in tried)))
        except torch.OutOfMemoryError:
            raise
        except (SharingError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            _can_share[core] = False  # sliding windows, states, or a forward that takes no cache: no fault
        else:
            wanted = torch.cat([run(Batch((i,))) for i in pairs])
            tokens = torch.tensor([len(responses[i]) for i in pairs])
            difference = ((found - wanted).abs() / tokens).max().item()
            _can_share[core] = not difference > SAME.get(core.dtype, 1e-3)  # NaN is reported by the scoring itself
            if not _can_share[core]:
                warnings.warn(
                    f"{type(core).__name__}: prompts that share their beginning differ by {difference:.2g} nats per "
                    "token from whole ones; each is computed as a whole",
                    stacklevel=4,
                )
    return _can_share[core]


def _bar(text: str | None, total: int) -> Any:
    """A progress bar that appears only where the job takes longer than two seconds."""
    from tqdm.auto import tqdm  # its notebook version looks for widgets when it is imported

    silent = text is None or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    # None: off where the output is no terminal; a notebook counts as one.
    return tqdm(total=total, desc=text, unit="pair", delay=2, disable=True if silent else None, leave=False)
