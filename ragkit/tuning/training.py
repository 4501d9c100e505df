"""What the trainers of a RAG system share: their data, their run folder, and freezing that is real."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ragkit.evaluation import EvaluationResult, evaluate
from ragkit.notes import note
from ragkit.run_opening import open_run
from ragkit.runs import Run
from ragkit.tuning.qa_data import DataError, QAData, QAExample, load_qa

if TYPE_CHECKING:
    from ragkit.engine import TrainResult


class SystemTrainer(ABC):
    """A trainer of one part of a RAG system; `LSRTrainer` and `RALTTrainer` are the two there are.

    Attributes:
        system: The RAG system; its part is trained in place.
        data: The training questions.
        eval_data: Questions for `evaluate` and for `train.eval_steps`, or None.
        config: The settings.
        run: The run folder; None until training starts.
        left_out: (question id, reason) of the questions that were not trained on.
        callbacks: `transformers.TrainerCallback`s that each training is given.
    """

    trains: ClassVar[Literal["retriever", "generator"]]

    def __init__(
        self, system: Any, train_data: Any, config: Any, eval_data: Any = None, run: Run | None = None
    ) -> None:
        self.system = system
        self.config = config
        self.data = self._load(train_data)
        self.eval_data = None if eval_data is None else self._load(eval_data)
        if config.train.eval_steps is not None and self.eval_data is None and not self.held_out:
            raise DataError("train.eval_steps is set, but there is no eval_data to score")
        self.run = run
        self._made_run = run is None
        self.left_out: list[tuple[str, str]] = []
        self.callbacks: list[Any] = []

    def _load(self, source: Any) -> QAData:
        return load_qa(source, columns=self.config.data.columns or None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r}, run={str(self.run.dir) if self.run else None!r})"

    @property
    def held_out(self) -> list[QAExample]:
        """Training questions that are not trained on, but choose the weights."""
        return []

    def for_rounds(self) -> SystemTrainer:
        """This trainer as a federated round needs it: all questions are trained on, and the last weights stay."""
        return self

    @abstractmethod
    def train(self, resume: bool = False) -> TrainResult:
        """Trains the part in place; see the subclass."""

    @abstractmethod
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that `train` moves, by name; what they need (an adapter, an own query encoder) is made first."""

    @abstractmethod
    def rows(self) -> Sequence[Any]:
        """The rows that are trained on; made on the first call."""

    def for_data(self, train_data: Any, eval_data: Any = None) -> SystemTrainer:
        """A trainer with this one's system, settings and options for other questions, with a run of its own.

        Rows that this trainer has made (or was given) are kept where all the other's questions are among this one's;
        the same id alone does not make the same question: without ids of their own, rows are numbered.
        """
        other = copy.copy(self)
        other.data = self._load(train_data)
        other.eval_data = None if eval_data is None else self._load(eval_data)
        other.run, other._made_run = None, True
        other.left_out, other.callbacks = [], []
        own = {example.id: example for example in self.data}
        known = all(own.get(example.id) == example for example in other.data)
        other._keep_rows_of({example.id for example in other.data} if known else set())
        return other

    @abstractmethod
    def _keep_rows_of(self, ids: set[str]) -> None:
        """Drops what was computed for other questions than these."""

    def evaluate(self, examples: Any = None, **options: Any) -> EvaluationResult:
        """Scores the whole system as it is now.

        Args:
            examples: Questions, in any form that `load_qa` reads; None: the trainer's `eval_data`.
            **options: Passed on to `ragkit.evaluation.evaluate` (ks, generate, bootstrap, ...).

        Raises:
            DataError: Neither examples nor eval_data.
        """
        data = self.eval_data if examples is None else self._load(examples)
        if data is None:
            raise DataError(f"nothing to evaluate on: give examples, or {type(self).__name__}(..., eval_data=...)")
        return evaluate(self.system, data, **options)

    def open_run(self, resume: bool) -> Run:
        """The run of this training: a new one, or for `resume` the one to go on with; see `run_opening.open_run`."""
        self.run = open_run(self.config, self.run, resume, again=self._made_run)
        return self.run

    def report_left_out(self, used: int) -> None:
        """Says how many questions are not trained on and why; an error if that is all of them."""
        if not self.left_out:
            return
        shown = "; ".join(f"{identity}: {reason}" for identity, reason in self.left_out[:3])
        more = "; ..." if len(self.left_out) > 3 else ""
        message = f"{len(self.left_out)} of {len(self.data)} questions cannot be trained on ({shown}{more})"
        if not used:
            raise DataError(message)
        note(message)


@contextmanager
def training_only(trained: Sequence[nn.Parameter], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block only `trained` require a gradient among all parameters of `modules`; restored afterwards."""
    wanted = {id(parameter) for parameter in trained}
    parameters = {id(p): p for module in modules for p in module.parameters()} | {id(p): p for p in trained}
    before = {key: parameter.requires_grad for key, parameter in parameters.items()}
    try:
        for key, parameter in parameters.items():
            parameter.requires_grad_(key in wanted)
        yield
    finally:
        for key, parameter in parameters.items():
            parameter.requires_grad_(before[key])
            parameter.grad = None  # gradients of a finished training only take memory
