"""Metrics of retrieval and answers: pure functions, one value a question."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ---- retrieval: one value a question ----


def recall_at_k(
    retrieved: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int
) -> np.ndarray:
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


def all_at_k(retrieved: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int) -> np.ndarray:
    """1 where every relevant passage is among the first k, else 0 (nan without a relevant passage); [B]."""
    recall = recall_at_k(retrieved, relevant, k)
    return np.where(np.isnan(recall), np.nan, recall == 1.0)


def mrr(
    retrieved: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int | None = None
) -> np.ndarray:
    """1 / rank of the first relevant passage, 0 if none is there (within the first k); nan without any; [B]."""
    hits, sizes = _hits(retrieved, relevant, k)
    ranks = np.arange(1, hits.shape[1] + 1)  # [K]
    best = (hits / ranks).max(axis=1, initial=0.0)  # [B, K] -> [B]
    return np.where(sizes > 0, best, np.nan)


def ndcg_at_k(retrieved: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int) -> np.ndarray:
    """DCG@k / ideal DCG@k with relevance 0 or 1: sum of 1 / log2(1 + rank) over the hits; nan without any; [B]."""
    hits, sizes = _hits(retrieved, relevant, k)
    gains = 1.0 / np.log2(np.arange(2, max(k, hits.shape[1]) + 2))  # [K]
    ideal = np.concatenate([[0.0], np.cumsum(gains)])[np.minimum(sizes, k)]  # [B]
    return _divide(hits @ gains[: hits.shape[1]], ideal)


def _hits(
    retrieved: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]], k: int | None
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


# ---- filtered ranks: gold items do not compete with each other ----


def filtered_ranks(scores: np.ndarray | Sequence[float], gold: Iterable[int]) -> np.ndarray:
    """Rank of each gold item of one question among the items that are not gold.

        rank(g) = 1 + #{i not gold: s_i > s_g} + #{i not gold: s_i = s_g} / 2

    Knowledge-graph completion ranks like this (Bordes et al. 2013), and so does GFM-RAG v1. `filtered_hits_at_k` of
    these ranks is its hits@k, and by its code also what it publishes as R@k; it is no recall, since gold items do not
    push each other down. With gold at places 1 and 3 of the ranking recall@2 is 0.5, and filtered hits@2 is 1.

    An equal item counts half: the mean rank if ties are broken at random ("realistic" rank, Berrendorf et al. 2020,
    arXiv:2002.06914). v1 breaks them as its sort happens to. A rank of 1.5 is no hit at 1.

    Args:
        scores: [N], higher is better.
        gold: Places of the gold items; one that is there twice counts once.

    Returns:
        [P] float64, in the order of `gold`.

    Raises:
        ValueError: A place outside 0 ... N - 1, or NaN scores, which have no order.
    """
    row = np.asarray(scores)
    if row.ndim != 1:
        raise ValueError(f"scores: expected one row [N], found {list(row.shape)}")
    places = np.array(list(dict.fromkeys(int(place) for place in gold)), dtype=np.int64)
    wrong = places[(places < 0) | (places >= len(row))]
    if len(wrong):
        raise ValueError(f"gold: place {wrong[0]} is not in 0 ... {len(row) - 1}")
    if np.isnan(row).any():
        raise ValueError(f"scores: place {int(np.isnan(row).argmax())} is NaN, which cannot be ranked")
    others = np.delete(row, places)
    counts = [np.count_nonzero(others > s) + np.count_nonzero(others == s) / 2 for s in row[places]]
    return 1.0 + np.array(counts, dtype=np.float64)


def filtered_hits_at_k(ranks: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Share of the gold items whose filtered rank is k or better: GFM-RAG v1's hits@k.

    Args:
        ranks: `filtered_ranks` of each question.
        k: Cut-off, 1 or more.

    Returns:
        [B] values in 0..1; nan for a question without a gold item.
    """
    if k < 1:
        raise ValueError(f"k: found {k}, expected 1 or more")
    return _means(ranks, lambda row: row <= k)


def filtered_mrr(ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of 1 / filtered rank over all gold items (v1's mrr; `mrr` looks at the first one only); arguments and
    result as in `filtered_hits_at_k`."""
    return _means(ranks, lambda row: 1.0 / row)


def _means(ranks: Sequence[np.ndarray], value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.array([value(row).mean() if len(row) else np.nan for row in ranks], dtype=np.float64)


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
