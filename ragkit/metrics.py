"""Metrics of retrieval and answers: pure functions, one value a question."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Collection, Iterable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ---- retrieval: one value a question ----


def recall_at_k(retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int) -> np.ndarray:
    """Share of the relevant passages that are among the first k.

    Args:
        retrieved: Passage ids of each question, best first (an id twice counts once).
        relevant: Ids of the supporting passages of each question.
        k: Cut-off, 1 or more.

    Returns:
        [B] values in 0..1; nan for a question without a relevant passage.
    """
    hits, sizes = _hits(retrieved, relevant, k)
    return _divide(hits.sum(axis=1), sizes)


def all_at_k(retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int) -> np.ndarray:
    """1 where every relevant passage is among the first k, else 0 (nan without a relevant passage); [B]."""
    recall = recall_at_k(retrieved, relevant, k)
    return np.where(np.isnan(recall), np.nan, recall == 1.0)


def mrr(retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int | None = None) -> np.ndarray:
    """1 / rank of the first relevant passage, 0 if none is there (within the first k); nan without any; [B]."""
    hits, sizes = _hits(retrieved, relevant, k)
    ranks = np.arange(1, hits.shape[1] + 1)  # [K]
    best = (hits / ranks).max(axis=1, initial=0.0)  # [B, K] -> [B]
    return np.where(sizes > 0, best, np.nan)


def ndcg_at_k(retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int) -> np.ndarray:
    """DCG@k / ideal DCG@k with relevance 0 or 1: sum of 1 / log2(1 + rank) over the hits; nan without any; [B]."""
    hits, sizes = _hits(retrieved, relevant, k)
    gains = 1.0 / np.log2(np.arange(2, max(k, hits.shape[1]) + 2))  # [K]
    ideal = np.concatenate([[0.0], np.cumsum(gains)])[np.minimum(sizes, k)]  # [B]
    return _divide(hits @ gains[: hits.shape[1]], ideal)


def _hits(
    retrieved: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], k: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """[B, K] whether the passage at that rank is relevant (and not seen before), and [B] how many are relevant."""
    if len(retrieved) != len(relevant):
        raise ValueError(f"retrieved has {len(retrieved)} questions, relevant has {len(relevant)}")
    if k is not None and k < 1:
        raise ValueError(f"k: found {k}, expected 1 or more")
    width = max((len(row) for row in retrieved), default=0)
    width = width if k is None else min(width, k)
    hits = np.zeros((len(retrieved), width))
    for i, (row, wanted) in enumerate(zip(retrieved, relevant, strict=True)):
        left = set(wanted)
        for rank, passage in enumerate(row[:width]):
            if passage in left:
                left.discard(passage)
                hits[i, rank] = 1.0
    return hits, np.array([len(set(wanted)) for wanted in relevant], dtype=np.int64)


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.full(len(by), np.nan), where=by > 0)


# ---- answers ----


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles (a, an, the), single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: str | Iterable[str]) -> float:
    """1.0 if the prediction equals one of the accepted answers in SQuAD's normal form, else 0.0."""
    wanted = normalize_answer(prediction)
    return float(any(normalize_answer(gold) == wanted for gold in _texts(golds)))


def f1(prediction: str, golds: str | Iterable[str]) -> float:
    """Best harmonic mean of word precision and recall over the accepted answers, in SQuAD's normal form, 0..1."""
    words = normalize_answer(prediction).split()
    return max((_f1(words, normalize_answer(gold).split()) for gold in _texts(golds)), default=0.0)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((collections.Counter(words) & collections.Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))


def _texts(golds: str | Iterable[str]) -> Iterable[str]:
    return [golds] if isinstance(golds, str) else golds
