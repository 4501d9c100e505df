"""Memory and disk: what a process takes at most, and what is free."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

MIB = 2**20


@dataclass
class PeakMemory:
    """Watches the most memory that this process takes within a `with` block.

    On a GPU that is PyTorch's own count; else the resident set, whose peak the system keeps (Linux) where it is the
    highest so far, and which is looked at every few milliseconds in any case.

    Attributes:
        device: Where the training is.
        mib: The peak, with what was there before; None until the block ends.
    """

    device: torch.device
    mib: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._before = _high_water()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / MIB
            return
        self._stop.set()
        self._watcher.join()
        after = _high_water()
        if after > self._before:
            self.mib = max(self.mib, after)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.mib = max(self.mib, process.memory_info().rss / MIB)
            if self._stop.wait(0.005):
                return


def _high_water() -> float:
    """The highest resident set of this process so far in MiB, as Linux keeps it; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def free_memory(device: torch.device) -> float:
    """MiB that this process has and could still get, on its GPU or in its machine (or container)."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, limit - used)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return (free + psutil.Process().memory_info().rss) / MIB


def free_disk(folder: str) -> float:
    """MiB that are free where `folder` is or will be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / MIB


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()


def size_mib(tensors: Iterable[Tensor]) -> float:
    """The size of tensors, each once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values()) / MIB
