"""Which compiled forms of the kernels are shipped, for the checks that need no GPU (registers, spills, memory).

The list is recorded from the launchers themselves, so it cannot differ from what they launch.
"""

from __future__ import annotations

import torch

from ragkit_kernels.linear_logprob import triton_backend as backend
from ragkit_kernels.linear_logprob.chunked import Options
from ragkit_kernels.triton_tools import Launch, recording

FULL = {"bias": True, "capped": True}
PLAIN = {"bias": False, "capped": False}


def shipped_launches(dtype: torch.dtype, arch: int) -> list[Launch]:
    """What the backend launches for tensors of one dtype on one architecture; nothing is run.

    The fused kernel as most models need it, with a bias and a cap, and (for one of the narrow dtypes, which differ in
    their opcodes alone) for columns that are no multiple of its tile, or of 16; the row kernels with bias and cap.
    """
    with recording() as launches:
        if arch >= 80:
            _fused(dtype, arch, **PLAIN)
            for dim in (2048, 2064, 2049) if dtype != torch.float16 else (2048,):
                _fused(dtype, arch, **FULL, dim=dim)
        _rows(dtype, arch, **FULL)
    return launches


def _fused(dtype: torch.dtype, arch: int, bias: bool, capped: bool, dim: int = 2048) -> None:
    hidden, weight, targets = torch.zeros(2, dim, dtype=dtype), torch.zeros(2, dim, dtype=dtype), torch.zeros(2).long()
    options = Options(0.1 if capped else None, 1.0, -100, 0)
    backend.fused_forward(hidden, weight, targets, torch.zeros(2, dtype=dtype) if bias else None, options, arch, 1)


def _rows(dtype: torch.dtype, arch: int, bias: bool, capped: bool) -> None:
    # sm_80 and later keep products of 16-bit numbers in float32, earlier ones in their own dtype
    products = torch.zeros(2, 64, dtype=torch.float32 if arch >= 80 else dtype)
    targets, numbers = torch.zeros(2).long(), torch.zeros(2)
    offset = torch.zeros(64, dtype=dtype) if bias else None
    inner = 0.1 if capped else None
    backend.reduce_rows(products, offset, targets, 0, inner, 1.0, numbers, numbers, numbers)
    backend.gradient_rows(products, offset, targets, 0, inner, 1.0, numbers, numbers, -100, products.to(dtype))
