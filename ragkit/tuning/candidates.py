"""The candidates that LSR trains on at the moment, and the scale of the retriever's scores of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ragkit.lsr_config import LSRConfig
from ragkit.tuning.qa_data import DataError
from ragkit.tuning.teacher import LSRRow

# Mean standard deviation of the cosines of a question's first 8 passages: all-MiniLM-L6-v2, small world, 0.07 with
# two-hop and 0.11 with one-hop questions. A GFM's scores there have 0.51 and 0.36, one of little training 0.05: at
# gamma = 0.05 the P_R of the first would give 99 % to one passage before a step is made.
COSINE_SPREAD = 0.08
SPREAD_QUESTIONS = 256  # questions that the spread is measured on


class Candidates:
    """The rows in force, by question id.

    The data loader reads a batch ahead, so a batch holds ids alone, and its rows are looked up when its loss is
    computed: what `replace` brings holds from the next step on, in a resumed run as in an unbroken one.

    Args:
        rows: One row for each question.

    Raises:
        DataError: An id occurs twice.
    """

    def __init__(self, rows: Sequence[LSRRow]) -> None:
        self.ids = [row.id for row in rows]
        self._rows = {row.id: row for row in rows}
        if len(self._rows) < len(self.ids):
            twice = next(identity for number, identity in enumerate(self.ids) if identity in self.ids[:number])
            raise DataError(f"rows: the question id {twice!r} occurs twice")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> list[LSRRow]:
        """All rows in the order of the questions."""
        return [self._rows[identity] for identity in self.ids]

    def replace(self, rows: Sequence[LSRRow]) -> None:
        """Puts other candidates of the same questions in force.

        Raises:
            DataError: They are of other questions.
        """
        new = {row.id: row for row in rows}
        if new.keys() != self._rows.keys():
            other = sorted(new.keys() ^ self._rows.keys())
            raise DataError(f"the refreshed rows are not of the same questions: {len(other)} differ, as {other[0]!r}")
        self._rows = new

    def batch(self, ids: Sequence[str]) -> dict[str, Any]:
        """The rows of a batch as `LSRModel.forward` takes them."""
        batch = collate([self._rows[identity] for identity in ids])
        del batch["ids"]
        return batch


def collate_ids(ids: Sequence[str]) -> dict[str, Any]:
    """A batch of question ids."""
    return {"ids": list(ids)}


def collate(rows: Sequence[LSRRow]) -> dict[str, Any]:
    """A batch of rows as `LSRModel.forward` takes it, padded to the longest K, with the ids for error messages."""
    width = max(len(row.passage_ids) for row in rows)
    lm_scores = torch.zeros(len(rows), width)  # [B, K]
    mask = torch.zeros(len(rows), width, dtype=torch.bool)  # [B, K]
    for number, row in enumerate(rows):
        lm_scores[number, : len(row.lm_scores)] = torch.tensor(row.lm_scores)
        mask[number, : len(row.lm_scores)] = True
    return {
        "ids": [row.id for row in rows],
        "questions": [row.question for row in rows],
        "passage_ids": [list(row.passage_ids) for row in rows],
        "lm_scores": lm_scores,
        "mask": mask,
    }


def score_scale(retriever: Any, rows: Sequence[LSRRow], config: LSRConfig, batch_size: int = 16) -> float:
    """The constant that brings a retriever's scores to the spread of cosines, so that one gamma serves all.

        P_R = softmax(c · s / gamma),    c = 0.08 / (mean over questions of the standard deviation of s)

    measured once, before the first step, on at most 256 questions spread over the rows. One constant, not a
    standardisation of each question: that would take from the retriever how sure it is of one question against
    another, and from training the means to make it surer. It is for gamma's and the presets' meaning, not for quality:
    LSR of a GFM on the small world (40 steps, two seeds) ended at a held-out recall@1 of .53 with the constant, .54
    without, .54 standardised, from .46; a GFM of little training at .42, .42, .41, from .27.

    Args:
        retriever: A `TrainableRetriever`. Its attribute `cosine_scores`, where it has one, says whether it needs this;
            else scores outside of [-1, 1] do.
        rows: The initial rows.
        config: rescale is read.
        batch_size: Questions scored at once.

    Returns:
        c; 1 for cosines, where `rescale` is off, and where no question's scores differ.
    """
    cosines = getattr(retriever, "cosine_scores", None)
    if config.rescale == "off" or (config.rescale == "auto" and cosines is True) or not rows:
        return 1.0
    sample = rows[:: max(1, len(rows) // SPREAD_QUESTIONS)][:SPREAD_QUESTIONS]
    spreads, largest = [], 0.0
    with torch.no_grad():
        for start in range(0, len(sample), batch_size):
            part = sample[start : start + batch_size]
            scores = retriever.score([row.question for row in part], [row.passage_ids for row in part])  # [B, K]
            for row, values in zip(part, scores.double().cpu(), strict=True):
                own = values[: len(row.passage_ids)]
                spreads.append(float(own.std(correction=0)))
                largest = max(largest, float(own.abs().max()))
    if config.rescale == "auto" and cosines is None and largest <= 1.001:  # a cosine may be 1 and a rounding
        return 1.0
    spread = sum(spreads) / len(spreads)
    return COSINE_SPREAD / spread if spread > 0 else 1.0
