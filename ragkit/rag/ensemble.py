"""Answers from several passages, each in a prompt of its own: the ensemble of REPLUG and RA-DIT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ragkit.rag.loading import evaluating
from ragkit.rag.logprob import response_token_logprobs
from ragkit.rag.scoring import check_finite, check_pairs


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

    Raises:
        ValueError: Scores that have no softmax (NaN, infinity).
    """
    scores = [getattr(passage, "score", None) for passage in passages]
    if any(score is None for score in scores):
        return [1 / len(scores)] * len(scores)
    weights = torch.tensor(scores, dtype=torch.float64).div(gamma).softmax(0)
    if weights.isnan().any():
        raise ValueError(f"the passages have the scores {scores}, finite ones are needed: are the embeddings broken?")
    return weights.tolist()


def ensemble_batches(
    prompts: Sequence[Sequence[Sequence[int]]], weights: Sequence[Sequence[float]], batch_size: int
) -> list[list[int]]:
    """Which questions go through the model together, longest first: at most `batch_size` prompts, or one question.

    Raises:
        ValueError: A question without a prompt, or with another number of weights, or weights that are no shares.
    """
    for number, (own, shares) in enumerate(zip(prompts, weights, strict=True)):
        if not own or len(own) != len(shares):
            raise ValueError(f"question number {number} has {len(own)} prompts and {len(shares)} weights")
        if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-3):  # NaN is neither
            raise ValueError(
                f"question number {number} has the weights {list(shares)}: none may be below 0, and they add up to 1"
            )
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(prompts)), key=lambda i: -max(map(len, prompts[i]))):
        if len(prompts[i]) > room:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= len(prompts[i])
    return batches


def ensemble_logprob(
    generator: Any,
    prompts: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[float]],
    responses: Sequence[Sequence[int]],
) -> Tensor:
    r"""log p(y | q) = Σ_t log Σ_d P_R(d | q) · p_LM(y_t | d, q, y_<t): how likely the ensemble answers so, in nats.

    exp(-log p / number of tokens) is the perplexity of the answer. No logits of a prompt are made.

    Args:
        generator: A `Generator`.
        prompts: For each question its prompts as token ids, one a passage.
        weights: For each question the weight of each prompt (`passage_weights`), adding up to 1.
        responses: For each question the answer's token ids, from `Generator.encode_response`.

    Returns:
        float64 [number of questions] on the CPU, without gradient. An empty response has log-probability 0.

    Raises:
        ValueError: A question without a prompt, or with another number of weights.
        ScoringError: Pairs that are too long or have unknown tokens, or scores that are not finite.
    """
    core, result = generator.core, torch.zeros(len(prompts), dtype=torch.float64)
    batches = ensemble_batches(prompts, weights, generator.batch_size)
    for number, (own, response) in enumerate(zip(prompts, responses, strict=True)):
        names = [f"question number {number}, prompt number {k}: prompt and response" for k in range(len(own))]
        check_pairs(core, own, [response] * len(own), names, generator.max_length)
    with torch.no_grad(), evaluating(core):
        for batch in batches:
            asked = [prompt for i in batch for prompt in prompts[i]]
            answers = [responses[i] for i in batch for _ in prompts[i]]
            logprobs = response_token_logprobs(core, asked, answers, generator.pad_id)[1].cpu().double()
            start = 0
            for i in batch:
                shape = len(prompts[i]), len(responses[i])
                each = logprobs[start : start + shape[0] * shape[1]].view(shape)  # [K, T]
                shares = torch.tensor(weights[i], dtype=torch.float64).log().unsqueeze(1)  # [K, 1]
                result[i] = (each + shares).logsumexp(0).sum()
                start += each.numel()
            check_finite(result[batch], [f"question number {i}" for i in batch], core.dtype)
    return result
