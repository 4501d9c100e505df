"""The one `TrainerCallback`: writes the events of a run, watches its stop flag and its gradient."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed
from transformers import TrainerCallback, TrainingArguments

from ragkit.runs import Run, mark_complete
from ragkit.units import duration

logger = logging.getLogger("ragkit")

ZERO_GRADIENT_STEPS = 3
ESTIMATE_STEPS = 4  # the first of them also compiles and allocates, so it is not counted
_NOT_EVENTS = ("epoch", "total_flos", "_runtime", "_per_second")  # the Trainer's speeds; `elapsed` says it once


class ZeroGradientWarning(UserWarning):
    """The gradient of the trained part was exactly 0 for several steps: nothing is being learned."""


class NothingLeftError(RuntimeError):
    """The resumed run is at its last step; raised once the weights are loaded, caught by `run_training`."""


class RunCallback(TrainerCallback):
    """Writes the events of a run, watches its stop flag and warns when nothing is being learned.

    Every logged step is one event: step, total, epoch, loss, learning_rate, grad_norm, elapsed and remaining (seconds;
    elapsed goes on over resumes), on a GPU also gpu_mib (the most memory so far). Evaluations are events with the
    `eval_...` values.
    """

    def __init__(self, run: Run, keep_checkpoints: int | None = None):
        self.run = run
        self._keep = keep_checkpoints
        self._begin = time.monotonic()
        self._elapsed_before = 0.0
        self._first_step = 0
        self._zero_gradients = 0
        self._warned = False
        self._second_step = 0.0
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Sets the clock to where the run was; a run at its end would be given one more step by the Trainer."""
        if state.global_step >= state.max_steps:
            raise NothingLeftError(f"{self.run.dir} is at step {state.global_step} of {state.max_steps} already")
        self._begin = time.monotonic()
        self._first_step = state.global_step
        self._elapsed_before = max((event.get("elapsed") or 0.0 for event in self.run.events()), default=0.0)
        self._zero_gradients, self._warned, self.stopped = 0, False, False

    def on_step_end(self, args, state, control, **kwargs):
        """Ends the training with a checkpoint where asked; logs wherever a checkpoint is saved."""
        self._estimate(state)
        if self._stop_is_requested(args):
            control.should_save = True
            control.should_training_stop = True
            self.stopped = state.global_step < state.max_steps
        if state.global_step >= state.max_steps:
            control.should_save = True
            control.should_evaluate = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        if control.should_save:
            # The mean loss since the last event lives in memory only: without an event here, the curve of a resumed
            # run would differ where logging_steps is above 1.
            control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Turns the Trainer's log into an event."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        values = {name: value for name, value in logs.items() if not name.endswith(_NOT_EVENTS)}
        elapsed = self._elapsed_before + time.monotonic() - self._begin
        done = state.global_step - self._first_step
        left = state.max_steps - state.global_step
        remaining = (time.monotonic() - self._begin) / done * left if done else None
        event = {"step": state.global_step, "total": state.max_steps, "epoch": state.epoch, **values}
        if args.device.type == "cuda":
            event["gpu_mib"] = torch.cuda.max_memory_allocated(args.device) / 2**20
        self.run.log({**event, "elapsed": elapsed, "remaining": remaining})
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float | int))
        logger.info("step %d/%d %s", state.global_step, state.max_steps, shown)
        if "grad_norm" in logs:
            self._watch_gradient(float(logs["grad_norm"]), state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Marks the checkpoint as complete, and forgets the stop request that led to it."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if path.is_dir():
            mark_complete(path)
            # The Trainer's own rotation deletes the old one before the new one is known to be whole.
            self.run.drop_old_checkpoints(self._keep)
        if control.should_training_stop:
            self.run.clear_stop()

    def _estimate(self, state) -> None:
        """Says after a few steps how long the run will take, and how much memory it has taken so far."""
        done = state.global_step - self._first_step
        if done == 1:
            self._second_step = time.monotonic()
        if done != ESTIMATE_STEPS or not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        seconds = (time.monotonic() - self._second_step) / (done - 1)
        left = seconds * (state.max_steps - state.global_step)
        logger.info(
            "estimate: %.3g s a step, about %s for the %d steps left (without evaluations), peak memory so far %s",
            seconds,
            duration(left),
            state.max_steps - state.global_step,
            _peak_memory(),
        )

    def _watch_gradient(self, norm: float, step: int) -> None:
        self._zero_gradients = self._zero_gradients + 1 if norm == 0.0 else 0
        if self._zero_gradients >= ZERO_GRADIENT_STEPS and not self._warned:
            self._warned = True
            message = (
                f"the gradient of the trained part was exactly 0 at the last {self._zero_gradients} logged steps (up "
                f"to step {step}): the loss does not reach the weights, so nothing is learned. Is the loss computed "
                "from tensors with a gradient, is the right part unfrozen, and do the rows differ at all?"
            )
            self.run.log({"step": step, "warning": message})
            warnings.warn(message, ZeroGradientWarning, stacklevel=2)

    def _stop_is_requested(self, args: TrainingArguments) -> bool:
        """The same answer on every process: one that stops alone would leave the others waiting for ever."""
        return on_any_process(self.run.stop_requested, args)


def on_any_process(flag: bool, args: TrainingArguments) -> bool:
    """Whether it is so on one of the processes: the same answer on all, which have to ask together."""
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return flag
    found = torch.tensor([float(flag)], device=args.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item() > 0)


def _peak_memory() -> str:
    """The most memory of this process so far: of the GPU if it has one, else of the machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of {torch.cuda.get_device_name()}"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
