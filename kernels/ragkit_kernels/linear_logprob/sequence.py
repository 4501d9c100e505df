"""Log-probabilities of whole sequences: the tokens' ones, summed or averaged in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ragkit_kernels.linear_logprob.op import token_logprobs

MEMBERS = 2**24
"""Entries of the [sequences, tokens] table that says which token is whose, at once, where lengths are on a GPU."""


def sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lengths: Sequence[int] | Tensor,
    positions: Tensor | None = None,
    *,
    reduction: str = "sum",
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Log-probability of each of S sequences of tokens, whose T rows stand one after the other.

        log p(y | x) = Σ_i log p(y_i | x, y_<i)         "sum"
        the same divided by its number of tokens        "mean"; ignored tokens are not counted

    Args:
        hidden, weight, targets, positions, ignore_index: As in `token_logprobs`.
        lengths: Tokens of each sequence, S numbers >= 0 with the sum T: a list, or an int64 tensor [S]. One on a GPU
            is not waited for; where its sum is not T, all results are NaN.
        reduction: "sum" or "mean".
        **options: bias, logit_scale, softcap, temperature, chunk_rows, backend of `token_logprobs`.

    Returns:
        [S] in nats, float32 (float64 for float64 inputs); 0 for a sequence without tokens. Differentiable, and the
        same bits in every run.

    Raises:
        ValueError: As `token_logprobs`; lengths that do not sum up to T or are negative; an unknown reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be one of sum, mean; found {reduction!r}")
    T = targets.shape[0]
    on_host = not isinstance(lengths, Tensor) or lengths.device.type == "cpu"
    if on_host:
        lengths = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if any(n < 0 for n in lengths) or sum(lengths) != T:
            raise ValueError(
                f"lengths must be at least 0 and sum up to the {T} targets; found {_shown(lengths)} "
                f"with the sum {sum(lengths)}"
            )
    logprobs = token_logprobs(hidden, weight, targets, positions, ignore_index=ignore_index, **options)  # [T]
    counted = (targets != ignore_index).to(logprobs.dtype) if reduction == "mean" else None
    if isinstance(lengths, Tensor):
        sums = _by_membership(logprobs, lengths)
        return sums if counted is None else sums / _by_membership(counted, lengths).clamp(min=1)
    place = _padding(lengths, logprobs.device)
    sums = _padded_sum(logprobs, place)
    return sums if counted is None else sums / _padded_sum(counted, place).clamp(min=1)


def _shown(lengths: Sequence[int]) -> str:
    return str(list(lengths)) if len(lengths) <= 10 else f"{len(lengths)} numbers"


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[S, L] row numbers of the tokens of each sequence; T, one beyond the last, as filler."""
    S, L, T = len(lengths), max(lengths, default=0), sum(lengths)
    length = torch.tensor(lengths, dtype=torch.long).reshape(S, 1)
    step = torch.arange(L).reshape(1, L)
    begin = length.cumsum(0) - length
    return torch.where(step < length, begin + step, T).to(device, non_blocking=True)


def _padded_sum(values: Tensor, place: Tensor) -> Tensor:
    """[S] sums of values [T] along the rows of `place`. Each value is read once: its gradient needs no adding up."""
    zero = values.new_zeros(1)
    return torch.cat([values, zero])[place].sum(-1)


def _by_membership(values: Tensor, lengths: Tensor) -> Tensor:
    """[S] sums of values [T] for lengths on a GPU, whose largest is not known here: a row of T entries each."""
    T, S = values.shape[0], lengths.shape[0]
    end = lengths.cumsum(0)  # [S]
    row = torch.arange(T, device=values.device)
    sums = []
    step = max(1, MEMBERS // max(T, 1))
    for s in range(0, S, step):
        last = end[s : s + step].unsqueeze(1)  # [S, 1]
        first = last - lengths[s : s + step].unsqueeze(1)
        sums.append(torch.where((row >= first) & (row < last), values, 0.0).sum(-1))  # [S, T] -> [S]
    found = torch.cat(sums) if sums else values[:0]
    return torch.where((lengths.sum() == T) & (lengths >= 0).all(), found, torch.nan)
