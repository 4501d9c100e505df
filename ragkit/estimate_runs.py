"""What a short training of each kind says of the whole one; `ragkit.estimate` puts it into words."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ragkit.base_config import TrainConfig
from ragkit.evaluation import evaluate
from ragkit.gfm.datasets import FinetuneData, GraphQuestions
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.pretrain import GFMPretrainTrainer
from ragkit.lsr_config import LSRConfig
from ragkit.runs import Run
from ragkit.tuning.lora import adapter_parameters, is_peft_model
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.qa_data import QAExample
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.scoring import has_no_token
from ragkit.tuning.selection import Selection, hold_out_examples, judged_by_passages
from ragkit.tuning.teacher import LSRRow, build_rows
from ragkit.warm_up import Clock, Training, modules_in, seconds_each, size_mib, twin, warm_up

NEVER = 10**9  # steps
NEW_PAIRS = 0.5  # share of the passages that a refresh of LSR finds anew; not known before


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


def steps_of(examples: int, train: TrainConfig) -> int:
    """Optimizer steps of a training, as the Trainer counts them."""
    if train.max_steps:
        return train.max_steps
    batches = math.ceil(examples / train.batch_size)
    return math.ceil(max(1, math.ceil(batches / train.gradient_accumulation_steps)) * train.num_epochs)


def times(steps: int, every: int | None) -> int:
    """How often something happens that comes every so many steps and at the end."""
    return 1 if every is None else math.ceil(steps / every)


# ---- LSR and RALT ----


def measure_lsr(trainer: LSRTrainer, steps: int, folder: Path, ours: bool) -> Measured:
    """What an LSR training will take.

    Args:
        trainer: Not changed, unless it is ours.
        steps: Steps of the warm-up.
        folder: For the run of the warm-up.
        ours: Whether the trainer was made for this, and need not be copied.
    """
    config, generator = trainer.config, trainer.system.generator
    shared_side = config.train_part == "query" and getattr(trainer.system.retriever, "shared", False)
    moved = [] if shared_side else _parameters(trainer.system.retriever.trainable_modules(config.train_part).values())
    system = trainer.system if ours else _system_twin(trainer.system, moved)
    retriever: Any = system.retriever
    retriever.refresh = lambda: None  # encoding all passages is measured on some, and must not reach a server's store
    to_train, held = hold_out_examples(trainer.data, config)
    rows = trainer._rows
    count = len(rows) if rows is not None else len(_usable(generator, to_train, callable(trainer.teacher)))
    short: LSRConfig = _short(config, folder)
    short.keep, short.refresh_steps, short.score_cache = "last", None, None
    # The training: the language model has no part in it.
    mixed = _mixed(to_train, config.train.seed)
    wanted = 2 * steps * config.train.batch_size * config.train.gradient_accumulation_steps
    some = _mixed(rows or [], config.train.seed)[:wanted]
    some = some or build_rows(system, mixed[:wanted], short, _any_score)[0]
    ids = {row.id for row in some}
    sample = [example for example in to_train if example.id in ids] or mixed[:wanted]
    score = partial(build_rows, system, config=short, teacher=trainer.teacher)
    by_loss = bool(held) and not judged_by_passages(held)
    to_score = [] if rows else _mixed(_usable(generator, to_train, callable(trainer.teacher)), config.train.seed)
    to_score = to_score + (held if by_loss and not trainer._held_rows else [])
    prepare = seconds_each(lambda part: score(part), to_score, -(-2 * config.score_batch_size // config.top_k))
    clock = Clock(steps)
    warm = LSRTrainer(system, sample, short, teacher=_any_score, rows=some or None)
    warm.callbacks = [clock]
    training = warm_up(warm.train, clock)
    total = steps_of(count, config.train)
    # The evaluations, each as often as it comes.
    run = Run(folder / "none")
    held_rows: list[LSRRow] = build_rows(system, held[:64], short, _any_score)[0] if by_loss else []
    things: Sequence[Any] = [e for e in held if e.supporting] if not by_loss else held_rows
    choosing = seconds_each(lambda part: _score_held(system, part, config, run, by_loss), things)
    choosing *= len(held) / len(things) if by_loss and things else 1
    every = config.train.eval_steps
    if held:
        every = Selection(system, held, config, run, 1.0, held_rows).engine_settings(config.train, count).eval_steps
    often = times(total, every) if every is not None else 0
    evaluation = (often + 1) * choosing
    if trainer.eval_data is not None and config.train.eval_steps is not None:
        scoring = partial(evaluate, system, generate=False, bootstrap=100)
        evaluation += often * seconds_each(lambda part: scoring(part), list(trainer.eval_data))
    if config.train_part == "both":
        evaluation += (often + 1) * _indexing(retriever)
    if config.refresh_steps is not None:
        anew = seconds_each(lambda part: score(part), mixed, -(-config.score_batch_size // config.top_k)) * NEW_PAIRS
        again = _indexing(retriever) if config.train_part == "both" else 0.0
        training.once += (total - 1) // config.refresh_steps * (anew + again)
    trained = list(warm.trained_parameters().values())
    module = _parameters(retriever.trainable_modules(config.train_part).values())
    copied = () if ours else moved
    parts = [retriever, generator.model]
    return _measured(total, config.train, module, trained, parts, training, prepare, evaluation, copied)


def measure_ralt(trainer: RALTTrainer, steps: int, folder: Path, ours: bool) -> Measured:
    """What a RALT training will take; the arguments are those of `measure_lsr`."""
    config, generator = trainer.config, trainer.system.generator
    moved: list[Any] = []
    if config.method == "full":
        moved = list(generator.model.parameters())
    elif is_peft_model(generator.model):
        moved = adapter_parameters(generator.model)
    system = trainer.system if ours else _system_twin(trainer.system, moved, tunes="generator")
    each = min(config.top_k, len(system.retriever.store)) if config.context == "each" else 1
    usable = _usable(generator, trainer.data)
    count = len(trainer._rows) if trainer._rows is not None else len(usable) * each
    short = _short(config, folder)
    mixed = _mixed(usable if trainer._rows is None else trainer.data, config.train.seed)
    wanted = 2 * steps * config.train.batch_size * config.train.gradient_accumulation_steps
    sample = mixed[: -(-wanted // each)]
    scored = _usable(generator, trainer.eval_data or [])
    to_make = (mixed if trainer._rows is None else []) + scored
    plain = _short(config, folder)
    prepare = seconds_each(lambda part: RALTTrainer(system, part, plain).rows(), to_make)
    evaluates = bool(scored) and config.train.eval_steps is not None
    few = scored[: 2 * config.train.batch_size]
    if evaluates:
        short.train.eval_steps = NEVER
    clock = Clock(steps)
    warm = trainer.for_data(sample or list(trainer.data), few if evaluates else None)
    warm.system, warm.config, warm.passages, warm.callbacks = system, short, "retrieved", [clock]
    training = warm_up(warm.train, clock)
    total = steps_of(count, config.train)
    often = times(total, config.train.eval_steps) if evaluates else 0
    evaluation = often * training.evaluation * (len(scored) / len(few) if few else 0)
    trained = list(warm.trained_parameters().values())
    module = list(system.generator.model.parameters())
    parts = [system.retriever, system.generator.model]
    return _measured(total, config.train, module, trained, parts, training, prepare, evaluation, () if ours else moved)


def scoring_seconds(system: Any, test: Sequence[Any], **scoring: Any) -> float:
    """Seconds of one scoring of the test questions by the command."""
    return seconds_each(lambda part: evaluate(system, part, **scoring), list(test))


def _any_score(example: QAExample, found: Sequence[Any]) -> list[float]:
    """A teacher that costs nothing: a step takes as long with any scores."""
    return [-float(place) for place in range(len(found))]


def _score_held(system: Any, part: Sequence[Any], config: LSRConfig, run: Run, by_loss: bool) -> None:
    examples, rows = ([], part) if by_loss else (part, [])
    selection = Selection(system, examples, config, run, 1.0, rows)
    selection.by_passages = not by_loss
    selection.measure()


def _indexing(retriever: Any) -> float:
    """Seconds in which the passages are encoded anew."""
    if not hasattr(retriever, "encode_passages"):
        return 0.0
    texts = [passage.full_text for passage in retriever.store.passages()]
    return seconds_each(retriever.encode_passages, texts, 64)


def _usable(generator: Any, examples: Sequence[QAExample], by_function: bool = False) -> list[QAExample]:
    """The questions that can be trained on: those with an answer that the language model has tokens for."""
    return [e for e in examples if e.answer and (by_function or not has_no_token(generator, e))]


def _mixed(things: Sequence[Any], seed: int) -> list[Any]:
    """In a random order, so that any part of them is like the whole."""
    return random.Random(f"estimate:{seed}").sample(list(things), len(things))


def _short(config: Any, folder: Path) -> Any:
    """The settings of the warm-up: they end when its clock says so."""
    short = config.model_copy(deep=True)
    short.output_dir, short.name = str(folder), None
    train = short.train
    train.max_steps, train.save_steps, train.eval_steps, train.report_to = NEVER, NEVER, None, []
    return short


def _system_twin(system: Any, moved: Sequence[Any], tunes: str = "retriever") -> Any:
    """The system with a part that can be trained in the original's place."""
    other = copy.copy(system)
    retriever, generator = system.retriever, system.generator
    kept = [vars(retriever).get(name) for name in ("store", "graph", "_incidence", "linker", "fallback")]
    kept = [part for part in kept if part is not None]
    other.retriever = twin(retriever, moved if tunes == "retriever" else (), kept)
    other.generator = copy.copy(generator)
    other.generator.model = twin(generator.model, moved if tunes == "generator" else ())
    return other


# ---- the graph foundation model ----


def measure_gfm(trainer: Any, steps: int, folder: Path, ours: bool) -> Measured:
    """What a pre-training or fine-tuning will take; the arguments are those of `measure_lsr`."""
    config = trainer.config
    warm = copy.copy(trainer)
    moved = list(trainer.model.parameters())
    warm.model = trainer.model if ours else twin(trainer.model, moved)
    warm.config = _short(config, folder)
    warm.config.train.do_eval = False
    clock = Clock(steps)
    warm.run, warm.trainer, warm.callbacks = None, None, [clock]
    training = warm_up(warm.train, clock)
    settings = trainer.engine_settings(len(trainer._order()))
    examples = sum(trainer.sizes.values())
    batches = TrainConfig(**{**settings.model_dump(), "batch_size": 1})
    total = steps_of(len(trainer._order()), batches) if examples else 0
    evaluation = 0.0
    if settings.eval_steps is not None:
        evaluation = times(total, settings.eval_steps) * gfm_scoring_seconds(warm, tests=False)
    parameters = list(warm.model.parameters())
    parts = [warm.model, *modules_in(trainer.encoder)]
    return _measured(total, settings, parameters, parameters, parts, training, 0.0, evaluation, () if ours else moved)


def gfm_scoring_seconds(trainer: Any, tests: bool) -> float:
    """Seconds of one scoring of the validation questions, or of what the command scores before and after."""
    train = trainer.config.train
    some = train.eval_batch_size or train.batch_size
    seconds = 0.0
    if isinstance(trainer, GFMPretrainTrainer):
        for name, part in trainer.data.items():
            facts = list(range(len(part.valid)))
            seconds += seconds_each(partial(_score_facts, trainer, name, tests), facts, -(-some // 2))
        return seconds
    for name, part in (trainer.data.test if tests else trainer.data.valid).items():
        places = list(range(len(part.questions)))
        seconds += seconds_each(partial(_score_questions, trainer, name, part, tests), places, some)
    return seconds


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


# ---- together ----


def _measured(
    steps: int,
    train: TrainConfig,
    module: Sequence[Any],
    trained: Sequence[Any],
    parts: Sequence[Any],
    training: Training,
    prepare: float,
    evaluation: float,
    moved: Sequence[Any],
) -> Measured:
    saves = times(steps, train.save_steps)
    weights = [tensor for part in parts for one in modules_in(part) for tensor in one.parameters()]
    return Measured(
        steps=steps,
        parameters=sum(p.numel() for p in module),
        trained=sum(p.numel() for p in trained),
        prepare=prepare,
        training=training.once + training.step * (steps - 1) + saves * training.saving,
        evaluation=evaluation,
        weights_mib=size_mib(weights),
        trained_mib=size_mib(trained),
        checkpoint_mib=training.checkpoint_mib,
        saves=saves,
        made=training.made,
        copied_mib=size_mib(moved),
    )


def _parameters(modules: Any) -> list[Any]:
    return [parameter for module in modules for parameter in module.parameters()]


def measure(trainer: Any, steps: int, folder: Path, ours: bool) -> Measured:
    """What a training will take.

    Raises:
        TypeError: It is none of the four trainers.
        DataError: No question can be trained on.
    """
    kinds: list[tuple[type, Callable[..., Measured]]] = [
        (LSRTrainer, measure_lsr),
        (RALTTrainer, measure_ralt),
        (GFMFinetuneTrainer, measure_gfm),
        (GFMPretrainTrainer, measure_gfm),
    ]
    for kind, function in kinds:
        if isinstance(trainer, kind):
            return function(trainer, steps, folder, ours)
    raise TypeError(f"estimate takes settings, or one of {', '.join(k.__name__ for k, _ in kinds)}; found {trainer!r}")
