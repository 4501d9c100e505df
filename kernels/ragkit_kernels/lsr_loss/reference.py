"""Plain PyTorch reference of the LSR loss: the semantics that every faster version must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

DIRECTIONS = ("KL(P_R||Q_LM)", "KL(Q_LM||P_R)")
REDUCTIONS = ("mean", "sum", "none")


def lsr_loss(
    scores: Tensor,
    lm_scores: Tensor,
    gamma: float,
    beta: float,
    direction: str = "KL(P_R||Q_LM)",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """KL divergence between what the retriever prefers and what the language model finds useful.

    For each question (a row), over its K passages:

        P_R(d)  = softmax_d(scores / gamma)       the retriever's distribution; the gradient goes here only
        Q_LM(d) = softmax_d(lm_scores / beta)     the teacher's; `lm_scores` is detached

        KL(P_R||Q_LM) = Σ_d P_R(d) [log P_R(d) − log Q_LM(d)]     REPLUG LSR (Shi et al. 2023, arXiv:2301.12652,
                                                                   section 4), RA-DIT (Lin et al. 2023,
                                                                   arXiv:2310.01352, section 2.3): seeks the mode
        KL(Q_LM||P_R) = Σ_d Q_LM(d) [log Q_LM(d) − log P_R(d)]     the cross-entropy direction: covers the mass

    | input     | shape  | meaning                                                         |
    |-----------|--------|-----------------------------------------------------------------|
    | scores    | [B, K] | similarity s(q, d) of each passage, with gradient               |
    | lm_scores | [B, K] | log p_LM(y | d, q) in nats, or its mean per token; never exp'd  |
    | mask      | [B, K] | True where there is a passage                                   |

    Recommendation: cosine scores lie in [-1, 1], so gamma must be small (0.05 to 0.1) or P_R is nearly flat; with the
    mean log-probability per token, beta = 1 leaves the teacher as sharp as the LM is.

    Args:
        scores: [B, K] retrieval scores. Any floating dtype; computed in float32 (float64 stays).
        lm_scores: [B, K] the teacher's scores in nats.
        gamma: Temperature of the retriever, > 0.
        beta: Temperature of the teacher, > 0.
        direction: One of `DIRECTIONS`; named as it is computed.
        mask: [B, K] bool, None: all true. A masked entry has probability exactly 0 on both sides, whatever stands in
            the inputs there (NaN and infinities included). A row without any passage gives 0.
        reduction: "mean" over the B rows, "sum", or "none" for [B].

    Returns:
        A scalar, or [B] for "none"; nats, float32 (float64 for float64 scores).

    Raises:
        ValueError: Shapes that differ, a temperature that is not positive, an unknown direction or reduction.

    Example:
        >>> scores = torch.tensor([[0.6, 0.5, 0.1]], requires_grad=True)
        >>> loss = lsr_loss(scores, torch.tensor([[-4.0, -0.5, -3.0]]), gamma=0.1, beta=1.0)
        >>> loss.backward()
        >>> bool(scores.grad[0, 1] < 0)  # the score of the passage that helps the LM most is to rise
        True
    """
    _check(scores, lm_scores, mask)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; found {direction!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; found {reduction!r}")
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    log_p = _log_distribution(scores.to(dtype), gamma, mask, "gamma")  # [B, K]
    log_q = _log_distribution(lm_scores.detach().to(dtype), beta, mask, "beta")  # [B, K]
    if direction == "KL(P_R||Q_LM)":
        terms = log_p.exp() * (log_p - log_q)
    else:
        terms = log_q.exp() * (log_q - log_p)
    if mask is not None:
        terms = terms.masked_fill(~mask, 0.0)
    rows = terms.sum(-1)  # [B, K] -> [B]
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / max(1, rows.shape[0])


def retrieval_distribution(scores: Tensor, gamma: float, mask: Tensor | None = None) -> Tensor:
    """P_R = softmax(scores / gamma) over the passages of each row, with gradient.

    Args:
        scores: [B, K] retrieval scores.
        gamma: Temperature, > 0.
        mask: [B, K] bool, True where there is a passage.

    Returns:
        [B, K] probabilities; exactly 0 where masked, and a row without any passage is all 0.
    """
    return _distribution(scores, gamma, mask, "gamma")


def lm_distribution(lm_scores: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """Q_LM = softmax(lm_scores / beta) over the passages of each row, detached.

    Args:
        lm_scores: [B, K] log-probabilities of the response in nats (sum or mean over its tokens).
        beta: Temperature, > 0.
        mask: [B, K] bool, True where there is a passage.

    Returns:
        [B, K] probabilities; exactly 0 where masked, and a row without any passage is all 0.
    """
    return _distribution(lm_scores.detach(), beta, mask, "beta")


def _distribution(scores: Tensor, temperature: float, mask: Tensor | None, name: str) -> Tensor:
    _check(scores, scores, mask)
    probabilities = _log_distribution(scores, temperature, mask, name).exp()
    return probabilities if mask is None else probabilities.masked_fill(~mask, 0.0)


def _log_distribution(scores: Tensor, temperature: float, mask: Tensor | None, name: str) -> Tensor:
    """[B, K] log-probabilities; a masked entry holds a finite filler (0), for the caller to mask out."""
    if not temperature > 0:
        raise ValueError(f"{name} must be greater than 0, found {temperature}")
    if mask is None:
        return torch.log_softmax(scores / temperature, dim=-1)
    # The scores are replaced before the division: a NaN or an infinity behind the mask must not reach the gradient.
    logits = scores.masked_fill(~mask, 0.0) / temperature
    empty = ~mask.any(dim=-1, keepdim=True)  # [B, 1]; -inf in a whole row would make NaN
    logits = logits.masked_fill(~mask & ~empty, float("-inf"))
    return torch.log_softmax(logits, dim=-1).masked_fill(~mask, 0.0)


def _check(scores: Tensor, lm_scores: Tensor, mask: Tensor | None) -> None:
    if scores.ndim != 2 or scores.shape != lm_scores.shape:
        raise ValueError(
            f"the scores must both be [B, K]; found scores {list(scores.shape)}, lm_scores {list(lm_scores.shape)}"
        )
    if mask is not None and (mask.shape != scores.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(scores.shape)}, found {mask.dtype} {list(mask.shape)}")
