"""Compiles recorded launches of Triton kernels without a GPU and reads what the assembler made of them.

For any backend that launches through `ragkit_kernels.triton_tools.launch`: record its launches, then `compile_all`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton
from ragkit_kernels.triton_tools import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, per architecture."""

DTYPES = {75: ("fp16", "fp32"), 80: ("fp16", "bf16", "fp32"), 90: ("fp16", "bf16", "fp32")}
"""Storage that each architecture is used with (the T4 has no bfloat16)."""


@dataclass(frozen=True)
class Config:
    """What decides the code of one kernel: a `Launch` without its tensors, so that it can go to another process."""

    module: str
    function: str
    label: str
    storage: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    max_registers: int

    @classmethod
    def of(cls, launch: Launch, storage: str = "") -> Config:
        names = [p.name for p in launch.kernel.params if p.is_constexpr]
        shown = " ".join(f"{k}={launch.args[k]}" for k in names)
        given = [k for k, v in launch.types().items() if k in OPTIONAL and v != "constexpr"]
        return cls(
            launch.kernel.fn.__module__,
            launch.name,
            f"{launch.name.removesuffix('_kernel')} {shown} {'+'.join(given)}".strip(),
            storage,
            tuple(launch.types().items()),
            tuple(launch.constants().items()),
            tuple(launch.divisible()),
            launch.num_warps,
            launch.max_registers,
        )


OPTIONAL = ("weight", "keep", "base", "mask", "x", "part")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    label: str
    storage: str
    arch: int
    registers: int
    spilled: int  # bytes of spill stores and loads
    shared: int  # bytes
    ptx: str
    seconds: float

    @property
    def copies_async(self) -> bool:
        return "cp.async" in self.ptx

    def faults(self) -> list[str]:
        """What a shipped kernel must not have."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if re.search(r"\.f64\b", self.ptx):
            found.append("float64 arithmetic")
        if re.search(r"^\s*(@%?\w+\s+)?(atom|red)\.", self.ptx, re.MULTILINE):
            found.append("atomics")
        return found


def compile_one(config: Config, arch: int) -> Compiled:
    """Compiles for one architecture with Triton's own assembler and options; raises if either fails."""
    start = time.perf_counter()
    kernel = getattr(importlib.import_module(config.module), config.function)
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(config.types),
        constexprs={(places[name],): value for name, value in config.constants},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in config.divisible},
    )
    printed = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.compilation.always_compile = True  # a cached kernel has no log
        knobs.nvidia.dump_ptxas_log = True
        options = {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    log = printed.getvalue()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills and registers, f"ptxas said nothing of registers and spills: {log}"
    seconds = time.perf_counter() - start
    return Compiled(
        config.label,
        config.storage,
        arch,
        int(registers[1]),
        sum(map(int, spills)),
        compiled.metadata.shared,
        compiled.asm["ptx"],
        seconds,
    )


def compile_all(jobs: Iterable[tuple[Config, int]], processes: int = 2) -> list[Compiled]:
    """Compiles each (config, architecture) once, in processes of their own."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, config, arch) for config, arch in jobs]
        return [future.result() for future in futures]
