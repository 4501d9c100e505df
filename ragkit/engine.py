"""The one engine: every training of ragkit is a `transformers.Trainer`, with its public hooks only.

`RunTrainer` adds what a Trainer lacks here: a run folder with events that another process can read, a stop flag, an
error at the first loss that is not finite, and checkpoints of models that are not from transformers. Mixed precision,
accumulation, clipping, schedules, DDP by torchrun and the restored state of optimizer, data order and random numbers
are the Trainer's own. A resumed run gives the same curve as an unbroken one as long as the collator draws no random
numbers: the data loader reads one batch ahead, so such draws would fall on the other side of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ragkit.config import TrainConfig
from ragkit.not_finite import NonFiniteLossError, describe
from ragkit.run_callback import NothingLeftError, RunCallback, ZeroGradientWarning, on_any_process
from ragkit.run_state import one_line
from ragkit.runs import Run, RunError, checkpoint_is_complete, checkpoint_step
from ragkit.train_result import TrainResult, result_of
from ragkit.trained_part import TrainedPart, freeze, trainable_parameters

__all__ = [
    "NonFiniteLossError",
    "RunCallback",
    "RunTrainer",
    "TrainResult",
    "TrainedPart",
    "ZeroGradientWarning",
    "freeze",
    "run_training",
    "trainable_parameters",
    "training_arguments",
]
logger = logging.getLogger("ragkit")

LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]


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
        ValueError: Every parameter of the model is frozen, or evaluations are asked for without data.
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
        if args.eval_strategy != "no" and kwargs.get("eval_dataset") is None:
            raise ValueError(f"train.eval_steps: found {args.eval_steps:g}, but there is no evaluation data")
        if not _is_transformers_model(model):
            model = TrainedPart(model)
        if args.n_gpu > 1:
            # `DataParallel` would cut batches apart that hold more than tensors, and copy a model whose `forward` was
            # replaced without its copy's weights.
            logger.warning("one of %d GPUs is used; torchrun --nproc_per_node=%d uses all", args.n_gpu, args.n_gpu)
            args._n_gpu = 1
        self.loss_fn = loss_fn
        self.evaluate_fn = evaluate_fn
        keep, args.save_total_limit = args.save_total_limit, None
        super().__init__(model=model, args=args, **kwargs)
        self.remove_callback(PrinterCallback)  # prints a dictionary a step; the events are in the run folder
        self.run = run
        self._not_finite: tuple[str, tuple[str, ...]] | None = None  # this process's first such batch of the step
        self.run_callback = RunCallback(run, keep)
        self.add_callback(self.run_callback)
        own_loss = loss_fn is not None or type(self).compute_loss is not RunTrainer.compute_loss
        self._mean_loss = own_loss or isinstance(model, TrainedPart)
        if self._mean_loss:
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
        if self._not_finite is None and not bool(torch.isfinite(loss).all()):
            ids = tuple(str(identifier) for identifier in inputs.get("ids") or ())
            step = self.state.global_step + 1
            self._not_finite = (f"the loss is {float(loss):g} at step {step} in the batch of {describe(inputs)}", ids)
        # All processes end together: one that ends alone leaves the others with an error of the connection. They ask
        # each other once a step, at its last batch.
        together = self.args.world_size > 1
        if (self.accelerator.sync_gradients or not together) and on_any_process(bool(self._not_finite), self.args):
            self._end_not_finite()
        return loss

    def _end_not_finite(self) -> None:
        """Says on every process what the first one with such a loss has found."""
        found: list[Any] = [self._not_finite]
        if self.args.world_size > 1:
            found = found * self.args.world_size
            torch.distributed.all_gather_object(found, self._not_finite)
        self._not_finite = None
        words, ids = next(one for one in found if one is not None)
        step = self.state.global_step + 1
        message = (
            f"{words}; the step was not made. If the loss grew before, a smaller train.learning_rate or "
            "train.precision=fp32 helps; otherwise look at these rows."
        )
        if self.is_world_process_zero():
            self.run.log({"step": step, "total": self.state.max_steps, "error": message})
        if self.args.world_size > 1:
            torch.distributed.barrier()  # the launcher ends all of them as soon as one has ended
        raise NonFiniteLossError(message, step, ids)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of one evaluation batch; the Trainer's own way needs a model that returns logits."""
        if not self._mean_loss:
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
        has_data = data is not None and len(data) > 0
        if has_data:
            metrics.update(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        if self.evaluate_fn is not None:
            model: Any = self.model
            was_training = model.training
            values = {f"{metric_key_prefix}_{name}": float(value) for name, value in self.evaluate_fn().items()}
            model.train(was_training)
            self.log(dict(values))
            metrics.update(values)
        if not has_data:  # what the Trainer does at the end of its own evaluation
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
        "disable_tqdm": os.environ.get("TQDM_DISABLE") == "1" or not _may_draw_bars(),
    }
    if train.gradient_checkpointing:
        values[recompute] = True
    if train.save_steps:
        values["save_steps"] = train.save_steps
    if train.eval_steps:
        values["eval_steps"] = train.eval_steps
    return TrainingArguments(**{**values, **over})


# ---- running ----


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
        RunError: `resume` is False, but the run has events already; or a checkpoint cannot be written.
        NonFiniteLossError: The loss became nan or infinite.
    """
    run = trainer.run if run is None else run
    try:
        return _trained(trainer, run, resume)
    finally:
        run.end_resume()


def _trained(trainer: RunTrainer, run: Run, resume: bool) -> TrainResult:
    events = run.events()
    if events and not resume and run.state().name != "running":
        raise RunError(
            f'the run "{run.dir}" has events up to step {max(event.get("step", 0) for event in events)} already; '
            "continue it with resume=True, or train in a new run"
        )
    if not trainer.is_world_process_zero():
        return _train(trainer, run, resume)
    if resume:
        run.begin_resume()
    with run.hold(**_facts(trainer)) as held:
        try:
            result = _train(trainer, run, resume)
        except Exception as error:
            _log_error(trainer, run, error)
            raise
        held.end("stopped" if result.stopped else "finished")
    return result


def _train(trainer: RunTrainer, run: Run, resume: bool) -> TrainResult:
    checkpoint = None
    if resume:
        checkpoint = run.last_checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint is not None else 0
        if checkpoint is None:
            logger.warning("%s has no complete checkpoint: the run starts again from its first step", run.dir)
        if trainer.is_world_process_zero():
            run.drop_checkpoints_after(step)
            run.truncate_events(step if checkpoint is not None else -1)
    # A fresh start draws the same random numbers whatever was computed since the trainer was made.
    set_seed(trainer.args.seed)
    begin = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except NothingLeftError:
        trainer.is_in_train = False
        logger.info("%s is at its last step already", run.dir)
    except Exception as error:
        half = run.checkpoints_dir / f"checkpoint-{trainer.state.global_step}"
        if half.is_dir() and not checkpoint_is_complete(half):  # a full disk: each writer has errors of its own
            raise RunError(_not_written(half, run.last_checkpoint(), error)) from error
        raise
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return _result(trainer, run, time.monotonic() - begin)


def _result(trainer: RunTrainer, run: Run, seconds: float) -> TrainResult:
    stopped = trainer.run_callback.stopped
    result = result_of(run, trainer.state.global_step, stopped, seconds)
    if trainer.is_world_process_zero():
        run.write_metrics({"loss": result.loss, "steps": result.steps, "stopped": stopped, **result.metrics})
    return result


def _facts(trainer: RunTrainer) -> dict[str, Any]:
    """What others shall know of a training: where it computes, and with how many threads and processes."""
    device: Any = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "threads": torch.get_num_threads(), "processes": trainer.args.world_size}


def _log_error(trainer: RunTrainer, run: Run, error: Exception) -> None:
    """The error as an event, for those who read the run; a resumed run drops it, as it is of the step not made."""
    if isinstance(error, NonFiniteLossError) or trainer.state.max_steps <= 0:
        return  # that one is written already; and nothing had begun yet
    with suppress(OSError, RunError):  # the disk is full or the folder gone, which is the error then
        event = {"step": trainer.state.global_step + 1, "total": trainer.state.max_steps, "error": one_line(error)}
        run.log(event)


def _not_written(half: Path, last: Path | None, error: Exception) -> str:
    """What to say of a checkpoint that could not be written to its end."""
    whole = f"{last.name} is whole" if last is not None else "there is none before it"
    free = shutil.disk_usage(half).free / 2**20
    return (
        f"{half} cannot be written: {error} ({free:,.0f} MiB are free on its disk). {whole}: make room, and resume "
        "the run"
    )


def _is_transformers_model(model: nn.Module) -> bool:
    """Whether the Trainer saves the model itself: transformers' own, or a PEFT model around one."""
    if isinstance(model, PreTrainedModel):
        return True
    peft = sys.modules.get("peft")  # a PEFT model cannot exist before PEFT was imported
    return peft is not None and isinstance(model, peft.PeftModel)


def _may_draw_bars() -> bool:
    """Whether there is a screen for progress bars; a worker thread's would land under whatever cell runs just then."""
    if threading.current_thread() is not threading.main_thread():
        return False
    return _in_notebook() or sys.stderr.isatty()


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return type(shell).__name__ == "ZMQInteractiveShell"
