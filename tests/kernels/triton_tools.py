"""The checks of Triton kernels that need no GPU: for what is launched through `ragkit_kernels.triton_tools.launch`.

`compile_shipped` compiles what a backend launches and reads what the assembler made of it (`table` shows it);
`interpreted` runs a cases file (see case_tools.py) in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from ragkit_kernels.triton_tools import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, per architecture."""

DTYPES = {75: ("fp16", "fp32"), 80: ("fp16", "bf16", "fp32"), 90: ("fp16", "bf16", "fp32")}
"""Storage that each architecture is used with (the T4 has no bfloat16)."""

STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = [(arch, name) for arch in DTYPES for name in DTYPES[arch]]


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


def compile_shipped(
    launches: Callable[[torch.dtype], Sequence[Launch]],
    columns: Sequence[tuple[int, str]] = COLUMNS,
    everything: bool = True,
) -> list[Compiled]:
    """Compiles every form that a backend ships, once for each (architecture, storage) of `columns`.

    Args:
        launches: What the backend launches for tensors of one dtype, recorded.
        columns: Pairs such as (80, "bf16"); a backend that needs sm_80 leaves the earlier ones out.
        everything: False: every form for each architecture still, but with one storage there, in turns (a form is
            compiled with other storages for other architectures, and the next form the other way round).
    """
    names = dict.fromkeys(name for _, name in columns)
    configs = {n: list(dict.fromkeys(Config.of(launch, n) for launch in launches(STORAGE[n]))) for n in names}
    archs = list(dict.fromkeys(arch for arch, _ in columns))
    stored = {arch: [name for other, name in columns if other == arch] for arch in archs}
    jobs = [
        (config, arch)
        for arch, name in columns
        for number, config in enumerate(configs[name])
        if everything or stored[arch][(number + archs.index(arch)) % len(stored[arch])] == name
    ]
    return compile_all(jobs, processes=os.cpu_count() or 1)


def faults(compiled: Iterable[Compiled]) -> list[str]:
    """A line for each compiled form that has what a shipped kernel must not have."""
    return [f"{c.label} for sm_{c.arch} {c.storage}: {', '.join(c.faults())}" for c in compiled if c.faults()]


def table(compiled: Sequence[Compiled], columns: Sequence[tuple[int, str]] = COLUMNS) -> str:
    """A line per configuration: registers (and spilled bytes) of each architecture and storage, most shared memory."""
    lines = ["registers/spills: " + " ".join(f"sm_{arch}:{name}" for arch, name in columns) + "  KiB  configuration"]
    for label in dict.fromkeys(c.label for c in compiled):
        row = {(c.arch, c.storage): c for c in compiled if c.label == label}
        cells = [f"{row[k].registers}/{row[k].spilled}" if k in row else "-" for k in columns]
        shared = max(c.shared for c in row.values()) / 1024
        lines.append(" ".join(f"{cell:>6}" for cell in cells) + f" {shared:5.1f}  {label}")
    lines.append(f"{len(compiled)} compiled in {sum(c.seconds for c in compiled):.0f} s of all processes")
    return "\n".join(lines)


def interpreted(
    cases_file: str | Path, names: Sequence[str], parts: int = 2, timeout: float = 1200
) -> dict[str, dict[str, Any]]:
    """Runs a cases file (see case_tools.py) in Triton's interpreter: {check: {"seconds", "results"}}.

    In processes of their own, since the interpreter must be chosen before the kernels are imported.

    Args:
        cases_file: Prints a JSON line per check and takes the names of checks as its arguments.
        names: The checks to run.
        parts: Processes that share the checks.
        timeout: Seconds until a process counts as hanging.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(cases_file)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*command, *names[n::parts]], env=environment, **pipes) for n in range(parts)]
    found = {}
    try:
        for process in jobs:
            out, errors = process.communicate(timeout=timeout)
            lines = out.splitlines()
            done = lines[-1][:200] if lines else "nothing"  # a segmentation fault (-11) is an address out of bounds
            assert process.returncode == 0, f"exit code {process.returncode} after {done}\n{errors[-4000:]}"
            found |= {line["check"]: line for line in map(json.loads, lines)}
    finally:
        for process in jobs:
            process.kill()
    return found
