"""Batches of triples for link prediction: what makes one valid, and the form in which a model is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.gfm.easy_edges import inverse


def check_triples(batch: Tensor, N: int, R: int) -> None:
    """Raises ValueError unless `batch` is [B, K, 3] integer (head, tail, relation) in range, one query to a row."""
    if batch.ndim != 3 or batch.shape[-1] != 3 or batch.shape[1] < 1 or batch.is_floating_point():
        raise ValueError(
            f"batch_htr: expected integer [B, 1 + negatives, 3] (head, tail, relation), found {batch.dtype} "
            f"{list(batch.shape)}"
        )
    for place, (name, limit) in enumerate((("head", N), ("tail", N), ("relation", R))):
        ids = batch[..., place]
        wrong = (ids < 0) | (ids >= limit)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(f"batch_htr[{row}, {column}]: {name} {int(ids[row, column])} is not in 0 ... {limit - 1}")
    same = (batch == batch[:, :1]).all(1)  # [B, 3]
    wrong = ~(same[:, 2] & (same[:, 0] | same[:, 1]))
    if wrong.any():
        raise ValueError(
            f"batch_htr, row {int(wrong.nonzero()[0])}: a row must have one relation, and one head or one tail"
        )


def tail_form(head: Tensor, tail: Tensor, rel: Tensor, R: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, K] with other heads, turned into rows with other tails and the inverse relation."""
    same_head = (head == head[:, :1]).all(1, keepdim=True)  # [B, 1]
    return (
        torch.where(same_head, head, tail),
        torch.where(same_head, tail, head),
        torch.where(same_head, rel, inverse(rel, R)),
    )
