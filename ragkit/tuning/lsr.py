"""LM-supervised retrieval (LSR): the retriever learns which passages help the language model to answer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ragkit.config import ConfigError, LSRConfig
from ragkit.engine import RunTrainer, TrainResult, run_training, training_arguments
from ragkit.evaluation import EvaluationResult
from ragkit.lsr_config import NO_CHECKPOINTING
from ragkit.notes import note
from ragkit.processes import is_first
from ragkit.runs import Run, checkpoint_step
from ragkit.tuning.candidates import Candidates, collate, collate_ids, score_scale
from ragkit.tuning.lsr_objective import batch_negatives, lsr_objective, widen
from ragkit.tuning.lsr_table import TeacherWarning, lsr_table, summarise_teacher
from ragkit.tuning.qa_data import DataError, QAExample
from ragkit.tuning.refresh import RefreshCallback, drop_refreshes_after, refresh_rows
from ragkit.tuning.selection import HELD_OUT, Selection, hold_out_examples, judged_by_passages
from ragkit.tuning.teacher import (
    FOLDER,
    LSRRow,
    Teacher,
    build_rows,
    content_key,
    load_rows,
    save_rows,
    shuffle_scores,
)
from ragkit.tuning.training import SystemTrainer, training_only

__all__ = ["LSRModel", "LSRTrainer", "TeacherWarning", "collate", "lsr_table", "trained_parameters"]


class LSRModel(nn.Module):
    """The trained encoders of a retriever with the LSR loss as their output, so that any trainer can drive them.

    `state_dict()` holds the trained encoders only: so do the checkpoints.

    Dropout stays off: the encoders remain in eval mode while they are trained. A loss between two distributions over
    the same few passages is small, and dropout's noise in the scores (divided by a gamma of 0.05) would drown it.

    Args:
        retriever: A `TrainableRetriever`.
        config: The settings of the loss (`lsr_objective`) and train_part are read.
        scale: What scores are multiplied by, from `score_scale`.
    """

    def __init__(self, retriever: Any, config: LSRConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.trained = nn.ModuleDict(retriever.trainable_modules(config.train_part))
        self._retriever = [retriever]  # in a list: were it a module, all its encoders would be part of this one
        self.settings = config  # not `config`: the Trainer takes that for a transformers configuration

    def train(self, mode: bool = True) -> LSRModel:
        super().train(mode)
        self.trained.eval()
        return self

    def forward(
        self, questions: Sequence[str], passage_ids: Sequence[Sequence[str]], lm_scores: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Scores B questions against their K passages.

        Args:
            questions: B texts.
            passage_ids: B lists of at most K ids.
            lm_scores: [B, K] teacher scores in nats, anything where `mask` is False.
            mask: [B, K] bool.

        Returns:
            {"loss": scalar, "scores": [B, W] after rescaling}; W is K, or wider with in-batch negatives.
        """
        config = self.settings
        counts = [len(ids) for ids in passage_ids]
        if config.in_batch_negatives:
            negatives = batch_negatives(passage_ids)
            passage_ids = [[*own, *rest] for own, rest in zip(passage_ids, negatives, strict=True)]
        scores = self._retriever[0].score(questions, passage_ids, part=config.train_part)  # [B, W]
        if self.scale != 1.0:
            scores = scores * self.scale
        lm_scores, mask = lm_scores.to(scores.device), mask.to(scores.device)
        if not config.in_batch_negatives:
            return {"loss": lsr_objective(scores, lm_scores, mask, None, config), "scores": scores}
        width = scores.shape[1]
        column = torch.arange(width)  # a row holds its own passages first, then the negatives
        first = torch.tensor(counts)[:, None]
        last = torch.tensor([len(ids) for ids in passage_ids])[:, None]
        others = ((column >= first) & (column < last)).to(scores.device)  # [B, W]
        own, lm_scores = (column < first).to(scores.device), widen(lm_scores, max(width, lm_scores.shape[1]))
        return {"loss": lsr_objective(scores, lm_scores[:, :width], own, others, config), "scores": scores}


class LSRTrainer(SystemTrainer):
    """Trains the retriever of a RAG system from its own language model.

    For each training question q with response y, the K passages d that the *initial* retriever finds are scored once
    by the (frozen) language model, each alone in the prompt: `log p_LM(y | d, q)`. Then::

        minimise  KL( P_R(·|q) ‖ Q_LM(·|q,y) ),   P_R = softmax_d(s(q,d)/γ),   Q_LM = softmax_d(log p_LM(y|d,q)/β)

    (REPLUG LSR, Shi et al. 2023, arXiv:2301.12652, section 4; RA-DIT, Lin et al. 2023, arXiv:2310.01352, section 2.3),
    where s(q,d) is computed afresh in each step with gradient into the query encoder. With `train_part="query"` the
    query encoder is first made a model of its own, the passages' embeddings stay valid and so does the index; with
    "both" the passages are encoded with gradient too, and the index is refreshed at the end.

    The encoders stay in eval mode (no dropout, see `LSRModel`); the generator requires no gradient meanwhile.

    With `keep="best"` a part of the training questions (`valid_share`) is held out, and the retriever ends with the
    weights that did best on them, the initial ones among them (see `ragkit.tuning.selection.Selection`): a teacher
    that is noise, or too many steps, then cost nothing but the time.

    With `refresh_steps` the passages are retrieved anew every so many steps, and new ones scored (REPLUG refreshes its
    index likewise); with `in_batch_negatives` P_R is over the passages of the whole batch (see `lsr_objective`). A
    resumed run is the unbroken one, bit for bit where the machine's arithmetic is (on a GPU with `score_memory` set).

    Any `TrainableRetriever` can be trained. A `GFMRetriever` is trained as a whole by either `train_part` (its text
    encoder stays frozen); its scores are sums over entities, which `rescale` brings to the spread of cosines. A
    `HybridRetriever` fuses ranks or normalised scores: train its parts, one after the other.

    Args:
        system: The RAG system; its retriever is trained in place.
        train_data: Questions with responses, in any form that `load_qa` reads.
        config: Settings; None: the defaults.
        eval_data: Questions for `evaluate()`, and scored (recall) every `train.eval_steps`.
        run: Folder to write to; None: a new one in `config.output_dir`.
        teacher: "lm", or for controls "shuffled" (the LM's scores permuted within each question, seeded: whatever
            still improves was not learnt from the LM), or a function (example, passages) -> one score per passage.
        rows: Rows scored before (`other_trainer.rows()`), used instead of retrieving and scoring again; with
            teacher="shuffled" their scores are permuted.

    Example:
        >>> trainer = LSRTrainer(system, [{"query": [...], "response": [...]}])  # doctest: +SKIP
        >>> trainer.train().loss  # doctest: +SKIP
    """

    trains: ClassVar[Literal["retriever", "generator"]] = "retriever"

    def __init__(
        self,
        system: Any,
        train_data: Any,
        config: LSRConfig | None = None,
        eval_data: Any = None,
        run: Run | None = None,
        teacher: Teacher = "lm",
        rows: Sequence[LSRRow] | None = None,
    ) -> None:
        config = config or LSRConfig()
        super().__init__(system, train_data, config, eval_data, run)
        if not callable(teacher) and teacher not in ("lm", "shuffled"):
            raise ConfigError(f'teacher: found {teacher!r}, expected "lm", "shuffled" or a function')
        if config.train.gradient_checkpointing:
            raise ConfigError(NO_CHECKPOINTING)  # a group that was changed later is not checked with the whole
        _check_trainable(system.retriever)
        self.teacher = teacher
        self._rows = list(rows) if rows is not None else None
        if self._rows is not None and teacher == "shuffled":
            self._rows = shuffle_scores(self._rows, config.train.seed)
        if self._rows is not None and config.refresh_steps is not None:
            known = {example.id for example in self.data}
            unknown = [row.id for row in self._rows if row.id not in known]
            if unknown:
                raise DataError(
                    f"rows: the question {unknown[0]!r} is not in train_data, so refresh_steps could not score new "
                    "passages for it; give the questions that the rows were made of"
                )
        self._candidates: Candidates | None = None
        self._scale: float | None = None
        self._hold_out()

    def _hold_out(self) -> None:
        """Parts the questions, and the rows if there are any, in those to train on and those held out."""
        self._to_train, self._held_out = hold_out_examples(self.data, self.config)
        ids = {example.id for example in self._held_out}
        rows, self._held_rows = self._rows, None
        if rows is not None and ids:
            self._rows = [row for row in rows if row.id not in ids] or None
            self._held_rows = [row for row in rows if row.id in ids] or None

    def _all_rows(self) -> list[LSRRow] | None:
        """The rows of all questions; None where those of the held-out ones were not made."""
        if self._rows is None or (self._held_out and self._held_rows is None):
            return None
        return [*self._rows, *(self._held_rows or [])]

    @property
    def held_out(self) -> list[QAExample]:
        """Training questions that are not trained on, but choose the weights; see `hold_out_examples`."""
        return hold_out_examples(self.data, self.config)[1]

    def for_rounds(self) -> LSRTrainer:
        """This trainer with `keep="last"`: nothing is held out."""
        if self.config.keep == "last":
            return self
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"keep": "last"})
        other._rows = self._all_rows()
        other._scale = None
        other._hold_out()
        return other

    def rows(self) -> list[LSRRow]:
        """The training rows: each question with the passages that were retrieved for it and the teacher's scores.

        Made on the first call (retrieval and scoring), so call it before training, or let `train` make them. With
        `refresh_steps` they are, once trained, those of the last refresh. `lsr_table(trainer)` shows them.
        """
        return self._initial_rows() if self._candidates is None else self._candidates.rows

    def score_scale(self) -> float:
        """What the retriever's scores are multiplied by, see `ragkit.tuning.candidates.score_scale`; measured once."""
        if self._scale is None:
            self._scale = score_scale(self.system.retriever, self._initial_rows(), self.config)
        return self._scale

    def _initial_rows(self) -> list[LSRRow]:
        if self._rows is None:
            self._rows, self.left_out = build_rows(self.system, self._to_train, self.config, self.teacher)
            self.report_left_out(len(self._rows))
        return self._rows

    def _rows_of(self, run: Run, resume: bool, key: dict[str, str]) -> list[LSRRow]:
        """The rows to start from: those kept in the run's folder if it is resumed, else they are kept there now."""
        kept = load_rows(run.dir / FOLDER, key) if resume else None
        if kept is not None:
            self._rows, self.left_out, self._scale = kept
        rows = self._initial_rows()
        if kept is None and is_first():  # under torchrun every process has made them, one writes
            save_rows(run.dir / FOLDER, key, rows, self.left_out, self.score_scale())
        if self.score_scale() != 1.0:
            note(f"the retriever's scores are multiplied by {self.score_scale():.4g}, to spread as cosines do")
        warning = summarise_teacher(rows, self.config).warning
        if warning is not None:
            warnings.warn(warning, TeacherWarning, stacklevel=3)
        return rows

    def _refreshing(self, candidates: Candidates, run: Run, key: dict[str, str]) -> list[RefreshCallback]:
        """What the Trainer calls to retrieve the candidates anew; nothing where that is off."""
        every = self.config.refresh_steps
        if every is None:
            return []

        def make(rows: list[LSRRow]) -> list[LSRRow]:
            return refresh_rows(self.system, self.data, rows, self.config, self.teacher)

        return [RefreshCallback(candidates, make, run.dir, key, every)]

    def train(self, resume: bool = False) -> TrainResult:
        """Trains the retriever in place.

        Args:
            resume: Go on with `run` (or with the run called `config.name`) from its last checkpoint; its candidates
                and LM scores are read back, not computed again.

        Returns:
            Loss, history, steps and the run's folder.

        Raises:
            DataError: No usable question, a teacher's score that is not finite, or (resume) kept scores of other data
                or candidates that are missing.
            NonFiniteLossError: The loss became NaN or infinite.
        """
        config, retriever = self.config, self.system.retriever
        run = self.open_run(resume)
        key = content_key(self._to_train, config, self.teacher, self.system.generator)
        candidates = self._candidates = Candidates(self._rows_of(run, resume, key))
        selection = self._selection(run, resume)
        settings = config.train if selection is None else selection.engine_settings(config.train, len(candidates))
        last = run.last_checkpoint() if resume else None
        if is_first():
            drop_refreshes_after(run.dir, 0 if last is None else checkpoint_step(last))
        if config.train_part == "query":
            retriever.separate_query_encoder()
        model = LSRModel(retriever, config, self.score_scale())
        trained = trained_parameters(model, config.freeze_embeddings)
        others = [*retriever.trainable_modules("both").values(), self.system.generator.model]
        try:
            with training_only(trained, [model, *others]):
                trainer = RunTrainer(
                    model,
                    training_arguments(settings, run, device=trained[0].device.type),
                    run,
                    loss_fn=lambda model, batch: model(**candidates.batch(batch["ids"]))["loss"],
                    evaluate_fn=self._evaluation(selection),
                    train_dataset=candidates.ids,
                    data_collator=collate_ids,
                    callbacks=[*filter(None, [selection]), *self._refreshing(candidates, run, key), *self.callbacks],
                )
                result = run_training(trainer, run, resume=resume)
                if selection is not None:
                    result.kept = selection.take(trainer, trained, result.steps)
        finally:
            if config.train_part == "both":
                retriever.mark_stale()  # an interrupted training has moved the passage encoder too
        if config.train_part == "both":
            retriever.refresh()
        return result

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that `train` moves, by name; a shared encoder gets its query side separated if need be."""
        retriever = self.system.retriever
        if self.config.train_part == "query":
            retriever.separate_query_encoder()
        model = LSRModel(retriever, self.config)
        trained = {id(parameter) for parameter in trained_parameters(model, self.config.freeze_embeddings)}
        return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}

    def _keep_rows_of(self, ids: set[str]) -> None:
        rows = self._all_rows()
        self._rows = None if rows is None else [row for row in rows if row.id in ids] or None
        # What training makes of the rows: the candidates in force and the scale of the scores.
        self._candidates = None
        self._scale = None
        self._hold_out()

    def _selection(self, run: Run, resume: bool) -> Selection | None:
        """What chooses the weights; None where nothing is held out."""
        config, held = self.config, self._held_out
        if not held:
            if config.keep == "best" and config.valid_share is None:
                note(f"{len(self.data)} questions: too few to hold some out, the last step's weights are kept")
            return None
        rows = None
        if not judged_by_passages(held):
            path, key = run.dir / HELD_OUT, content_key(held, config, self.teacher, self.system.generator)
            kept = load_rows(path, key) if resume else None
            rows = kept.rows if kept is not None else self._held_rows
            if rows is None:
                rows = build_rows(self.system, held, config, self.teacher)[0]
            if not rows:
                raise DataError(f"none of the {len(held)} held-out questions can be scored; set keep to last")
            if kept is None and is_first():
                save_rows(path, key, rows, [])
        return Selection(self.system, held, config, run, self.score_scale(), rows or [])

    def _evaluation(self, selection: Selection | None) -> Callable[[], dict[str, float]] | None:
        """What is scored while training: held-out questions, and with `train.eval_steps` the evaluation data."""
        with_data = self.eval_data is not None and self.config.train.eval_steps is not None
        if selection is None and not with_data:
            return None

        def metrics() -> dict[str, float]:
            if self.config.train_part == "both":
                self.system.retriever.mark_stale()
                self.system.retriever.refresh()
            found = {} if selection is None else selection.measure()
            if with_data:
                found |= {name: value.mean for name, value in self.evaluate(bootstrap=100).metrics.items()}
            return found

        return metrics

    def evaluate(self, examples: Any = None, **options: Any) -> EvaluationResult:
        """Scores retrieval (recall, MRR, ...); `generate=True` scores the answers as well."""
        return super().evaluate(examples, **{"generate": False, **options})


def _check_trainable(retriever: Any) -> None:
    if hasattr(retriever, "trainable_modules"):
        return
    message = f"{type(retriever).__name__} cannot be trained: it has no trainable_modules()"
    parts = [part for part in getattr(retriever, "retrievers", ()) if hasattr(part, "trainable_modules")]
    if parts:
        # What it fuses are ranks or normalised scores of candidates: there is no one score with a gradient into all.
        names = " or ".join(dict.fromkeys(type(part).__name__ for part in parts))
        message += (
            f". Train what it fuses ({names}), one after the other, each in a system of its own: LSRTrainer("
            "RAGSystem(hybrid.retrievers[0], system.generator, system.config), ...); they are trained in place, so "
            "the fused retriever has what was learnt"
        )
    raise ConfigError(message)


def trained_parameters(model: LSRModel, freeze_embeddings: bool) -> list[nn.Parameter]:
    """The parameters that LSR trains: the trained encoders' own, without the token embeddings if those are frozen.

    Raises:
        ConfigError: Nothing is left to train.
    """
    frozen: set[int] = set()
    if freeze_embeddings:
        for module in model.trained.modules():
            if isinstance(module, nn.Embedding):  # of tokens, positions and segments
                frozen |= {id(parameter) for parameter in module.parameters(recurse=False)}
    trained = [p for p in model.parameters() if id(p) not in frozen and p.is_floating_point()]
    if not trained:
        raise ConfigError("freeze_embeddings: this retriever has nothing but embeddings to train; set it to false")
    return trained
