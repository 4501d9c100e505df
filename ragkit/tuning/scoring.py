"""LM scores of passages: how likely the language model finds the right response after each passage alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ragkit.config import LSRConfig
from ragkit.notes import note
from ragkit.processes import is_first
from ragkit.rag.lm_digest import lm_digest
from ragkit.tuning.qa_data import DataError, QAExample
from ragkit.tuning.score_cache import ScoreCache, pair_key

FOLDER = "lm_scores"


def score_passages(
    generator: Any, pairs: Sequence[tuple[QAExample, Sequence[Any]]], config: LSRConfig, at_once: bool = False
) -> list[list[float]]:
    """log p_LM(response | question, passage) for each passage alone: a prompt holds one passage.

    Prompt and response are joined as token ids, and only the response's tokens count. Pairs that this language model
    has scored before are read from `config.score_cache`; each batch is kept there as soon as it is done.

    Args:
        generator: A `Generator`; its weights are not changed and get no gradient.
        pairs: N questions, each with its candidate passages.
        config: prompt, include_eos, score ("logprob" or "mean_logprob"), score_batch_size, score_memory, score_cache
            and output_dir are read.
        at_once: Keeps the scores when all are made, in place of batch by batch. A scoring that was killed then begins
            again with the same batches, and ends with the same last bits: they depend on what a batch is padded to.

    Returns:
        N lists with one score in nats per passage: the sum over the response's tokens ("logprob"), or their mean.

    Raises:
        DataError: A response has no token (with its EOS token alone it would be scored for saying nothing).
        ScoringError: The language model's numbers are not finite, or it lacks a token; the message names the question.
    """
    prompts, responses, owners, names = [], [], [], []
    for number, (example, found) in enumerate(pairs):
        if has_no_token(generator, example):
            raise DataError(
                f"question {example.id!r}: its answer {example.answer!r} has no token; leave the question out, or "
                "correct the answer"
            )
        response = generator.encode_response(example.answer, eos=config.include_eos, template=config.prompt)
        for passage in found:
            # The response's room is set aside first: a long passage is cut, never what is scored.
            prompts.append(generator.encode_prompt(config.prompt, example.question, [passage], reserve=len(response)))
            responses.append(response)
            owners.append(number)
            names.append(f"question {example.id!r}, passage {getattr(passage, 'id', passage)!r}: prompt and response")
    folder = cache_folder(config)
    if folder is None:
        sums = _score(generator, prompts, responses, owners, names, config, None, at_once)
    else:
        with ScoreCache(folder, lm_digest(generator.model)) as cache:
            sums = _score(generator, prompts, responses, owners, names, config, cache, at_once)
        if cache.read and is_first():
            note(f"{cache.read} LM scores were read from {cache.path}")
    scores: list[list[float]] = [[] for _ in pairs]
    for owner, value, response in zip(owners, sums, responses, strict=True):
        scores[owner].append(value / len(response) if config.score == "mean_logprob" else value)
    return scores


def has_no_token(generator: Any, example: QAExample) -> bool:
    """Whether there is nothing in a response but the EOS token and what stands before every response."""
    return not generator.tokenizer(example.answer.strip(), add_special_tokens=False)["input_ids"]


def cache_folder(config: LSRConfig) -> Path | None:
    """Where LM scores are kept; None if they are not."""
    if config.score_cache == "auto":
        return Path(config.output_dir) / FOLDER
    return None if config.score_cache is None else Path(config.score_cache)


def _score(
    generator: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    owners: Sequence[int],
    names: Sequence[str],
    config: LSRConfig,
    cache: ScoreCache | None,
    at_once: bool,
) -> list[float]:
    """The sums of the log-probabilities, from the cache where it has them."""
    keys = [pair_key(p, r) for p, r in zip(prompts, responses, strict=True)] if cache is not None else []
    known = cache.get(list(dict.fromkeys(keys))) if cache is not None else {}
    # A pair that is there twice (the same passage under two ids) is scored once.
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
    missing = sorted(first.values()) if cache is not None else list(range(len(prompts)))
    sums = {i: known[key][0] for i, key in enumerate(keys) if key in known}

    def keep(batch: Sequence[int], values: Tensor) -> None:
        done = [missing[i] for i in batch]
        sums.update(zip(done, values.tolist(), strict=True))
        if cache is not None and not at_once:
            cache.put([keys[i] for i in done], values.tolist(), [len(responses[i]) for i in done])

    if missing:
        generator.sequence_logprob(
            [prompts[i] for i in missing],
            [responses[i] for i in missing],
            batch_size=config.score_batch_size,
            memory_mib=config.score_memory,
            groups=[owners[i] for i in missing],
            names=[names[i] for i in missing],
            progress="LM scores",
            on_batch=keep,
        )
        if cache is not None and at_once:
            cache.put([keys[i] for i in missing], [sums[i] for i in missing], [len(responses[i]) for i in missing])
    return [sums[i] if i in sums else sums[first[keys[i]]] for i in range(len(prompts))]
