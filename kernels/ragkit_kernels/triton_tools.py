"""What the Triton backends share: launching on the tensors' device, and recording launches instead of running them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}
"""Triton's names of the dtypes that kernels take."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as it was asked for: what decides which code is compiled.

    Attributes:
        kernel: The `triton.jit` function.
        args: Every argument by name: tensors, numbers, None, and the values of `tl.constexpr` parameters.
        num_warps: Warps per program.
        max_registers: Registers per thread that the assembler may use.
    """

    kernel: Any
    args: dict[str, Any]
    num_warps: int
    max_registers: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def constants(self) -> dict[str, Any]:
        """The arguments that are compiled in: constexprs, missing tensors, integers that Triton specialises to 1."""
        return {p.name: self.args[p.name] for p in self.kernel.params if self._is_constant(p)}

    def types(self) -> dict[str, str]:
        """Triton's type of every argument, such as `*fp16` and `i32`."""
        kinds = {}
        for p in self.kernel.params:
            value = self.args[p.name]
            if self._is_constant(p):
                kinds[p.name] = "constexpr"
            elif isinstance(value, Tensor):
                kinds[p.name] = "*" + DTYPES[value.dtype]
            elif isinstance(value, float):
                kinds[p.name] = "fp32"
            else:
                kinds[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kinds

    def divisible(self) -> list[str]:
        """The arguments that Triton may take for multiples of 16: aligned pointers and such integers."""
        found = []
        for p in self.kernel.params:
            value = self.args[p.name]
            if self._is_constant(p) or p.do_not_specialize or isinstance(value, float):
                continue
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
                found.append(p.name)
        return found

    def _is_constant(self, parameter: Any) -> bool:
        value = self.args[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        return parameter.is_constexpr or value is None or is_one


_RECORD: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside, without running them. Outputs stay as they were allocated."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, max_registers: int = 128, **constants: Any
) -> None:
    """Runs a kernel on the device of its first tensor; an empty grid is nothing to do.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs per axis.
        args: Its first arguments, in order; None for a tensor that is not there.
        num_warps: Warps per program.
        max_registers: Registers per thread that the assembler may use. Left to itself it aims at more programs per
            processor, and spills a few bytes for that.
        constants: The rest, by name.
    """
    record = _RECORD.get()
    if record is not None:
        names = kernel.arg_names[: len(args)]
        record.append(Launch(kernel, {**dict(zip(names, args, strict=True)), **constants}, num_warps, max_registers))
        return
    if 0 in grid:
        return
    first = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*args, num_warps=num_warps, maxnreg=max_registers, enable_fp_fusion=True, **constants)
