"""Short trainings that leave everything as it was: what they take, step by step."""

from __future__ import annotations

import copy
import logging
import os
import random
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

MIB = 2**20
ENOUGH = 1.0  # seconds: fewer say little of steps that take milliseconds
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
    def taken(self) -> list[float]:
        """Seconds of each step but the first, which also compiles and allocates.

        Of none more than three times the median: on a busy machine one of them may have waited.
        """
        seconds = np.diff(self.ends)
        return list(np.minimum(seconds, 3 * np.median(seconds)))

    @property
    def step(self) -> float:
        """Seconds of a step: the mean, since steps may differ in length."""
        return float(np.mean(self.taken))


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
