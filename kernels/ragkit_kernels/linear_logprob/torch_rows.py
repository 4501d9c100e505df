"""What is done to a block of logits [R, C], in plain PyTorch and in place: for CPUs, float64, and other devices.

The block holds columns first..first + C of the vocabulary for R rows. triton_backend.py has the same functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _finish(products: Tensor, bias: Tensor | None, inner: float | None, outer: float) -> Tensor:
    """Logits from hidden · weight, in place; where there is a cap, tanh only (the logits are `outer` times that)."""
    if bias is not None:
        products += bias
    if inner is not None:
        return products.mul_(inner).tanh_()
    return products if outer == 1 else products.mul_(outer)


def _place(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of each row's target: its column in the block [R, 1] (any if it is not there), and whether it is there [R]."""
    local = targets - first
    return local.clamp(0, columns - 1).unsqueeze(1), (local >= 0) & (local < columns)


def reduce_rows(
    products: Tensor, bias: Tensor | None, targets: Tensor, first: int, inner: float | None, outer: float,
    top: Tensor, total: Tensor, picked: Tensor,
) -> None:  # fmt: skip
    """Writes each row's largest logit, Σ exp(logit - largest) and, if it is in this block, its target's logit.

    Args:
        products: [R, C] hidden · weight; overwritten.
        bias: [C] or None.
        targets: [R] token ids.
        first: Token of column 0.
        inner, outer: As `reference.scaling` gives them.
        top, total, picked: [R] results.
    """
    logits = _finish(products.to(top.dtype), bias, inner, outer)
    if inner is not None:
        logits.mul_(outer)
    column, inside = _place(targets, first, logits.shape[1])
    torch.where(inside, logits.gather(1, column).squeeze(1), picked, out=picked)
    torch.amax(logits, 1, out=top)
    top.clamp_(min=torch.finfo(top.dtype).min)  # a row of -inf alone: the differences below stay -inf, not NaN
    torch.sum(logits.sub_(top.unsqueeze(1)).exp_(), 1, out=total)


def merge(
    top: Tensor, total: Tensor, picked: Tensor, targets: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(log-probability of the target, log-sum-exp) [T] from what `reduce_rows` found for S blocks: [S, T] each.

    0 for ignored targets; NaN, and a log-sum-exp of NaN, for targets outside the vocabulary.
    """
    largest = top.amax(0)  # [S, T] -> [T]
    log_total = (total * (top - largest).exp_()).sum(0).log_()
    valid, ignored = (targets >= 0) & (targets < vocabulary), targets == ignore_index
    logprob = torch.where(valid, picked - largest - log_total, math.nan)
    lse = torch.where(valid | ignored, largest + log_total, math.nan)
    return torch.where(ignored, 0.0, logprob), lse


def gradient_rows(
    products: Tensor, bias: Tensor | None, targets: Tensor, first: int, inner: float | None, outer: float, lse: Tensor,
    grad: Tensor, ignore_index: int, out: Tensor,
) -> None:  # fmt: skip
    """out = grad · d log p(target) / d product = grad · (1[column is target] - softmax) · d logit / d product.

    Args:
        products, bias, targets, first, inner, outer: As in `reduce_rows`.
        lse: [R] log-sum-exp of the whole rows.
        grad: [R] gradient of the log-probabilities.
        ignore_index: Rows with this target get 0.
        out: [R, C]; may be `products`.
    """
    logits = _finish(products.to(lse.dtype), bias, inner, outer)
    slope = None
    if inner is not None:
        slope = logits  # of tanh, below; its memory is that of the products
        logits = logits * outer
        slope.square_().neg_().add_(1).mul_(inner)
    column, inside = _place(targets, first, logits.shape[1])
    logits.sub_(lse.unsqueeze(1)).exp_()
    logits.scatter_(1, column, logits.gather(1, column) - inside.to(logits.dtype).unsqueeze(1))
    if slope is not None:
        logits *= slope
    ignored = (targets == ignore_index).unsqueeze(1)
    factor = torch.where(ignored.squeeze(1), 0.0, grad * -outer)
    torch.mul(logits, factor.unsqueeze(1), out=out)
    out.masked_fill_(ignored, 0)  # also where a NaN stood
