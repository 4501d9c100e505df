"""In which dtype sums are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> torch.dtype:
    """The dtype in which sums over `x` are kept: float32, or float64 where `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keeps_sums(device: torch.device) -> bool:
    """Whether a GPU's `torch.mm(out_dtype=float32)` exists: in newer versions of PyTorch, on sm_80 and later."""
    return hasattr(torch.ops.aten.mm, "dtype_out") and torch.cuda.get_device_capability(device) >= (8, 0)
