"""What a command will take: it builds what the command would build, with a part of the texts really encoded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ragkit.config import Config, GFMFinetuneConfig, GFMPretrainConfig, LSRConfig, RALTConfig
from ragkit.estimate import gfm, rag
from ragkit.estimate.measured import Measured
from ragkit.estimate.warm_up import seconds_each
from ragkit.gfm import text_encoder
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.pretrain import GFMPretrainTrainer
from ragkit.gfm.text_encoder import InstructedEncoder
from ragkit.gfm_commands import set_threads
from ragkit.graph.cache import user_cache
from ragkit.inputs import load_questions, open_system
from ragkit.rag.corpus import load_corpus
from ragkit.rag.loading import resolve_device
from ragkit.rag.system import RAGSystem, make_generator, make_retriever
from ragkit.resuming import settings_of_run
from ragkit.runs import Run, checkpoint_step
from ragkit.tuning.lsr import LSRTrainer
from ragkit.tuning.ralt import RALTTrainer
from ragkit.tuning.teacher import FOLDER

NAMES: dict[Any, str] = {
    LSRConfig: "lsr",
    RALTConfig: "ralt",
    GFMFinetuneConfig: "gfm-finetune",
    GFMPretrainConfig: "gfm-pretrain",
}
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


def measure_trainer(trainer: Any, steps: int, folder: Path) -> Measured:
    """What a trainer's `train()` will take; the arguments are those of `measure_command`."""
    return _measure(trainer, steps, folder, ours=False)


def _measure(trainer: Any, steps: int, folder: Path, ours: bool) -> Measured:
    if isinstance(trainer, LSRTrainer):
        return rag.measure_lsr(trainer, steps, folder, ours)
    if isinstance(trainer, RALTTrainer):
        return rag.measure_ralt(trainer, steps, folder, ours)
    return gfm.measure_gfm(trainer, steps, folder, ours)


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
    trainer, spared, score = build(config, folder)
    built = time.perf_counter() - begin + spared
    found = _measure(trainer, steps, folder, ours=True)
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


def _rag_trainer(config: Any, folder: Path) -> tuple[Any, float, Callable[[], float]]:
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
    return trainer, spared, lambda: rag.scoring_seconds(system, test or [], retrieve=retrieves, generate=not retrieves)


def _system(config: Any) -> tuple[RAGSystem, float]:
    """The system with all its passages, of whose embeddings at most 256 are real; a store of its own, in memory."""
    if config.system is not None:
        return open_system(config, _say_nothing), 0.0
    load_questions(config.data, "train", _say_nothing)  # what is missing is said before any model is loaded
    settings = config.rag.model_copy(update={"store": "memory"})
    passages = load_corpus(config.data.corpus)
    retriever = make_retriever(settings)
    embeddings, spared = some_encoded(retriever.encode_passages, [passage.full_text for passage in passages])
    retriever.store.add(passages, embeddings)
    return RAGSystem(retriever, make_generator(settings), settings), spared


def _gfm_trainer(config: Any, folder: Path) -> tuple[Any, float, Callable[[], float]]:
    """(trainer, seconds that encoding all texts would take more, seconds of one scoring of the test)."""
    encoder = SomeEncoded(text_encoder.open_encoder(config.text_emb_model, config.device))
    kind: Any = GFMFinetuneTrainer if isinstance(config, GFMFinetuneConfig) else GFMPretrainTrainer
    with _cache_is_only_read(folder / "cache") as there:  # embeddings that are not real must not get into it
        config.datasets.cache = config.datasets.cache and there
        trainer = kind(config, encoder=encoder)
    return trainer, encoder.spared, lambda: gfm.scoring_seconds(trainer, tests=True)


class SomeEncoded(InstructedEncoder):
    """An encoder that encodes at most 256 of many texts and repeats what comes out; to a cache it is the encoder.

    Attributes:
        whole: The encoder.
        spared: Seconds that encoding all texts would have taken more.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__(getattr(whole, "encoder", whole))
        vars(self).update(vars(whole) if isinstance(whole, InstructedEncoder) else {})
        self.whole, self.spared = whole, 0.0

    def encode(self, texts: Sequence[str], side: Any) -> Any:
        """Embeddings [len(texts), F]."""
        found, spared = some_encoded(lambda part: self.whole.encode(part, side), texts)
        self.spared += spared
        return found


@contextmanager
def _cache_is_only_read(folder: Path) -> Iterator[bool]:
    """Within the block the user's cache is one of links to what is there: what is new stays in `folder`.

    Yields:
        Whether there is one; not where the system refuses links.
    """
    before = os.environ.get("RAGKIT_CACHE")
    real = user_cache()
    try:
        for part in [path for path in real.glob("*") if path.is_dir()]:
            (folder / part.name).mkdir(parents=True)
            for entry in part.iterdir():
                (folder / part.name / entry.name).symlink_to(entry.absolute(), entry.is_dir())
    except OSError:
        yield False
        return
    os.environ["RAGKIT_CACHE"] = str(folder)
    try:
        yield True
    finally:
        os.environ.pop("RAGKIT_CACHE")
        if before is not None:
            os.environ["RAGKIT_CACHE"] = before


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
