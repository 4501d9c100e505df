"""The one engine: every training of ragkit is a `transformers.Trainer`, with its public hooks only.

`RunTrainer` adds what a Trainer lacks here: a run folder with events that another process can read, a stop flag, an
error at the first loss that is not finite, and checkpoints of models that are not from transformers. Mixed precision,
accumulation, clipping, schedules, DDP by torchrun and the restored state of optimizer, data order and random numbers
are the Trainer's own. A resumed run gives the same curve as an unbroken one as long as the collator draws no random
numbers: the data loader reads one batch ahead, so such draws would fall on the other side of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import html
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ragkit.config import TrainConfig
from ragkit.runs import Run, RunError, checkpoint_step, mark_complete

logger = logging.getLogger("ragkit")

LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]
ZERO_GRADIENT_STEPS = 3
_NOT_EVENTS = ("epoch", "total_flos", "_runtime", "_per_second")  # the Trainer's speeds; `elapsed` says it once


class NonFiniteLossError(RuntimeError):
    """The loss became nan or infinite.

    Attributes:
        step: The optimizer step (counted from 1) that was not made.
        ids: Ids of the questions in the batch, empty if the batch carries none.
    """

    def __init__(self, message: str, step: int, ids: tuple[str, ...] = ()):
        super().__init__(message)
        self.step = step
        self.ids = ids


class ZeroGradientWarning(UserWarning):
    """The gradient of the trained part was exactly 0 for several steps: nothing is being learned."""


# ---- freezing ----


def freeze(module: nn.Module) -> nn.Module:
    """Takes every parameter of `module` out of training (`requires_grad`) and turns dropout off (`eval`)."""
    module.requires_grad_(False)
    return module.eval()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class TrainedPart(nn.Module):
    """Wraps a model that is not from transformers so that checkpoints hold just its trained tensors.

    The Trainer writes `state_dict()` of such a model as safetensors, which refuses tensors that share memory, and a
    checkpoint need not repeat the frozen part. Attributes of the wrapped module can be reached through the wrapper.
    Buffers are saved too (running statistics change while training).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained parameters and buffers by name, each shared tensor once."""
        return {name: tensor.detach().contiguous() for name, tensor in self._saved_tensors().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies the tensors of a checkpoint back.

        Raises:
            RunError: The checkpoint lacks a trained tensor, or has one of another name or shape.
        """
        own = self._saved_tensors()
        wrong = sorted(own.keys() ^ state_dict.keys())
        wrong += [name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape]
        if wrong:
            raise RunError(
                f"the checkpoint does not fit the model: {len(wrong)} tensors are missing, unknown or of another "
                f"shape, for example {wrong[0]!r}; it was made with other settings "
                "(which part is trained, which encoder)"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def _saved_tensors(self) -> dict[str, Tensor]:
        # named_parameters and named_buffers name a shared tensor once; the first name stands for all.
        tensors: dict[str, Tensor] = dict(trainable_parameters(self.module))
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if buffer is not None}
        saved = super().state_dict().keys()  # leaves out buffers that are not persistent
        tensors.update({name: buffer for name, buffer in buffers.items() if f"module.{name}" in saved})
        return tensors


# ---- the Trainer ----


class RunTrainer(Trainer):
    """A `transformers.Trainer` that lives in a run folder.

    The loss is the model's own (`outputs.loss`), that of `loss_fn(model, batch)`, or that of a subclass's
    `compute_loss`; the latter two return the mean over the batch. A batch may carry `"ids"` (a list of question ids):
    they are kept from the model's own loss and named in errors.

    Args:
        model: What is trained; only parameters with `requires_grad` change. Any `nn.Module`.
        args: From `training_arguments`.
        run: The run folder that takes events, metrics and checkpoints.
        loss_fn: Called with (model, batch); returns a scalar with gradient. None: `compute_loss` as it is.
        evaluate_fn: Called at every evaluation, returns numbers by name; they are logged as `eval_NAME`.
        **kwargs: As for `transformers.Trainer` (train_dataset, data_collator, eval_dataset, callbacks ...).

    Raises:
        ValueError: Every parameter of the model is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        run: Run,
        loss_fn: LossFunction | None = None,
        evaluate_fn: Callable[[], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ):
        if not trainable_parameters(model):
            raise ValueError("there is nothing to train: every parameter of the model has requires_grad=False")
        if evaluate_fn is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # the Trainer asks for a data set before it calls `evaluate`
        if not _is_transformers_model(model):
            model = TrainedPart(model)
        self.loss_fn = loss_fn
        self.evaluate_fn = evaluate_fn
        keep, args.save_total_limit = args.save_total_limit, None
        super().__init__(model=model, args=args, **kwargs)
        self.remove_callback(PrinterCallback)  # prints a dictionary a step; the events are in the run folder
        self.run = run
        self.run_callback = RunCallback(run, keep)
        self.add_callback(self.run_callback)
        self._own_loss = loss_fn is not None or type(self).compute_loss is not RunTrainer.compute_loss
        if self._own_loss or isinstance(model, TrainedPart):
            # Such a loss is a mean over its batch: the Trainer has to divide it by the accumulated batches, which it
            # leaves out for models that are given `num_items_in_batch`.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `loss_fn`, or the model's own."""
        if self.loss_fn is not None:
            loss = self.loss_fn(model, inputs)
            return (loss, None) if return_outputs else loss
        inputs = {name: value for name, value in inputs.items() if name != "ids"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass; a loss that is not finite ends the run before the optimizer sees it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss).all()):
            step = self.state.global_step + 1
            ids = tuple(str(identifier) for identifier in inputs.get("ids") or ())
            message = (
                f"the loss is {float(loss):g} at step {step} in the batch of {_describe(inputs)}; the step was not "
                "made. If the loss grew before, a smaller train.learning_rate or train.precision=fp32 helps; "
                "otherwise look at these rows."
            )
            self.run.log({"step": step, "total": self.state.max_steps, "error": message})
            raise NonFiniteLossError(message, step, ids)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of one evaluation batch; the Trainer's own way needs a model that returns logits."""
        if not self._own_loss:
            inputs = {name: value for name, value in inputs.items() if name != "ids"}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach().mean(), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss on the evaluation data (if there is any) and the values of `evaluate_fn`."""
        metrics: dict[str, float] = {}
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is not None and len(data):
            metrics.update(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        if self.evaluate_fn is not None:
            model: Any = self.model
            was_training = model.training
            values = {f"{metric_key_prefix}_{name}": float(value) for name, value in self.evaluate_fn().items()}
            model.train(was_training)
            self.log(dict(values))
            metrics.update(values)
        return metrics


class RunCallback(TrainerCallback):
    """Writes the events of a run, watches its stop flag and warns when nothing is being learned.

    Every logged step is one event: step, total, epoch, loss, learning_rate, grad_norm, elapsed and remaining (seconds;
    elapsed goes on over resumes). Evaluations are events with the `eval_...` values.
    """

    def __init__(self, run: Run, keep_checkpoints: int | None = None):
        self.run = run
        self._keep = keep_checkpoints
        self._begin = time.monotonic()
        self._elapsed_before = 0.0
        self._first_step = 0
        self._zero_gradients = 0
        self._warned = False
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Sets the clock to where the run was."""
        self._begin = time.monotonic()
        self._first_step = state.global_step
        self._elapsed_before = max((event.get("elapsed") or 0.0 for event in self.run.events()), default=0.0)
        self._zero_gradients, self._warned, self.stopped = 0, False, False

    def on_step_end(self, args, state, control, **kwargs):
        """Ends the training with a checkpoint where asked; logs wherever a checkpoint is saved."""
        if self._stop_is_requested(args):
            control.should_save = True
            control.should_training_stop = True
            self.stopped = state.global_step < state.max_steps
        if state.global_step >= state.max_steps:
            control.should_save = True
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
        requested = self.run.stop_requested
        if args.world_size > 1 and torch.distributed.is_initialized():
            flag = torch.tensor([float(requested)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            requested = bool(flag.item() > 0)
        return requested


def training_arguments(train: TrainConfig, run: Run, device: str = "auto", **over: Any) -> TrainingArguments:
    """The Trainer's arguments for our settings; sets PyTorch's threads where `train.num_threads` is given.

    Args:
        train: Batches, optimizer, schedule and so on.
        run: Run folder; checkpoints go to its `checkpoints/`.
        device: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda" or "mps".
        **over: Arguments of `transformers.TrainingArguments` that win over ours (`disable_tqdm=False` ...).

    Returns:
        `transformers.TrainingArguments`.

    Raises:
        ValueError: fp16 is asked for without a GPU.
    """
    kind = device.split(":")[0]
    use_cpu = kind == "cpu" or (kind == "auto" and not torch.cuda.is_available())
    if train.precision == "fp16" and use_cpu:
        raise ValueError('train.precision: found "fp16", which needs a GPU; on a CPU use "fp32" or "bf16"')
    if train.num_threads is not None:
        torch.set_num_threads(train.num_threads)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    schedule = train.schedule
    values: dict[str, Any] = {
        "output_dir": str(run.checkpoints_dir),
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.num_epochs,
        "max_steps": train.max_steps or -1,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" and train.warmup_steps else schedule,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "seed": train.seed,
        "data_seed": train.seed,  # without it, the data order depends on what drew random numbers before
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if train.save_steps else "no",  # RunCallback saves at the end and on stop
        "eval_strategy": "steps" if train.eval_steps else "no",
        "save_total_limit": train.save_total_limit,
        "remove_unused_columns": False,
        "report_to": list(train.report_to) or "none",
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "disable_tqdm": not (_in_notebook() or sys.stderr.isatty()),
    }
    if train.gradient_checkpointing:
        values[recompute] = True
    if train.save_steps:
        values["save_steps"] = train.save_steps
    if train.eval_steps:
        values["eval_steps"] = train.eval_steps
    return TrainingArguments(**{**values, **over})


# ---- running ----


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
    """

    loss: float
    history: list[dict[str, Any]]
    steps: int
    run_dir: Path
    stopped: bool = False
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _rows(self) -> list[tuple[str, str]]:
        losses = [event["loss"] for event in self.history if event.get("loss") is not None]
        curve = f"{self.loss:.4f} (first {losses[0]:.4f}, last {losses[-1]:.4f})" if losses else f"{self.loss:.4f}"
        rows = [("mean loss", curve), ("steps", f"{self.steps}{' (stopped early)' if self.stopped else ''}")]
        rows += [(name, f"{value:.4f}") for name, value in self.metrics.items() if name.startswith("eval_")]
        if "seconds" in self.metrics:
            rows.append(("time", f"{self.metrics['seconds']:.1f} s"))
        return [*rows, ("run folder", str(self.run_dir))]

    def __repr__(self) -> str:
        return "TrainResult(" + ", ".join(f"{name} {value}" for name, value in self._rows()) + ")"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows()
        )
        return f"<table>{rows}</table>"


def run_training(trainer: RunTrainer, run: Run | None = None, resume: bool = False) -> TrainResult:
    """Trains to the end, to the stop flag or to an error.

    Args:
        trainer: The trainer.
        run: Its run folder; None: `trainer.run`.
        resume: Goes on from the last complete checkpoint with the state of optimizer, schedule, data order and random
            numbers. Later events are dropped first, so the curve is that of an unbroken run. Without a checkpoint the
            run starts again from its first step.

    Returns:
        A `TrainResult`; `metrics.json` of the run holds its loss, steps and last evaluation.

    Raises:
        RunError: `resume` is False, but the run has events already.
        NonFiniteLossError: The loss became nan or infinite.
    """
    run = trainer.run if run is None else run
    events = run.events()
    checkpoint = None
    if resume:
        checkpoint = run.last_checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint is not None else 0
        if checkpoint is None:
            logger.warning("%s has no complete checkpoint: the run starts again from its first step", run.dir)
        if trainer.is_world_process_zero():
            run.drop_checkpoints_after(step)
            run.truncate_events(step if checkpoint is not None else -1)
            run.clear_stop()
    elif events:
        raise RunError(
            f'the run "{run.dir}" has events up to step {max(event.get("step", 0) for event in events)} already; '
            "continue it with resume=True, or train in a new run"
        )
    # A fresh start draws the same random numbers whatever was computed since the trainer was made.
    set_seed(trainer.args.seed)
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return _result(trainer, run, time.monotonic() - begin)


def _result(trainer: RunTrainer, run: Run, seconds: float) -> TrainResult:
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
    steps = trainer.state.global_step
    stopped = trainer.run_callback.stopped
    metrics = {**evaluations, "seconds": elapsed}
    if trainer.is_world_process_zero():
        run.write_metrics({"loss": loss, "steps": steps, "stopped": stopped, **metrics})
    return TrainResult(loss, history, steps, run.dir, stopped, metrics)


def _is_transformers_model(model: nn.Module) -> bool:
    """Whether the Trainer saves the model itself: transformers' own, or a PEFT model around one."""
    if isinstance(model, PreTrainedModel):
        return True
    peft = sys.modules.get("peft")  # a PEFT model cannot exist before PEFT was imported
    return peft is not None and isinstance(model, peft.PeftModel)


def _describe(inputs: Mapping[str, Any], shown: int = 8) -> str:
    """A batch in a few words: its question ids, or the shapes of its tensors."""
    ids: Iterable[Any] | None = inputs.get("ids")
    if ids:
        names = [str(identifier) for identifier in ids]
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        return f"the questions {', '.join(names[:shown])}{more}"
    shapes = [f"{name} {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor)]
    return ", ".join(shapes) or f"the fields {', '.join(inputs)}"


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return type(shell).__name__ == "ZMQInteractiveShell"
