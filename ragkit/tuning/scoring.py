"""LM scores of passages: how likely the language model finds the right response after each passage alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragkit.config import LSRConfig
from ragkit.tuning.qa_data import QAExample


def score_passages(
    generator: Any, pairs: Sequence[tuple[QAExample, Sequence[Any]]], config: LSRConfig
) -> list[list[float]]:
    """log p_LM(response | question, passage) for each passage alone: a prompt holds one passage.

    Args:
        generator: A `Generator`; its weights are not changed and get no gradient.
        pairs: N questions, each with its candidate passages.
        config: prompt, include_eos, score_batch_size and score are read.

    Returns:
        N lists with one score in nats per passage: the sum over the response's tokens ("logprob"), or their mean.
    """
    prompts, responses, owners = [], [], []
    for number, (example, found) in enumerate(pairs):
        response = generator.encode_response(example.answer, eos=config.include_eos, template=config.prompt)
        for passage in found:
            # The response's room is set aside first: a long passage is cut, never what is scored.
            prompts.append(generator.encode_prompt(config.prompt, example.question, [passage], reserve=len(response)))
            responses.append(response)
            owners.append(number)
    sums = generator.sequence_logprob(prompts, responses, batch_size=config.score_batch_size).tolist()
    scores: list[list[float]] = [[] for _ in pairs]
    for owner, value, response in zip(owners, sums, responses, strict=True):
        scores[owner].append(value / len(response) if config.score == "mean_logprob" else value)
    return scores
