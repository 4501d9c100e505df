"""What the checks of the Triton backends share: comparing with float64, new memory that is NaN, a line per check.

A cases file (such as relconv_cases.py) has `all_checks()`, name -> (function, case), where `function(case, device)`
yields a `Result` per tensor, and ends with `main(all_checks())`. It runs wherever the kernels do: on a GPU, or on the
CPU in Triton's interpreter (`triton_tools.interpreted`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""RMS of the error over the RMS of the result; twice that for gradients."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """One tensor of the backend against float64, and against PyTorch in the same dtype.

    Attributes:
        error: RMS of (ours - float64) over the RMS of float64; infinite if ours has a NaN.
        torch_error: The same for PyTorch in the dtype of the case.
        limit: What `error` may be.
    """

    name: str
    error: float
    torch_error: float
    limit: float
    slack: float

    def ok(self) -> bool:
        return self.error <= self.limit and self.error <= self.slack * self.torch_error + 2e-6


Checks = Mapping[str, tuple[Callable[[Any, str], Iterable[Result]], Any]]
"""Name -> (function, case)."""


def compare(name: str, ours: Tensor, exact: Tensor, same: Tensor, dtype: torch.dtype, gradient: bool) -> Result:
    """`exact` in float64; `same` computed by PyTorch from inputs of the case's dtype, rounded to that of `ours`."""
    assert ours.shape == exact.shape, f"{name}: {list(ours.shape)}, expected {list(exact.shape)}"
    truncates = dtype == torch.bfloat16 and not ours.is_cuda  # the interpreter cuts off what bfloat16 cannot hold
    exact = exact.detach()
    ours, same = ours.detach().cpu().double(), same.detach().to(ours.dtype).double()
    scale = float(exact.pow(2).mean().sqrt()) if exact.numel() else 0.0

    def error(value: Tensor) -> float:
        if value.isnan().any():
            return float("inf")
        rms = float((value - exact).pow(2).mean().sqrt()) if exact.numel() else 0.0
        return rms / scale if scale else rms

    limit = TOLERANCE[dtype] * (2 if gradient else 1)
    return Result(name, error(ours), error(same), limit, slack=2.5 if truncates else 1.1)


def fill_new_memory() -> None:
    """From here on, `torch.empty` gives NaN, or the largest integer."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what this mode wants of matrix products on a GPU
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()


def copy_to(t: Tensor, device: str) -> Tensor:
    """On another device with the same strides; itself on the CPU."""
    if device == "cpu":
        return t
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    flat = t.as_strided((extent,), (1,)).to(device)
    return flat.as_strided(t.shape, t.stride())


def main(checks: Checks) -> None:
    """Runs checks on the CPU (`python FILE NAME...`; all without arguments) and prints what it found."""
    fill_new_memory()
    for name in sys.argv[1:] or checks:
        function, case = checks[name]
        start = time.perf_counter()
        found = [{**vars(r), "ok": r.ok()} for r in function(case, "cpu")]
        print(json.dumps({"check": name, "seconds": time.perf_counter() - start, "results": found}), flush=True)
