"""Sets of entities for each question: index lists outside, one small dense matrix while a batch is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def dense_mask(given: Any, B: int, N: int, device: torch.device, name: str) -> Tensor:
    """The sets as 0/1 numbers.

    Args:
        given: [B, N] numbers or bools (kept as they are), or B lists (or integer tensors) of ids.
        B, N: What it must fit.
        device: Where it goes.
        name: What it is, for messages.

    Returns:
        [B, N] float32 (float64 if float64 was given).

    Raises:
        ValueError: Another size, an id out of range (its row is named), or numbers that are not finite.
    """
    if isinstance(given, np.ndarray) and given.ndim == 2:
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        given = given.to_dense()
        if tuple(given.shape) != (B, N):
            raise ValueError(
                f"{name}: expected [{B}, {N}] (questions, entities) or {B} lists, found {list(given.shape)}"
            )
        mask = given.to(device, given.dtype if given.dtype == torch.float64 else torch.float32)
        if not torch.isfinite(mask).all():
            raise ValueError(f"{name}: row {int((~torch.isfinite(mask)).any(1).nonzero()[0])} holds NaN or infinity")
        return mask
    if len(given) != B:
        raise ValueError(f"{name}: {len(given)} lists for {B} questions")
    rows, ids = flat_ids(given, N, name)
    mask = torch.zeros(B, N, device=device)
    mask[rows.to(device), ids.to(device)] = 1.0  # an id that is there twice counts once
    return mask


def flat_ids(lists: Sequence[Any], limit: int, name: str) -> tuple[Tensor, Tensor]:
    """(row [M], id [M]) of lists of ids.

    Raises:
        ValueError: An id that is no whole number in 0 ... limit - 1.
    """
    tensors = []
    for row, ids in enumerate(lists):
        tensor = torch.as_tensor(ids).cpu()
        if tensor.ndim != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            raise ValueError(f"{name}, row {row}: expected a list of ids, found {tensor.dtype} {list(tensor.shape)}")
        wrong = (tensor < 0) | (tensor >= limit)
        if wrong.any():
            raise ValueError(f"{name}, row {row}: id {int(tensor[wrong][0])} is not in 0 ... {limit - 1}")
        tensors.append(tensor.long())
    counts = torch.tensor([len(t) for t in tensors], dtype=torch.long)
    rows = torch.arange(len(tensors)).repeat_interleave(counts)
    return rows, torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.long)
