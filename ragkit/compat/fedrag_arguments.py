"""`transformers.TrainingArguments` as ragkit's `TrainConfig`: what is taken over, what is not, what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ragkit.config import ConfigError, TrainConfig

# What FedRAG trains with when it is given no arguments: the defaults of TrainingArguments.
DEFAULTS: dict[str, Any] = {"batch_size": 8, "learning_rate": 5e-5, "num_epochs": 3, "warmup_steps": 0, "seed": 42}

ALWAYS = {  # theirs -> ours, also where it is the default of TrainingArguments
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "num_train_epochs": "num_epochs",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "seed": "seed",
}
IF_CHANGED = {"logging_steps": "logging_steps", "save_total_limit": "save_total_limit"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}

# Without these the training would be another one.
REFUSED = {
    "lr_scheduler_kwargs": "the schedules are linear, cosine and constant, as they are",
    "optim": "the optimizer is AdamW",
    "optim_args": "the optimizer is AdamW",
    "optim_target_modules": "the optimizer is AdamW",
    "adam_beta1": "AdamW runs with its usual betas",
    "adam_beta2": "AdamW runs with its usual betas",
    "adam_epsilon": "AdamW runs with its usual epsilon",
    "label_smoothing_factor": "the losses are those of the papers",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "load_best_model_at_end": "the last state of the model is kept; compare trainer.evaluate() before and after",
    "auto_find_batch_size": "give per_device_train_batch_size, and gradient_accumulation_steps for a larger batch",
    "fsdp": "several processes train by torchrun (DDP)",
    "fsdp_config": "several processes train by torchrun (DDP)",
    "deepspeed": "several processes train by torchrun (DDP)",
    "parallelism_config": "several processes train by torchrun (DDP)",
    "train_sampling_strategy": "questions come in a random order, drawn from the seed",
    "group_by_length": "questions come in a random order, drawn from the seed",
    "batch_sampler": "questions come in a random order, drawn from the seed",
    "data_seed": "the order of the data is drawn from seed",
    "learning_rate_mapping": "all trained parameters share one learning rate",
    "prompts": "a SentenceTransformer's own prompts are used: set model.prompts",
    "router_mapping": "models with routes are not trained",
    "dataloader_drop_last": "the last, smaller batch is trained on too",
}
# Read elsewhere in this module, or set by FedRAG or transformers themselves whatever the user says.
ELSEWHERE = {
    *("output_dir", "max_steps", "save_strategy", "save_steps", "eval_strategy", "eval_steps", "do_eval"),
    *("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "lr_scheduler_type", "warmup_ratio"),
    *("report_to", "remove_unused_columns", "logging_strategy", "dataloader_pin_memory"),
}
UNUSED = {
    "per_device_eval_batch_size": "evaluation uses per_device_train_batch_size",
    "use_cpu": "models are trained where they are: device_map or device in load_model_kwargs",
    "run_name": "the run folder is named by the time; config=LSRConfig(name=...) names it",
    "disable_tqdm": "set the environment variable TQDM_DISABLE=1",
    "resume_from_checkpoint": "use trainer.train(resume=True)",
}


@dataclass
class Converted:
    """What became of training arguments.

    Attributes:
        train: Values of `TrainConfig`.
        output_dir: Folder of the run folders; None: the default.
        unused: (name, value, reason) of what was set and is not used.
    """

    train: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    unused: list[tuple[str, Any, str]] = field(default_factory=list)


def convert_arguments(arguments: Any) -> Converted:
    """Reads training arguments; warns once, with the list, of those that are not used.

    A value counts as set where it differs from what the same class gives without it.

    Args:
        arguments: `transformers.TrainingArguments`, or a class made from it; None: FedRAG's defaults.

    Raises:
        ConfigError: One is set without which the training would be another one.
        TypeError: It is something else.
    """
    if arguments is None:
        return Converted(dict(DEFAULTS))
    if not isinstance(arguments, TrainingArguments):
        hint = "; ragkit's own settings go into config=" if isinstance(arguments, TrainConfig) else ""
        raise TypeError(
            f"training_arguments: expected transformers.TrainingArguments, found {type(arguments).__name__}{hint}"
        )
    plain = type(arguments)(output_dir=arguments.output_dir)
    changed = {
        item.name: value
        for item in dataclasses.fields(arguments)
        if item.init and (value := getattr(arguments, item.name)) != getattr(plain, item.name)
    }
    made = Converted({ours: getattr(arguments, theirs) for theirs, ours in ALWAYS.items()})
    if arguments.output_dir != type(arguments)().output_dir:
        made.output_dir = str(arguments.output_dir)
    for name, value in changed.items():
        if name in IF_CHANGED and value is not None:
            made.train[IF_CHANGED[name]] = value
        elif name in REFUSED and not _same_training(name, value, arguments):
            raise ConfigError(f"training_arguments.{name}: found {_shown(value)}, which is not done here: "
                              f"{REFUSED[name]}; leave it out")  # fmt: skip
        elif name not in {*ALWAYS, *ELSEWHERE, *REFUSED} and not (name == "use_cpu" and not torch.cuda.is_available()):
            made.unused.append((name, value, UNUSED.get(name, "ragkit has no such setting")))
    _read_the_rest(arguments, changed, made)
    if made.unused:
        listed = "".join(f"\n  {name}={_shown(value)}: {reason}" for name, value, reason in made.unused)
        warnings.warn(f"these training_arguments are not used:{listed}", stacklevel=4)
    return made


def _read_the_rest(arguments: Any, changed: dict[str, Any], made: Converted) -> None:
    """The settings that have another form here."""
    train = made.train
    if arguments.max_steps > 0:
        train["max_steps"] = arguments.max_steps
    if changed.get("warmup_ratio") and not train["warmup_steps"]:
        train["warmup_steps"] = changed["warmup_ratio"]
    schedule = _plain(arguments.lr_scheduler_type)
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"training_arguments.lr_scheduler_type: found {schedule!r}, expected one of {', '.join(SCHEDULES)}"
        )
    train["schedule"] = SCHEDULES[schedule]
    if schedule == "constant":
        train["warmup_steps"] = 0  # as transformers understands it
    if arguments.bf16 or arguments.fp16:
        train["precision"] = "bf16" if arguments.bf16 else "fp16"
    if getattr(arguments, "activation_checkpointing", False) or arguments.gradient_checkpointing:
        train["gradient_checkpointing"] = True
    for name in ("save", "eval"):
        strategy, steps = _plain(getattr(arguments, f"{name}_strategy")), getattr(arguments, f"{name}_steps")
        if strategy not in ("no", "steps"):
            reason = f"it is done every {name}_steps steps: set {name}_strategy='steps'"
            made.unused.append((f"{name}_strategy", strategy, reason))
        elif strategy == "no" and name == "save":
            train["save_steps"] = None
        elif strategy == "steps" and (name == "eval" or f"{name}_steps" in changed):
            if steps < 1:
                made.unused.append((f"{name}_steps", steps, "give a number of steps, not a share"))
            else:
                train[f"{name}_steps"] = int(steps)
    if _plain(arguments.logging_strategy) == "steps":
        if train.get("logging_steps", 1) < 1:
            made.unused.append(("logging_steps", train.pop("logging_steps"), "give a number of steps, not a share"))
        else:
            train["logging_steps"] = int(train.get("logging_steps", 1))
    else:
        made.unused.append(("logging_strategy", _plain(arguments.logging_strategy), "an event is written every step"))
    if "report_to" in changed:
        train["report_to"] = [name for name in arguments.report_to if name != "none"]


def _same_training(name: str, value: Any, arguments: Any) -> bool:
    """Whether a value of REFUSED asks for what is done anyway."""
    if name == "optim":
        return _plain(value).startswith("adamw_torch")
    return name == "data_seed" and value in (None, arguments.seed)


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _shown(value: Any) -> str:
    return repr(getattr(value, "value", value))
