"""What a command will take: it builds what the command would build, with a part of the texts really encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ragkit.config import Config, GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig
from ragkit.estimate_runs import Measured, gfm_scoring_seconds, measure, scoring_seconds
from ragkit.gfm import text_encoder
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.pretrain import GFMPretrainTrainer
from ragkit.gfm_commands import set_threads
from ragkit.inputs import load_questions, open_system
from ragkit.rag.corpus import load_corpus
from ragkit.rag.loading import resolve_device
from ragkit.rag.system import RAGSystem, make_generator, make_retriever
from ragkit.resuming import settings_of_run
from ragkit.runs import Run, checkpoint_step
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.teacher import FOLDER
from ragkit.warm_up import seconds_each

NAMES = {LSRConfig: "lsr", RALTConfig: "ralt", GFMFinetuneConfig: "gfm-finetune", GFMPretrainConfig: "gfm-pretrain"}
ENCODED = 256  # texts that are really encoded, of any number


def device_of(what: Any) -> torch.device:
    """Where a training will be.

    Raises:
        TypeError: Neither settings of a training nor a trainer.
    """
    if type(what) in (LSRConfig, RALTConfig):
        return resolve_device(what.rag.device)
    if type(what) in NAMES:
        return resolve_device(what.device)
    if isinstance(what, LSRTrainer):
        return torch.device(getattr(what.system.retriever, "device", "cpu"))
    if isinstance(what, RALTTrainer):
        return what.system.generator.device
    if isinstance(what, GFMFinetuneTrainer | GFMPretrainTrainer):
        return what.model.device
    trainers = (LSRTrainer, RALTTrainer, GFMFinetuneTrainer, GFMPretrainTrainer)
    kinds = ", ".join(kind.__name__ for kind in (*NAMES, *trainers))
    raise TypeError(f"estimate: found a {type(what).__name__}, expected one of {kinds}")


def measure_command(given: Config, steps: int, folder: Path) -> Measured:
    """What `python -m ragkit COMMAND` will take with these settings.

    Args:
        given: Settings of lsr, ralt, gfm-pretrain or gfm-finetune; not changed.
        steps: Steps of the warm-up.
        folder: For the run of the warm-up.
    """
    config: Any = given.model_copy(deep=True)
    resumed = Run.open(config.resume) if config.resume is not None else None
    if resumed is not None:
        config = settings_of_run(resumed, config, NAMES[type(config)])
    begin = time.perf_counter()
    set_threads(config.train)
    build = _rag_trainer if isinstance(config, LSRConfig | RALTConfig) else _gfm_trainer
    trainer, spared, score = build(config)
    built = time.perf_counter() - begin + spared
    found = measure(trainer, steps, folder, ours=True)
    if resumed is not None:
        _only_what_is_left(found, resumed)
    found.prepare += built
    found.evaluation += 2 * score()  # before and after
    return found


def _only_what_is_left(found: Measured, run: Run) -> None:
    """Takes off what a resumed run has behind it."""
    last = run.last_checkpoint()
    done = checkpoint_step(last) if last is not None else 0
    left = max(0, found.steps - done) / found.steps
    found.training *= left
    found.evaluation *= left
    if (run.dir / FOLDER).is_dir():  # the LM scores are read back
        found.prepare = 0.0


def _rag_trainer(config: Any) -> tuple[Any, float, Callable[[], float]]:
    """(trainer, seconds that encoding all passages would take more, seconds of one scoring of the test)."""
    system, spared = _system(config)
    if config.system is not None:
        config.rag = system.config.model_copy(deep=True)
    train = load_questions(config.data, "train", _say_nothing)
    evaluates = config.train.eval_steps is not None
    test = load_questions(config.data, "test", _say_nothing, required=evaluates)
    retrieves = isinstance(config, LSRConfig)
    kind: Any = LSRTrainer if retrieves else RALTTrainer
    trainer = kind(system, train, config, eval_data=test if evaluates else None)
    return trainer, spared, lambda: scoring_seconds(system, test or [], retrieve=retrieves, generate=not retrieves)


def _system(config: Any) -> tuple[RAGSystem, float]:
    """The system with all its passages, of whose embeddings at most 256 are real; a store of its own, in memory."""
    if config.system is not None:
        return open_system(config, _say_nothing), 0.0
    load_questions(config.data, "train", _say_nothing)  # what is missing is said before any model is loaded
    rag = config.rag.model_copy(update={"store": "memory"})
    passages = load_corpus(config.data.corpus)
    retriever = make_retriever(rag)
    embeddings, spared = some_encoded(retriever.encode_passages, [passage.full_text for passage in passages])
    retriever.store.add(passages, embeddings)
    return RAGSystem(retriever, make_generator(rag), rag), spared


def _gfm_trainer(config: Any) -> tuple[Any, float, Callable[[], float]]:
    """(trainer, seconds that encoding all texts would take more, seconds of one scoring of the test)."""
    # Nothing is kept of embeddings that are not real.
    config.datasets.cache = False
    encoder = SomeEncoded(text_encoder.open_encoder(config.text_emb_model, config.device))
    kind: Any = GFMFinetuneTrainer if isinstance(config, GFMFinetuneConfig) else GFMPretrainTrainer
    trainer = kind(config, encoder=encoder)
    return trainer, encoder.spared, lambda: gfm_scoring_seconds(trainer, tests=True)


class SomeEncoded:
    """An encoder that encodes at most 256 of many texts and repeats what comes out.

    Attributes:
        encoder: The encoder.
        spared: Seconds that encoding all texts would have taken more.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.spared = encoder, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, texts: Sequence[str], side: Any) -> Any:
        """Embeddings [len(texts), F]."""
        found, spared = some_encoded(lambda part: self.encoder.encode(part, side), texts)
        self.spared += spared
        return found


def some_encoded(encode: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> tuple[Any, float]:
    """(embeddings of all texts, of which at most 256 are real; seconds that encoding all would take more)."""
    if len(texts) <= ENCODED:
        return encode(texts), 0.0
    places = torch.linspace(0, len(texts) - 1, ENCODED).long().tolist()
    found: list[Any] = []
    some = [texts[place] for place in places]
    begin = time.perf_counter()
    whole = seconds_each(lambda part: found.append(encode(part)), some, 64)
    real = torch.cat([torch.as_tensor(part) for part in found])  # fewer where these took a second already
    each = whole / ENCODED
    repeated = torch.arange(len(texts)) * len(real) // len(texts)
    return real[repeated.to(real.device)], max(0.0, each * len(texts) - (time.perf_counter() - begin))


def _say_nothing(line: str) -> None:
    pass
