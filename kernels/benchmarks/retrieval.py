"""In-memory retrieval against one `torch.topk(queries @ rows.T)` done in one piece.

    python kernels/benchmarks/retrieval.py [--csv results.csv] [--device cuda] [--queries 1000] [--rows 100000]

Both are timed in turn within one run, so that what else the machine does hits both alike. Peak memory is what a call
needs beyond the vectors: measured by CUDA itself; on a CPU in a process of its own for each, by the resident set.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import append_rows, commit, in_child, memory_growth
from torch import Tensor

from ragkit.rag.topk import top_k_rows


def one_piece(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The peer: every score at once."""
    found = torch.topk(queries @ rows.T, k)
    return found.values, found.indices


METHODS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "ragkit": top_k_rows,
    "torch.topk": one_piece,
}


def make(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random unit vectors: queries [B, D] and rows [N, D]."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(args.queries + args.rows, args.dim, generator=generator)
    for part in both.split(4096):  # in place and in parts: a copy would hide what the search itself needs
        part /= part.norm(dim=1, keepdim=True)
    queries, rows = both.to(args.device).split([args.queries, args.rows])
    return queries, rows


def milliseconds(method: str, queries: Tensor, rows: Tensor, k: int) -> float:
    """Time of one call."""
    start = time.perf_counter()
    METHODS[method](queries, rows, k)
    if queries.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def peak_mib(method: str, args: argparse.Namespace) -> float:
    """Memory that one call adds at its peak, after a small call has warmed up; on a CPU in a process of its own."""
    if args.device.startswith("cuda") or args.measure_memory:
        queries, rows = make(args)
        warm_up = partial(milliseconds, method, queries[:8], rows[:4096], args.k)
        return memory_growth(warm_up, partial(milliseconds, method, queries, rows, args.k), args.device)
    sizes = [f"--{name}={getattr(args, name)}" for name in ("queries", "rows", "dim", "k")]
    return in_child(__file__, "--measure-memory", method, *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--measure-memory", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        print(peak_mib(args.measure_memory, args))
        return
    queries, rows = make(args)
    mine, peer = (METHODS[name](queries, rows, args.k) for name in METHODS)
    torch.testing.assert_close(mine[0], peer[0], rtol=0, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(args.repeats):
        for name in METHODS:
            times[name].append(milliseconds(name, queries, rows, args.k))
    # The ratio within each round, then the middle one: a disturbance hits one round, not the result.
    ratio = median(b / a for a, b in zip(times["ragkit"], times["torch.topk"], strict=True))
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    lines = []
    for name in METHODS:
        line = {
            "date": datetime.date.today().isoformat(),
            "device": device,
            "dtype": "float32",
            "queries": args.queries,
            "rows": args.rows,
            "dim": args.dim,
            "k": args.k,
            "threads": torch.get_num_threads(),
            "commit": commit(),
            "peer": name,
            "ms": round(median(times[name]), 1),
            "peak_mib": round(peak_mib(name, args), 1),
            "ratio": round(ratio, 2) if name == "ragkit" else 1.0,
        }
        lines.append(line)
        print(f"{name:12s} {line['ms']:9.1f} ms  peak +{line['peak_mib']:.0f} MiB  speed {line['ratio']:.2f} x")
    if args.csv:
        append_rows(args.csv, lines)


if __name__ == "__main__":
    main()
