"""GFM-RAG's losses on logits: a binary one and a list-wise one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ragkit.gfm.masks import dense_mask

LIST_EPS = 1e-5


def bce_loss(logits: Tensor, target: Tensor | Sequence[Any], temperature: float = 0.2) -> Tensor:
    """Binary cross-entropy, in which hard negatives weigh more.

        row = Σ_i w_i · BCE(z_i, t_i) / Σ_i w_i,  w_i = 1 / P for the P positives,
        w_i = softmax(z / T)_i over the row's negatives (no gradient); 1 / (number of negatives) for T = 0

    Self-adversarial weights: Sun et al. 2019 (RotatE, arXiv:1902.10197). A row without a positive counts
    its negatives alone, as in v1.

    Args:
        logits: [B, N].
        target: [B, N] 0/1, or B lists of positive ids.
        temperature: T; lower looks at harder negatives. GFM-RAG fine-tunes with 0.2 and pre-trains with 1.

    Returns:
        The mean over rows; scalar, float32 (float64 for float64).

    Example:
        >>> bce_loss(torch.zeros(1, 3), [[0]])
        tensor(0.6931)
    """
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, found {temperature}")
    z = _wide(logits)
    positive = _target(logits, target) > 0.5
    if not z.numel():
        return z.sum()
    with torch.no_grad():
        P = positive.sum(1, keepdim=True)  # [B, 1]
        if temperature > 0:
            hard = (z / temperature).masked_fill(positive, -torch.inf).softmax(1)
            hard = hard.masked_fill(positive, 0)  # a row of positives alone has no softmax
        else:
            hard = (~positive).to(z.dtype) / (~positive).sum(1, keepdim=True).clamp(min=1)
        weight = torch.where(positive, 1 / P.clamp(min=1).to(z.dtype), hard)  # [B, N]
    loss = F.binary_cross_entropy_with_logits(z, positive.to(z.dtype), reduction="none")
    return ((loss * weight).sum(1) / weight.sum(1)).mean()


def listce_loss(logits: Tensor, target: Tensor | Sequence[Any]) -> Tensor:
    """List-wise cross-entropy over normalised sigmoids.

        row = −(1 / P) Σ_{positives} log(σ(z_i) / (Σ_j σ(z_j) + 1e-5) + 1e-5)

    (GFM-RAG, arXiv:2502.01113.) Rows without a positive have no part in it; if no row has one the loss is
    0 with gradient 0, where v1 gives NaN.

    Args:
        logits: [B, N].
        target: [B, N] 0/1, or B lists of positive ids.

    Returns:
        The mean over rows with a positive; scalar, float32 (float64 for float64).

    Example:
        >>> listce_loss(torch.zeros(1, 4), [[0]])
        tensor(1.3863)
    """
    z = _wide(logits)
    t = _target(logits, target).to(z.dtype)
    P = t.sum(1)  # [B]
    p = z.sigmoid()
    log = (p / (p.sum(1, keepdim=True) + LIST_EPS) + LIST_EPS).log()
    rows = -(log * t).sum(1) / P.clamp(min=LIST_EPS)
    return rows.sum() / (P != 0).sum().clamp(min=1)


def retrieval_loss(
    logits: Tensor,
    target: Tensor | Sequence[Any],
    bce_weight: float = 0.3,
    listce_weight: float = 0.7,
    temperature: float = 0.2,
) -> Tensor:
    """bce_weight · BCE + listce_weight · ListCE, with v1's weights for fine-tuning."""
    return bce_weight * bce_loss(logits, target, temperature) + listce_weight * listce_loss(logits, target)


def link_prediction_loss(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The pre-training loss: `bce_loss` with the first of each row positive.

    Args:
        scores: [B, 1 + negatives] of `QueryGNN`.
        temperature: T of the negatives' weights.
    """
    first = torch.zeros_like(scores, dtype=torch.bool)
    first[:, 0] = True
    return bce_loss(scores, first, temperature)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _target(logits: Tensor, target: Tensor | Sequence[Any]) -> Tensor:
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [B, N], found {list(logits.shape)}")
    return dense_mask(target, logits.shape[0], logits.shape[1], logits.device, "target")
