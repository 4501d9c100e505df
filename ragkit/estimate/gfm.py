"""What a training of a graph foundation model will take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.estimate.measured import Measured, parameters_of, put_together, short, steps_of, times
from ragkit.estimate.warm_up import Clock, modules_in, seconds_each, twin, warm_up
from ragkit.gfm.batches import BatchKey
from ragkit.gfm.datasets import FinetuneData, GraphQuestions
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.pretrain import GFMPretrainTrainer


def measure_gfm(trainer: GFMFinetuneTrainer | GFMPretrainTrainer, steps: int, folder: Path, ours: bool) -> Measured:
    """What a pre-training or fine-tuning will take.

    Args:
        trainer: Not changed, unless it is ours.
        steps: Steps of the warm-up.
        folder: For the run of the warm-up.
        ours: Whether the trainer was made for this, and need not be copied.
    """
    own = list(trainer.model.parameters())
    warm: Any = copy.copy(trainer)
    warm.model = trainer.model if ours else twin(trainer.model, own)
    warm.config = short(trainer.config, folder)
    warm.config.train.do_eval = False
    warm.run, warm.trainer = None, None
    order = trainer._order()
    if len(order.sizes) > 1:  # each data set in turn: graphs differ in size
        warm.config.train.batch_per_epoch = 1
        steps = max(steps, 2 * len(order.sizes) + 1)
    clock = Clock(steps)
    warm.callbacks = [clock]
    names: list[str] = []

    def make_batch(key: BatchKey) -> dict[str, Any]:
        names.append(key.dataset)
        return trainer.make_batch(key)

    warm.make_batch = make_batch
    training = warm_up(warm.train, clock)
    del warm.make_batch
    settings = trainer.engine_settings(len(order))
    if len(order.sizes) > 1 and settings.gradient_accumulation_steps == 1:
        training.step = _weighted(clock.taken, names[1:], {name: order._count(n) for name, n in order.sizes.items()})
    total = steps_of(len(order), settings)
    evaluation = 0.0
    if settings.eval_steps is not None:
        evaluation = times(total, settings.eval_steps) * scoring_seconds(warm, tests=False)
    model = list(warm.model.parameters())
    weights = [*model, *parameters_of(modules_in(trainer.encoder))]
    return put_together(total, settings, training, 0.0, evaluation, model, model, weights, () if ours else own)


def _weighted(taken: Sequence[float], names: Sequence[str], batches: dict[str, int]) -> float:
    """The mean time of a step over an epoch, from times of steps of each data set."""
    by_name: dict[str, list[float]] = {name: [] for name in batches}
    for name, seconds in zip(names, taken, strict=False):  # the loader reads ahead: there may be more names
        by_name[name].append(seconds)
    means = {name: float(np.mean(found)) for name, found in by_name.items() if found}
    return sum(means[name] * batches[name] for name in means) / sum(batches[name] for name in means)


def scoring_seconds(trainer: Any, tests: bool) -> float:
    """Seconds of one scoring of the validation questions, or of what the command scores before and after."""
    train = trainer.config.train
    some = train.eval_batch_size or train.batch_size
    if isinstance(trainer, GFMPretrainTrainer):
        # A fact makes two questions.
        return sum(
            seconds_each(partial(_score_facts, trainer, name, tests), range(len(part.valid)), -(-some // 2))
            for name, part in trainer.data.items()
        )
    return sum(
        seconds_each(partial(_score_questions, trainer, name, part, tests), range(len(part.questions)), some)
        for name, part in (trainer.data.test if tests else trainer.data.valid).items()
    )


def _score_facts(trainer: GFMPretrainTrainer, name: str, tests: bool, places: Sequence[int]) -> None:
    one = copy.copy(trainer)
    one.data = {name: replace(trainer.data[name], valid=trainer.data[name].valid[list(places)])}
    one.evaluate() if tests else one.validate()


def _score_questions(
    trainer: GFMFinetuneTrainer, name: str, part: GraphQuestions, tests: bool, places: Sequence[int]
) -> None:
    few = {name: GraphQuestions(name, part.graph, part.questions.subset(list(places)))}
    one = copy.copy(trainer)
    one.data = FinetuneData(trainer.data.train, few, few)
    one.evaluate() if tests else one.validate()
