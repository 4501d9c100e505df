"""The best weights of a training: kept in the run's folder while it goes on, and what it may end with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

from ragkit.files import atomic_write_json
from ragkit.processes import world_size
from ragkit.runs import Run, RunError

BEST = "best.json"


@dataclass(frozen=True)
class Kept:
    """Which weights a training ended with.

    Attributes:
        step: The step they are of; 0: those it began with.
        steps: Steps that were made.
        metric: What they were chosen by.
        value: Its value at that step.
        start: Its value before the first step.
        questions: Held-out questions behind it.
    """

    step: int
    steps: int
    metric: str
    value: float
    start: float
    questions: int

    def __str__(self) -> str:
        on = f"the {self.questions} held-out questions"
        if self.step == 0:
            return f"step 0: training did not help on {on} ({self.metric} {self.start:.4f} before it, never better)"
        return f"step {self.step} of {self.steps}: {self.metric} {self.start:.4f} -> {self.value:.4f} on {on}"


def best_of(run: Run) -> dict[str, Any] | None:
    """{"metric", "value", "step"} of the best evaluation of a run; None if it has had none.

    Raises:
        RunError: The file is corrupt.
    """
    path = run.dir / BEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "metric": str(found["metric"]), "value": float(found["value"]), "step": int(found["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error!r}); start a new run") from error


def keep_if_better(
    run: Run, metric: str, value: float, step: int, save: Callable[[], Any], lower_is_better: bool = False
) -> bool:
    """Keeps the weights of an evaluation if it is better than all before; called by the first process only.

    A resumed run compares with what it had reached, and comes to the same best: an evaluation that it makes again has
    the same value, which is not better.

    Args:
        run: The run; its `best.json` says what is kept.
        metric: Name of the value.
        value: The value; nan is never better.
        step: The step it is of.
        save: Writes the weights, atomically.
        lower_is_better: The direction.

    Returns:
        Whether they are kept.
    """
    before = best_of(run)
    sign = -1.0 if lower_is_better else 1.0
    if value != value or (before is not None and not sign * value > sign * before["value"]):
        return False
    # The weights first: a run that is killed in between finds the same ones again when it is resumed, because its
    # last checkpoint is from before this evaluation.
    save()
    atomic_write_json(run.dir / BEST, {"metric": metric, "value": value, "step": step})
    return True


def give_to_all(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the first one's weights; nothing to do for a single process."""
    if world_size() > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)
