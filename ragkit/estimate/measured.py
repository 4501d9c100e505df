"""What a warm-up says of a whole run, in numbers; the same for every kind of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ragkit.base_config import TrainConfig
from ragkit.estimate.memory import size_mib
from ragkit.estimate.warm_up import Training

NEVER = 10**9  # steps


@dataclass
class Measured:
    """What is known of a run.

    Attributes:
        steps: Optimizer steps.
        parameters: All of the model that is trained.
        trained: Those that training moves.
        prepare: Seconds before the first step.
        training: Seconds of the steps and the checkpoints.
        evaluation: Seconds of the evaluations while training.
        weights_mib: Weights of all models in memory.
        trained_mib: Weights that are trained.
        checkpoint_mib: A checkpoint.
        saves: How many are written.
        made: Steps of the warm-up.
        copied_mib: Memory that the measuring took for itself.
    """

    steps: int
    parameters: int
    trained: int
    prepare: float
    training: float
    evaluation: float
    weights_mib: float
    trained_mib: float
    checkpoint_mib: float
    saves: int
    made: int
    copied_mib: float


def put_together(
    steps: int,
    train: TrainConfig,
    training: Training,
    prepare: float,
    evaluation: float,
    model: Iterable[Tensor],
    trained: Iterable[Tensor],
    weights: Iterable[Tensor],
    copied: Iterable[Tensor],
) -> Measured:
    """The whole of a run from its warm-up.

    Args:
        steps: Optimizer steps of the run.
        train: The engine's settings of the run.
        training: The warm-up.
        prepare: Seconds.
        evaluation: Seconds.
        model: Parameters of the model that is trained.
        trained: Those that training moves.
        weights: Parameters of all models in memory.
        copied: Parameters of which there are two only because of the warm-up.
    """
    trained, model = list(trained), list(model)
    saves = times(steps, train.save_steps)
    return Measured(
        steps=steps,
        parameters=sum(p.numel() for p in model),
        trained=sum(p.numel() for p in trained),
        prepare=prepare,
        training=training.once + training.step * (steps - 1) + training.saving * saves,
        evaluation=evaluation,
        weights_mib=size_mib(weights),
        trained_mib=size_mib(trained),
        checkpoint_mib=training.checkpoint_mib,
        saves=saves,
        made=training.made,
        copied_mib=size_mib(copied),
    )


def steps_of(batches: int, train: TrainConfig) -> int:
    """Optimizer steps of a training, as the Trainer counts them.

    Args:
        batches: Batches in an epoch.
        train: max_steps, num_epochs and gradient_accumulation_steps are read.
    """
    if train.max_steps:
        return train.max_steps
    return math.ceil(max(1, math.ceil(batches / train.gradient_accumulation_steps)) * train.num_epochs)


def times(steps: int, every: int | None) -> int:
    """How often something happens that comes every so many steps, and at the end."""
    return 1 if every is None else math.ceil(steps / every)


def short(config: Any, folder: Path) -> Any:
    """The settings of the warm-up: no end but the one that its clock gives it, and nothing on the way."""
    config = config.model_copy(deep=True)
    config.output_dir, config.name = str(folder), None
    train = config.train
    train.max_steps, train.save_steps, train.eval_steps, train.report_to = NEVER, NEVER, None, []
    return config


def parameters_of(modules: Sequence[Any]) -> list[Tensor]:
    """The parameters of all modules."""
    return [parameter for module in modules for parameter in module.parameters()]
