"""Losses on documents: what fine-tuning is about, said to the model directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.gfm.losses import LIST_EPS
from ragkit.gfm.rankers import Incidence


def document_scores(logits: Tensor, incidence: Incidence, kind: str) -> Tensor:
    """Scores of documents with gradient.

    Args:
        logits: [B, N] of the entities.
        incidence: Which entities each document tells of; on the logits' device.
        kind: "score_weighted_idf", Σ σ(z) / df over a document's entities (0 or more), or "simple", Σ z (v1's).

    Returns:
        [B, docs].
    """
    if kind == "simple":
        return incidence.sum(logits)
    if kind == "score_weighted_idf":
        return incidence.sum(logits.sigmoid() * incidence.idf.to(logits))
    raise ValueError(f"kind: found {kind!r}, expected score_weighted_idf or simple")


def share_loss(scores: Tensor, target: Sequence[Tensor]) -> Tensor:
    """List-wise cross-entropy of scores that are 0 or more: the supporting documents' shares of all scores.

        row = −(1 / P) Σ_{supporting d} log(s_d / (Σ_d' s_d' + 1e-5) + 1e-5)

    It is `listce_loss` with the document score in the place of the sigmoid, so a ranker by those scores is trained on
    what it will be asked for. Rows without a target have no part; if no row has one the loss is 0.

    Args:
        scores: [B, docs], 0 or more.
        target: B lists of document ids.

    Returns:
        The mean over rows with a target; scalar.
    """
    counts = torch.tensor([len(ids) for ids in target], dtype=torch.long, device=scores.device)
    rows = torch.arange(len(target), device=scores.device).repeat_interleave(counts)
    ids = torch.cat([ids.to(scores.device) for ids in target]) if len(target) else rows
    share = scores[rows, ids] / (scores.sum(1) + LIST_EPS)[rows]  # [M]
    loss = scores.new_zeros(len(target)).index_add(0, rows, -(share + LIST_EPS).log())
    return (loss / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
