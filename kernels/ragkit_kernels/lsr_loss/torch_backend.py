"""PyTorch backend of the LSR loss, for the CPU and whatever has no Triton: loss and gradient together.

No autograd inside: the gradient of a softmax's KL divergence is a formula (see `loss_forward`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit_kernels.lsr_loss.reference import DIRECTIONS
from ragkit_kernels.precision import accumulate, keeps_sums

BLOCK = 1 << 16  # scores that are handled together on a CPU: what the formula makes of them stays in the cache


def loss_forward(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str
) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient:

        KL(P‖Q) = Σ P (log P − log Q)     d/d scores = P (log P − log Q − KL) / γ
        KL(Q‖P) = Σ Q (log Q − log P)     d/d scores = (P − Q) / γ

    Args:
        scores, lm_scores: [B, K].
        mask: [B, K] bool or None.

    Returns:
        losses [B] and d losses / d scores [B, K], float32 (float64 for float64 scores).
    """
    B, K = scores.shape
    rows = max(1, BLOCK // max(1, K)) if scores.device.type == "cpu" else B
    if B <= rows:
        return _rows(scores, lm_scores, mask, gamma, beta, direction)
    dtype = accumulate(scores)
    losses, dscores = scores.new_empty(B, dtype=dtype), scores.new_empty(B, K, dtype=dtype)
    for first in range(0, B, rows):
        part = slice(first, first + rows)
        kept = None if mask is None else mask[part]
        losses[part], dscores[part] = _rows(scores[part], lm_scores[part], kept, gamma, beta, direction)
    return losses, dscores


def _rows(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str
) -> tuple[Tensor, Tensor]:
    """`loss_forward` of a few rows."""
    dtype = accumulate(scores)
    log_p = _log_softmax(scores, mask, gamma, dtype)
    log_q = _log_softmax(lm_scores, mask, beta, dtype)
    p = log_p.exp()
    if direction == DIRECTIONS[0]:
        difference = log_p.sub_(log_q)
        # Relative to that of the likeliest passage: where P is sharp, the gradient would else be the small difference
        # of large numbers.
        base = difference.gather(-1, p.argmax(-1, keepdim=True)) if p.shape[-1] else p.new_zeros(len(p), 1)
        base.masked_fill_(base == float("inf"), 0)
        difference.sub_(base).masked_fill_(p == 0, 0)  # 0 · log 0 = 0: what is masked has P = Q = 0
        mean = torch.linalg.vecdot(p, difference).unsqueeze(-1)
        dscores = difference.sub_(mean).mul_(p).div_(gamma)
        losses = mean.add_(base).squeeze(-1)
    else:
        q = log_q.exp()
        difference = log_q.sub_(log_p).masked_fill_(q == 0, 0)
        losses = torch.linalg.vecdot(q, difference)
        dscores = p.sub_(q).div_(gamma)
    if mask is not None:
        empty = ~mask.any(-1)
        losses.masked_fill_(empty, 0)
        dscores.masked_fill_(empty.unsqueeze(-1), 0)
    return losses, dscores


def _log_softmax(values: Tensor, mask: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """[B, K] log-probabilities, −∞ where masked (NaN in a row without any passage), in memory of its own."""
    x = values.to(dtype).div(temperature)
    if mask is not None:
        x.masked_fill_(~mask, float("-inf"))
    return torch.log_softmax(x, -1)


def embeddings_forward(
    queries: Tensor,
    passages: Tensor,
    lm_scores: Tensor,
    mask: Tensor | None,
    gamma: float,
    beta: float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """`loss_forward` of queries[b] · passages[b, k], or · passages[k] where all questions share them."""
    if passages.ndim == 2:
        scores = shared_scores(queries, passages)
    else:
        dtype = accumulate(queries)
        scores = torch.bmm(passages.to(dtype), queries.to(dtype).unsqueeze(-1)).squeeze(-1)  # [B, K]
    return loss_forward(scores, lm_scores, mask, gamma, beta, direction)


def embeddings_backward(
    grad: Tensor, dscores: Tensor, queries: Tensor, passages: Tensor, masked: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and passages for that of the losses [B]; an empty tensor for one that is not needed.

    Args:
        masked: With a mask. Embeddings behind it may be NaN: they take no part, and get gradient 0.
    """
    if passages.ndim == 2:
        return shared_backward(grad, dscores, queries, passages, masked, needs)
    dtype = accumulate(queries)
    weight = (grad.unsqueeze(-1) * dscores).unsqueeze(1)  # [B, 1, K]
    live = (dscores != 0).unsqueeze(-1)  # [B, K, 1]
    dqueries, dpassages = queries.new_empty(0), passages.new_empty(0)
    if needs[0]:
        rows = passages.masked_fill(~live, 0) if masked else passages
        dqueries = torch.bmm(weight, rows.to(dtype)).squeeze(1).to(queries.dtype)  # [B, D]
    if needs[1]:
        rows = queries.masked_fill(~live.any(1), 0) if masked else queries
        dpassages = torch.bmm(weight.mT, rows.to(dtype).unsqueeze(1)).to(passages.dtype)  # [B, K, D]
    return dqueries, dpassages


def shared_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """queries [B, D] @ passages [C, D]ᵀ: one matrix product with sums and result in float32 (float64 stays)."""
    return _product(queries, passages.T, accumulate(queries))


def shared_backward(
    grad: Tensor, dscores: Tensor, queries: Tensor, passages: Tensor, masked: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """`embeddings_backward` for passages [C, D]: one matrix product for each gradient."""
    weight = grad.unsqueeze(-1) * dscores  # [B, C]
    live = dscores != 0
    if weight.is_cuda and queries.dtype == torch.bfloat16:  # as wide as float32; float16 would overflow
        weight = weight.to(torch.bfloat16)
    dqueries, dpassages = queries.new_empty(0), passages.new_empty(0)
    if needs[0]:
        rows = passages.masked_fill(~live.any(0).unsqueeze(-1), 0) if masked else passages
        dqueries = _product(weight, rows, accumulate(queries)).to(queries.dtype)  # [B, D]
    if needs[1]:
        rows = queries.masked_fill(~live.any(1).unsqueeze(-1), 0) if masked else queries
        dpassages = _product(weight.T, rows, accumulate(queries)).to(passages.dtype)  # [C, D]
    return dqueries, dpassages


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with a result of this dtype; 16-bit inputs are widened unless the GPU's library keeps float32 sums."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16) and keeps_sums(a.device):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
