"""The measuring under `ragkit.estimate`: times, peak memory, and copies whose training leaves the originals alone."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

MIB = 2**20
ENOUGH = 1.0  # seconds: fewer say little of steps that take milliseconds
MOST = 16  # times the steps asked for
T = TypeVar("T")


# ---- leaving everything as it was ----


@contextmanager
def left_as_it_was(device: torch.device) -> Iterator[Path]:
    """Within the block anything may be trained: random numbers, threads and settings of the process are put back.

    Says nothing meanwhile: no progress bars, and no lines of ragkit from this thread.

    Yields:
        A temporary folder for the run; it is gone afterwards.
    """
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    threads, bars = torch.get_num_threads(), os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="ragkit-estimate-"))
    try:
        with _silence():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars
        torch.set_num_threads(threads)
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


@contextmanager
def _silence() -> Iterator[None]:
    """Drops what ragkit logs, warns and prints; other threads still log, and print where this is not the main one."""
    mine = threading.get_ident()
    logger = logging.getLogger("ragkit")

    def others(record: logging.LogRecord) -> bool:
        return record.thread != mine

    logger.addFilter(others)
    taker = logging.NullHandler()  # `ragkit.notes.note` prints where nobody listens
    logger.addHandler(taker)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if threading.current_thread() is threading.main_thread():
                with redirect_stdout(StringIO()):
                    yield
            else:
                yield
    finally:
        logger.removeHandler(taker)
        logger.removeFilter(others)


def twin(part: T, moved: Iterable[Tensor] = (), shared: Iterable[Any] = ()) -> T:
    """A copy of `part` that can be trained in its place.

    Parameters that training does not move have their memory in common with the original's; they are other objects
    all the same, so what is done to `requires_grad` and `grad` of one is not done to the other.

    Args:
        part: A module, or anything that holds some.
        moved: Parameters that training changes; these are copied.
        shared: Objects that stay what they are (a store, a graph).
    """
    changing = {id(tensor) for tensor in moved}
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    for tensor in {id(p): p for module in modules_in(part) for p in module.parameters()}.values():
        if id(tensor) in changing:
            continue
        plain = type(tensor) is nn.Parameter  # those of a quantised model know more than their numbers
        memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if plain else tensor
    return copy.deepcopy(part, memo)


def modules_in(part: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that an object holds in its attributes (or is itself)."""
    if isinstance(part, nn.Module):
        return [part]
    held = vars(part).values() if hasattr(part, "__dict__") else part if isinstance(part, list | tuple) else ()
    return [module for value in held for module in modules_in(value, depth - 1)] if depth else []


# ---- time ----


class Clock(TrainerCallback):
    """Times the steps of a warm-up and ends it: after `steps` of them, or more while they take less than a second."""

    def __init__(self, steps: int) -> None:
        self.wanted = max(2, steps)
        self.ends: list[float] = []
        self.evaluation = self.saving = 0.0
        self._last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Takes the time; after the last step asks for what the end of a run asks for."""
        self._last = time.perf_counter()
        self.ends.append(self._last)
        if len(self.ends) >= self.wanted and self.ends[-1] - self.ends[0] >= ENOUGH:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time of the evaluation at the end."""
        self.evaluation, self._last = time.perf_counter() - self._last, time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the time of the checkpoint at the end."""
        self.saving = time.perf_counter() - self._last

    @property
    def step(self) -> float:
        """Seconds of a step; the first one, which also compiles and allocates, is not counted.

        The mean, since steps may differ (in length, in graph), but of no step more than three times the median: on a
        busy machine one of them may have waited.
        """
        taken = np.diff(self.ends)
        return float(np.minimum(taken, 3 * statistics.median(taken)).mean())


@dataclass
class Training:
    """What a warm-up says of a training.

    Attributes:
        step: Seconds of a step.
        once: Seconds before, in and after the steps that come once.
        evaluation: Seconds of the evaluation at its end.
        saving: Seconds of a checkpoint.
        checkpoint_mib: Its size on disk.
        made: Steps made.
    """

    step: float
    once: float
    evaluation: float
    saving: float
    checkpoint_mib: float
    made: int


def warm_up(train: Callable[[], Any], clock: Clock) -> Training:
    """Runs a short training with `clock` among its callbacks, and says what it took."""
    begin = time.perf_counter()
    result = train()
    whole = time.perf_counter() - begin
    once = whole - (clock.ends[-1] - clock.ends[0]) - clock.evaluation - clock.saving
    size = sum(file.stat().st_size for file in Path(result.run_dir, "checkpoints").rglob("*") if file.is_file())
    return Training(clock.step, once, clock.evaluation, clock.saving, size / MIB, len(clock.ends))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def seconds_each(call: Callable[[Sequence[Any]], Any], things: Sequence[Any], some: int = 32) -> float:
    """Seconds that `call` takes for all things, from what it takes for the first and then for some of them.

    Args:
        call: Takes a part of the things.
        things: All of them.
        some: How many are tried at once, twice at most: not again where once took a second.
    """
    if not things:
        return 0.0
    first = timed(lambda: call(things[:1]))  # the first one also compiles and allocates
    rest = things[1:]
    taken, count = 0.0, 0
    while count < min(len(rest), 2 * some) and taken < ENOUGH:
        part = rest[count : count + some]
        taken += timed(lambda part=part: call(part))  # type: ignore[misc]
        count += len(part)
    return first + (taken / count * len(rest) if count else 0.0)


# ---- memory ----


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
