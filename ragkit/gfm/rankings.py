"""Where the wanted items stand in the rankings of all questions, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ragkit.gfm.rankers import rank
from ragkit.metrics import all_at_k, filtered_hits_at_k, filtered_mrr, filtered_ranks, recall_at_k


@dataclass
class Rankings:
    """What is kept of the scores of all questions: lists as long as k and as the golds, no row of scores.

    Attributes:
        k: Length of `top`.
        top: The k best ids of each question, best first.
        gold: Ids that were wanted.
        filtered: Filtered rank of each of these.
        first: True rank of the first of these; nan without any.
    """

    k: int
    top: list[list[int]] = field(default_factory=list)
    gold: list[set[int]] = field(default_factory=list)
    filtered: list[np.ndarray] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add(self, what: str, ids: Sequence[str], scores: Tensor, width: int, gold: Sequence[Tensor]) -> None:
        """Takes in a batch: scores [B, width], and B lists of ids that are wanted."""
        if tuple(scores.shape) != (len(ids), width):
            raise ValueError(f"{what}: expected [{len(ids)}, {width}] scores, found {list(scores.shape)}")
        scores = scores if scores.dtype == torch.float64 else scores.float()
        bad = scores.isnan().any(1)
        if bad.any():
            raise ValueError(f"{what}: the scores of question {ids[int(bad.nonzero()[0])]!r} hold NaN")
        self.top += rank(scores, self.k)[1].tolist()
        for row, wanted in zip(scores.cpu().numpy(), gold, strict=True):
            places = np.unique(wanted.cpu().numpy())
            self.gold.append(set(places.tolist()))
            self.filtered.append(filtered_ranks(row, places))
            self.first.append(first_rank(row, places))

    def values(self, kind: str, ks: Sequence[int]) -> dict[str, np.ndarray]:
        """The metrics by name, one array [questions] each."""
        cuts = sorted(set(ks))
        return {
            **{f"{kind}_recall@{k}": recall_at_k(self.top, self.gold, k) for k in cuts},
            **{f"{kind}_all@{k}": all_at_k(self.top, self.gold, k) for k in cuts},
            f"{kind}_mrr": 1.0 / np.array(self.first),
            **{f"{kind}_filtered_hits@{k}": filtered_hits_at_k(self.filtered, k) for k in cuts},
            f"{kind}_filtered_mrr": filtered_mrr(self.filtered),
        }


def first_rank(scores: np.ndarray, gold: np.ndarray) -> float:
    """Rank of the best gold item (ascending places) in the whole ranking; of equal items the lower places first."""
    if not len(gold):
        return float("nan")
    best = int(gold[scores[gold].argmax()])  # argmax takes the first, so the lowest place
    return 1.0 + np.count_nonzero(scores > scores[best]) + np.count_nonzero(scores[:best] == scores[best])
