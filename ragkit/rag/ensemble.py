"""Answers from several passages, each in a prompt of its own: the ensemble of REPLUG and RA-DIT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class EnsembleProcessor(LogitsProcessor):
    r"""Mixes the next-token distributions of all prompts of a question, so that they go on as one.

        p(y_t | q, y_<t) = Σ_d P_R(d | q) · p_LM(y_t | d, q, y_<t)

    (REPLUG, Shi et al. 2023, arXiv:2301.12652, section 3.2; RA-DIT, Lin et al. 2023, arXiv:2310.01352, section 2.1.)
    Every row of a question gets the same scores, so that greedy decoding gives all of them the same token.

    Args:
        weights: For each question P_R of its passages, in the order of the rows.
        device: Where the model is.
    """

    def __init__(self, weights: Sequence[Sequence[float]], device: torch.device) -> None:
        self.sizes = [len(shares) for shares in weights]  # rows of each question
        self.first_rows = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        flat = torch.tensor([share for shares in weights for share in shares], dtype=torch.float32)
        self.log_weights = flat.log().to(device).unsqueeze(1)  # [rows, 1]
        self.owners = torch.arange(len(weights)).repeat_interleave(torch.tensor(self.sizes)).to(device)  # [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, V] logits -> [rows, V] mixed log-probabilities."""
        weighted = torch.log_softmax(scores.float(), dim=-1) + self.log_weights  # [rows, V]
        mixed = torch.stack([part.logsumexp(0) for part in weighted.split(self.sizes)])  # [Q, V]
        return mixed[self.owners]  # [rows, V]


def passage_weights(passages: Sequence[Any], gamma: float) -> list[float]:
    """P_R(d | q) = softmax(score / gamma) over the passages; equal weights where one of them has no score.

    Args:
        passages: Strings or passages, with `.score` where they were retrieved.
        gamma: Temperature, in units of the score.
    """
    scores = [getattr(passage, "score", None) for passage in passages]
    if any(score is None for score in scores):
        return [1 / len(scores)] * len(scores)
    return torch.tensor(scores, dtype=torch.float64).div(gamma).softmax(0).tolist()


def ensemble_batches(
    prompts: Sequence[Sequence[Sequence[int]]], weights: Sequence[Sequence[float]], batch_size: int
) -> list[list[int]]:
    """Which questions go through the model together, longest first: at most `batch_size` prompts, or one question.

    Raises:
        ValueError: A question without a prompt, or with another number of weights.
    """
    for number, (own, shares) in enumerate(zip(prompts, weights, strict=True)):
        if not own or len(own) != len(shares):
            raise ValueError(f"question number {number} has {len(own)} prompts and {len(shares)} weights")
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(prompts)), key=lambda i: -max(map(len, prompts[i]))):
        if len(prompts[i]) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= len(prompts[i])
    return batches
