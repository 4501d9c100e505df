"""What the benchmarks share: timing in turn, peak memory in a process of its own, CSV rows that say their origin.

torch is imported where it is needed: a script may time a cold start.
"""

from __future__ import annotations

import csv
import gc
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any


def in_turn(methods: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Times every method once a round, one after the other, so that what else the machine does hits all alike.

    Returns:
        For each method the median of its wall time `ms` and of its CPU time `cpu_s`, without a first warm-up round.
    """
    import torch

    wall: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            gc.collect()
            start, start_cpu = time.perf_counter(), time.process_time()
            method()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                wall[name].append(1000 * (time.perf_counter() - start))
                cpu[name].append(time.process_time() - start_cpu)
    return {name: {"ms": median(wall[name]), "cpu_s": median(cpu[name])} for name in methods}


def highest_resident_mib() -> float:
    """The largest resident set of this process so far (Linux only; nan elsewhere)."""
    # getrusage would not do: its value outlives exec, so a child starts with what its parent used.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**10 if found else float("nan")


def memory_growth(warm_up: Callable[[], Any], method: Callable[[], Any], device: str) -> float:
    """MiB that a call adds at its peak to what there was before it.

    On a CPU call it in a process of its own (`in_child`): the resident set remembers the largest call.

    Args:
        warm_up: A small call that loads and compiles what the method needs.
        method: The call to measure.
        device: "cpu" or a CUDA device.
    """
    import torch

    warm_up()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = highest_resident_mib()
    method()
    return highest_resident_mib() - before


def in_child(script: str, *arguments: str) -> float:
    """Runs a benchmark script with other arguments in a new process; the last word that it prints is the number."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def where(device: str) -> dict[str, Any]:
    """The columns that say where and from what a row comes."""
    import torch

    name = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    )
    return {"date": date.today().isoformat(), "device": name, "torch": torch.__version__, "commit": commit()}


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the commit, with a plus where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = (
        "+"
        if git("status", "--porcelain", "--untracked-files=no", "--", "../ragkit_kernels", "../../ragkit", "*.py")
        else ""
    )
    return (git("rev-parse", "--short=8", "HEAD") or "unknown") + changed


def append_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file, with a header if it is new.

    Raises:
        ValueError: The file has other columns.
    """
    path, fields = Path(path), list(rows[0])
    new = not path.exists() or not path.stat().st_size
    if not new and path.read_text(encoding="utf-8").splitlines()[0].split(",") != fields:
        raise ValueError(f"{path}: its columns differ from {','.join(fields)}; move it away or name another file")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as a table of text."""
    cells = [list(columns), *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
