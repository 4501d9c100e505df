"""What LSR and RALT will take."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ragkit.estimate.measured import NEVER, Measured, parameters_of, put_together, short, steps_of, times
from ragkit.estimate.warm_up import Clock, modules_in, seconds_each, twin, warm_up
from ragkit.evaluation import evaluate
from ragkit.lsr_config import LSRConfig
from ragkit.runs import Run
from ragkit.tuning.lora import adapter_parameters, is_peft_model
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.qa_data import QAExample
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.scoring import cache_folder, has_no_token
from ragkit.tuning.selection import Selection, hold_out_examples, judged_by_passages
from ragkit.tuning.teacher import build_rows

NEW_PAIRS = 0.5  # share of the passages that a refresh of LSR finds anew: a guess, no warm-up tells it
CACHE_MIB = 256  # of kept LM scores; more are not looked at
NOT_COPIED = ("store", "graph", "linker", "fallback")  # of a retriever: they are read only


# ---- LSR ----


def measure_lsr(trainer: LSRTrainer, steps: int, folder: Path, ours: bool) -> Measured:
    """What an LSR training will take; the arguments are those of `ragkit.estimate.gfm.measure_gfm`."""
    config, generator, rows = trainer.config, trainer.system.generator, trainer._rows
    separates = config.train_part == "query" and getattr(trainer.system.retriever, "shared", False)
    moved = [] if separates else parameters_of(_trained_side(trainer.system, config))
    system = trainer.system if ours else _twin_of(trainer.system, of_retriever=moved)
    # Encoding all passages anew is measured on some, and must not reach the store of a server.
    system.retriever.refresh = lambda: None
    to_train, held = hold_out_examples(trainer.data, config)
    usable = _usable(generator, to_train, callable(trainer.teacher))
    plain: LSRConfig = short(config, folder)
    plain.keep, plain.refresh_steps, plain.score_cache = "last", None, None

    # The training: what the teacher says does not matter for how long a step takes.
    wanted = 2 * steps * config.train.batch_size * config.train.gradient_accumulation_steps
    some = _mixed(rows or [])[:wanted] or build_rows(system, _mixed(usable)[:wanted], plain, _any_score)[0]
    names = {row.id for row in some}
    clock = Clock(steps)
    # Without a row, the error of the training is raised here.
    sample = [example for example in to_train if example.id in names] or to_train
    warm = LSRTrainer(system, sample, plain, teacher=_any_score, rows=some or None)
    warm.callbacks = [clock]
    training = warm_up(warm.train, clock)
    total = steps_of(_batches(len(usable if rows is None else rows), config), config.train)

    # Before it: retrieval and the LM scores. Those that are kept from an earlier run are read by a copy.
    scored = _with_kept_scores(plain, config, folder)
    pairs_at_once = math.ceil(2 * config.score_batch_size / config.top_k)
    score: Callable[[Any], Any] = partial(build_rows, system, config=scored, teacher=trainer.teacher)
    by_loss = bool(held) and not judged_by_passages(held)
    to_score = [*(_mixed(usable) if rows is None else []), *(held if by_loss and not trainer._held_rows else [])]
    prepare = seconds_each(score, to_score, pairs_at_once)
    if config.refresh_steps is not None:
        anew = NEW_PAIRS * seconds_each(partial(build_rows, system, config=plain, teacher=trainer.teacher), usable)
        training.once += (total - 1) // config.refresh_steps * (anew + _indexing_seconds(system, config))
    evaluation = _lsr_evaluation(trainer, system, held, total, plain)
    weights = parameters_of([*modules_in(system.retriever), generator.model])
    model, trained = parameters_of(_trained_side(system, config)), warm.trained_parameters().values()
    copied = () if ours else moved
    return put_together(total, config.train, training, prepare, evaluation, model, trained, weights, copied)


def _lsr_evaluation(
    trainer: LSRTrainer, system: Any, held: Sequence[QAExample], steps: int, plain: LSRConfig
) -> float:
    """Seconds of all that is scored while training: the held-out questions, and with eval_steps eval_data."""
    config = trainer.config
    every, seconds = config.train.eval_steps, 0.0
    run = Run(Path(plain.output_dir) / "unused")
    if held:
        rows = [] if judged_by_passages(held) else build_rows(system, held[:64], plain, _any_score)[0]
        selection = Selection(system, held, config, run, 1.0, rows)
        every = selection.engine_settings(config.train.model_copy(update={"max_steps": steps}), 1).eval_steps

        def measure(part: Sequence[Any]) -> None:
            one = copy.copy(selection)
            one.examples, one.rows = (part, []) if selection.by_passages else ([], part)  # type: ignore[assignment]
            one.measure()

        things: Sequence[Any] = selection.examples if selection.by_passages else rows
        share = 1.0 if selection.by_passages else len(held) / max(1, len(rows))
        seconds += share * seconds_each(measure, things) * (1 + times(steps, every))  # and once before the first step
    often = times(steps, every) if every is not None else 0
    if trainer.eval_data is not None and config.train.eval_steps is not None:
        seconds += often * scoring_seconds(system, trainer.eval_data, generate=False, bootstrap=100)
    return seconds + (often + 1) * _indexing_seconds(system, config)  # each, and at the end


def _indexing_seconds(system: Any, config: LSRConfig) -> float:
    """Seconds in which all passages are encoded anew, where their encoder is trained."""
    retriever = system.retriever
    if config.train_part != "both" or not hasattr(retriever, "encode_passages"):
        return 0.0
    return seconds_each(retriever.encode_passages, _mixed([p.full_text for p in retriever.store.passages()]), 64)


def _with_kept_scores(plain: LSRConfig, config: LSRConfig, folder: Path) -> LSRConfig:
    """The settings with a copy of the LM scores that earlier runs have kept: the scoring reads those it knows."""
    kept = cache_folder(config)
    if kept is None or not kept.is_dir():
        return plain
    files = [file for file in kept.iterdir() if file.is_file()]
    if sum(file.stat().st_size for file in files) > CACHE_MIB * 2**20:
        return plain
    (folder / "scores").mkdir()
    for file in files:
        shutil.copyfile(file, folder / "scores" / file.name)
    return plain.model_copy(update={"score_cache": str(folder / "scores")})


def _any_score(example: QAExample, found: Sequence[Any]) -> list[float]:
    """A teacher that costs nothing."""
    return [-float(place) for place in range(len(found))]


def _trained_side(system: Any, config: LSRConfig) -> list[Any]:
    return list(system.retriever.trainable_modules(config.train_part).values())


# ---- RALT ----


def measure_ralt(trainer: RALTTrainer, steps: int, folder: Path, ours: bool) -> Measured:
    """What a RALT training will take; the arguments are those of `ragkit.estimate.gfm.measure_gfm`."""
    config, model, rows = trainer.config, trainer.system.generator.model, trainer._rows
    moved: list[Any] = []  # a new adapter is made in the copy
    if config.method == "full":
        moved = list(model.parameters())
    elif is_peft_model(model):
        moved = adapter_parameters(model)
    system = trainer.system if ours else _twin_of(trainer.system, of_generator=moved)
    usable = _usable(system.generator, trainer.data)
    scored = _usable(system.generator, trainer.eval_data or [])
    each = max(1, min(config.top_k, len(system.retriever.store))) if config.context == "each" else 1
    plain = short(config, folder)

    # One after the other: a question may have the same id in both.
    to_make = [_mixed(usable) if rows is None else [], scored]
    prepare = sum(seconds_each(lambda part: RALTTrainer(system, part, plain).rows(), part) for part in to_make)
    wanted = 2 * steps * config.train.batch_size * config.train.gradient_accumulation_steps
    evaluates = bool(scored) and config.train.eval_steps is not None
    few = scored[: 2 * config.train.batch_size] if evaluates else []
    clock = Clock(steps)
    # Without a usable question, the error of the training is raised here.
    warm: Any = trainer.for_data(_mixed(usable)[: math.ceil(wanted / each)] or trainer.data, few or None)
    warm.system, warm.config, warm.passages, warm.callbacks = system, plain, "retrieved", [clock]
    if evaluates:
        plain.train.eval_steps = NEVER
    training = warm_up(warm.train, clock)
    total = steps_of(_batches(len(usable) * each if rows is None else len(rows), config), config.train)
    evaluation = 0.0
    if evaluates:
        evaluation = times(total, config.train.eval_steps) * training.evaluation * len(scored) / len(few)
    weights = parameters_of([*modules_in(system.retriever), system.generator.model])
    own, trained = list(system.generator.model.parameters()), warm.trained_parameters().values()
    copied = () if ours else moved
    return put_together(total, config.train, training, prepare, evaluation, own, trained, weights, copied)


# ---- both ----


def scoring_seconds(system: Any, test: Sequence[Any], **scoring: Any) -> float:
    """Seconds of one `evaluate` of the test questions."""
    return seconds_each(lambda part: evaluate(system, part, **scoring), list(test))


def _batches(rows: int, config: Any) -> int:
    return math.ceil(rows / config.train.batch_size)


def _usable(generator: Any, examples: Sequence[QAExample], by_function: bool = False) -> list[QAExample]:
    """The questions that can be trained on: those with an answer that the language model has tokens for."""
    return [e for e in examples if e.answer and (by_function or not has_no_token(generator, e))]


def _mixed(things: Sequence[Any]) -> list[Any]:
    """In a random order, always the same, so that any part of them is like the whole."""
    return random.Random("estimate").sample(list(things), len(things))


def _twin_of(system: Any, of_retriever: Sequence[Any] = (), of_generator: Sequence[Any] = ()) -> Any:
    """The system with parts that can be trained in place of the original's."""
    other = copy.copy(system)
    kept = [vars(system.retriever)[name] for name in NOT_COPIED if vars(system.retriever).get(name) is not None]
    other.retriever = twin(system.retriever, of_retriever, kept)
    other.generator = copy.copy(system.generator)
    other.generator.model = twin(system.generator.model, of_generator)
    return other
