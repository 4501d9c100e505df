"""Plain PyTorch reference of `token_logprobs`: the semantics that every faster version must reproduce."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ragkit_kernels.precision import accumulate


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """`token_logprobs` of all rows, written down as it is defined: with all [T, V] logits, and any derivative.

    Products are made in float32 (float64 stays) whatever the inputs' dtype, so that this is an oracle for narrow ones
    as well. A target that is neither in the vocabulary nor `ignore_index` gives NaN.
    """
    wide = accumulate(hidden)
    hidden = hidden.masked_fill((targets == ignore_index).unsqueeze(1), 0)  # 0 · NaN, in a gradient, would be NaN
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    inner, outer = scaling(logit_scale, softcap, temperature)
    logits = logits * outer if inner is None else outer * torch.tanh(logits * inner)  # [T, V]
    valid = (targets >= 0) & (targets < weight.shape[0])
    picked = logits.log_softmax(-1).gather(1, torch.where(valid, targets, 0).unsqueeze(1)).squeeze(1)  # [T]
    picked = torch.where(valid, picked, math.nan)
    return torch.where(targets == ignore_index, 0.0, picked)


def scaling(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float | None, float]:
    """(inner, outer) with z = outer · tanh(inner · a), or z = outer · a where inner is None."""
    if softcap is None:
        return None, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def check(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError for tensors that do not fit together, naming the argument."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "token_logprobs wants hidden [N, D] and weight [V, D] with one D; "
            f"found {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not weight.shape[0]:
        raise ValueError("token_logprobs wants a weight with at least one row, found a vocabulary of 0 tokens")
    rows = hidden.shape[:1] if positions is None else positions.shape
    named = {"targets": (targets, rows), "positions": (positions, rows)}
    for name, (tensor, shape) in named.items():
        if tensor is not None and (tensor.ndim != 1 or tensor.shape != shape):
            raise ValueError(f"token_logprobs wants {name} {list(shape)}, found {list(tensor.shape)}")
        if tensor is not None and tensor.dtype != torch.int64:
            raise ValueError(f"token_logprobs wants int64 {name}, found {tensor.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"token_logprobs wants bias [{weight.shape[0]}], found {list(bias.shape)}")
    for name, tensor in {"weight": weight, "targets": targets, "positions": positions, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden is on {hidden.device}; they must be equal")
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, found {tensor.dtype}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"weight is {weight.dtype}, hidden is {hidden.dtype}; they must be equal outside autocast")


def check_options(logit_scale: float, softcap: float | None, temperature: float, chunk_rows: int | None) -> None:
    """Raises ValueError for a number that makes no sense, naming it."""
    if not -math.inf < logit_scale < math.inf:  # not math.isfinite: in a compiled call it may be a symbol
        raise ValueError(f"logit_scale must be a finite number, found {logit_scale}")
    for name, value in {"softcap": softcap, "temperature": temperature}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, found {value}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}")


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside the vocabulary. It waits for the tensor's device."""
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(f"target {int(wrong[0])} is outside the vocabulary 0..{vocabulary - 1}")


def check_positions(positions: Tensor, rows: int) -> None:
    """Raises ValueError for a position outside `hidden`. It waits for the tensor's device."""
    wrong = positions[(positions < 0) | (positions >= rows)]
    if wrong.numel():
        raise ValueError(f"position {int(wrong[0])} is outside the rows 0..{rows - 1} of hidden")
