"""Plain PyTorch reference of the LSR loss: the semantics that every faster version must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

DIRECTIONS = ("KL(P_R||Q_LM)", "KL(Q_LM||P_R)")
REDUCTIONS = ("mean", "sum", "none")


def lsr_loss_reference(
    scores: Tensor,
    lm_scores: Tensor,
    gamma: float,
    beta: float,
    direction: str = "KL(P_R||Q_LM)",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`op.lsr_loss` in plain PyTorch, with autograd's own gradient."""
    check(scores, lm_scores, mask, gamma, beta, direction, reduction)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    log_p = _log_distribution(scores.to(dtype), gamma, mask, "gamma")  # [B, K]
    log_q = _log_distribution(lm_scores.detach().to(dtype), beta, mask, "beta")  # [B, K]
    terms = _terms(log_p, log_q) if direction == "KL(P_R||Q_LM)" else _terms(log_q, log_p)
    if mask is not None:
        terms = terms.masked_fill(~mask, 0.0)
    return reduce(terms.sum(-1), reduction)  # [B, K] -> [B]


def _terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a − log b), 0 where a is 0 (0 · log 0 = 0, also for its gradient)."""
    a = log_a.exp()
    return a * (log_a.masked_fill(a == 0, 0.0) - log_b.masked_fill(a == 0, 0.0))


def lsr_loss_from_embeddings_reference(
    queries: Tensor,
    passages: Tensor,
    lm_scores: Tensor,
    gamma: float,
    beta: float,
    direction: str = "KL(P_R||Q_LM)",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`op.lsr_loss_from_embeddings` in plain PyTorch: the products, then `lsr_loss_reference`."""
    check_embeddings(queries, passages, lm_scores, mask)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries, passages = queries.to(dtype), passages.to(dtype)
    if mask is not None:  # 0 · NaN is NaN, so what takes no part is replaced before the products
        queries = queries.masked_fill(~mask.any(1, keepdim=True), 0.0)
        used = mask if passages.ndim == 3 else mask.any(0)
        passages = passages.masked_fill(~used.unsqueeze(-1), 0.0)
    scores = torch.einsum("bd,bkd->bk" if passages.ndim == 3 else "bd,kd->bk", queries, passages)
    return lsr_loss_reference(scores, lm_scores, gamma, beta, direction, mask, reduction)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """[B] losses to their mean (0 of none), their sum, or as they are."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and losses.shape[0] else losses.sum()


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
    check_shapes(scores, scores, mask)
    probabilities = _log_distribution(scores, temperature, mask, name).exp()
    return probabilities if mask is None else probabilities.masked_fill(~mask, 0.0)


def _log_distribution(scores: Tensor, temperature: float, mask: Tensor | None, name: str) -> Tensor:
    """[B, K] log-probabilities; a masked entry holds a finite filler (0), for the caller to mask out."""
    _check_temperature(temperature, name)
    if mask is None:
        return torch.log_softmax(scores / temperature, dim=-1)
    # The scores are replaced before the division: a NaN or an infinity behind the mask must not reach the gradient.
    logits = scores.masked_fill(~mask, 0.0) / temperature
    empty = ~mask.any(dim=-1, keepdim=True)  # [B, 1]; -inf in a whole row would make NaN
    logits = logits.masked_fill(~mask & ~empty, float("-inf"))
    return torch.log_softmax(logits, dim=-1).masked_fill(~mask, 0.0)


def _check_temperature(temperature: float, name: str) -> None:
    if not temperature > 0:
        raise ValueError(f"{name} must be greater than 0, found {temperature}")


def check(
    scores: Tensor, lm_scores: Tensor, mask: Tensor | None, gamma: float, beta: float, direction: str, reduction: str
) -> None:
    """Raises ValueError for anything that does not fit, naming the argument."""
    check_shapes(scores, lm_scores, mask)
    check_options(gamma, beta, direction, reduction)


def check_options(gamma: float, beta: float, direction: str, reduction: str) -> None:
    """Raises ValueError for a temperature that is not positive, an unknown direction or reduction."""
    _check_temperature(gamma, "gamma")
    _check_temperature(beta, "beta")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; found {direction!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; found {reduction!r}")


def check_shapes(scores: Tensor, lm_scores: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError for scores and mask that do not fit together."""
    if scores.ndim != 2 or scores.shape != lm_scores.shape:
        raise ValueError(
            f"the scores must both be [B, K]; found scores {list(scores.shape)}, lm_scores {list(lm_scores.shape)}"
        )
    check_inputs({"scores": scores, "lm_scores": lm_scores}, mask, list(scores.shape))


def check_embeddings(queries: Tensor, passages: Tensor, lm_scores: Tensor, mask: Tensor | None = None) -> None:
    """Raises ValueError for embeddings, teacher's scores and mask that do not fit together."""
    if queries.ndim != 2 or passages.ndim not in (2, 3):
        raise ValueError(
            "queries must be [B, D] and passages [B, K, D], or [C, D] for candidates that all questions share; found "
            f"{list(queries.shape)} and {list(passages.shape)}"
        )
    B, D = queries.shape
    if passages.shape[-1] != D or (passages.ndim == 3 and passages.shape[0] != B):
        raise ValueError(
            f"passages must be [{B}, K, {D}] or [C, {D}] for queries [{B}, {D}], found {list(passages.shape)}"
        )
    if queries.dtype != passages.dtype and not torch.is_autocast_enabled(queries.device.type):
        raise ValueError(f"passages are {passages.dtype}, queries {queries.dtype}; they must be equal")
    wanted = [B, passages.shape[-2]]
    if list(lm_scores.shape) != wanted:
        raise ValueError(f"lm_scores must be {wanted}, one per question and passage; found {list(lm_scores.shape)}")
    check_inputs({"queries": queries, "passages": passages, "lm_scores": lm_scores}, mask, wanted)


def check_inputs(tensors: dict[str, Tensor], mask: Tensor | None, shape: list[int]) -> None:
    """Raises ValueError for numbers that are no floats, a mask that is not bool `shape`, or a second device."""
    if mask is not None and (list(mask.shape) != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {shape}, found {mask.dtype} {list(mask.shape)}")
    (name, first), *_ = tensors.items()
    for other, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{other} must hold floating-point numbers, found {tensor.dtype}")
    for other, tensor in {**tensors, **({} if mask is None else {"mask": mask})}.items():
        if tensor.device != first.device:
            raise ValueError(f"{other} is on {tensor.device}, {name} on {first.device}; move one of them")
