"""What a training gave, put together from the events of its run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ragkit.best import Kept
from ragkit.runs import Run
from ragkit.tables import html_table


@dataclasses.dataclass(repr=False)
class TrainResult:
    """What a training gave.

    Attributes:
        loss: Mean training loss over all steps of the run (over all resumes), in the units of the loss.
        history: The events of the run, one dictionary a logged step or evaluation.
        steps: Optimizer steps made.
        run_dir: The run folder.
        stopped: Whether the stop flag ended the training before its last step.
        metrics: Last value of every evaluation, and how long it took.
        kept: Which weights the training ended with, where they were chosen by held-out questions (LSR).
    """

    loss: float
    history: list[dict[str, Any]]
    steps: int
    run_dir: Path
    stopped: bool = False
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: Kept | None = None

    def _rows(self) -> list[tuple[str, str]]:
        losses = [event["loss"] for event in self.history if event.get("loss") is not None]
        curve = f"{self.loss:.4f} (first {losses[0]:.4f}, last {losses[-1]:.4f})" if losses else f"{self.loss:.4f}"
        rows = [("mean loss", curve), ("steps", f"{self.steps}{' (stopped early)' if self.stopped else ''}")]
        rows += [(name, f"{value:.4f}") for name, value in self.metrics.items() if name.startswith("eval_")]
        if self.kept is not None:
            rows.append(("kept", str(self.kept)))
        if "seconds" in self.metrics:
            rows.append(("time", f"{self.metrics['seconds']:.1f} s"))
        return [*rows, ("run folder", str(self.run_dir))]

    def __repr__(self) -> str:
        return "TrainResult(" + ", ".join(f"{name} {value}" for name, value in self._rows()) + ")"

    def _repr_html_(self) -> str:
        return html_table([["training", ""], *self._rows()])


def result_of(run: Run, steps: int, stopped: bool, seconds: float) -> TrainResult:
    """The result of a training.

    Args:
        run: Its run folder.
        steps: Optimizer steps made.
        stopped: Whether it was ended before its last step.
        seconds: How long it took, where the events do not say.
    """
    history = run.events()
    evaluations: dict[str, Any] = {}
    total, last, elapsed = 0.0, 0, seconds
    for event in history:
        if event.get("loss") is not None:
            total += event["loss"] * (event["step"] - last)  # an event holds the mean since the last one
            last = event["step"]
        elapsed = event.get("elapsed") or elapsed
        evaluations.update({name: value for name, value in event.items() if name.startswith("eval_")})
    loss = total / last if last else math.nan
    metrics = {**evaluations, "seconds": elapsed}
    return TrainResult(loss, history, steps, run.dir, stopped, metrics)
