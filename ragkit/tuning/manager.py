"""One object for both trainings of a RAG system: choose the part, train it, score the system."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from ragkit.engine import TrainResult
from ragkit.evaluation import EvaluationResult
from ragkit.federated.config import FederatedConfig
from ragkit.federated.task import FederatedTask
from ragkit.tuning.training import SystemTrainer

MODES: dict[str, tuple[str, str]] = {
    # mode -> (argument that takes its trainer, class to use)
    "retriever": ("retriever_trainer", "LSRTrainer"),
    "generator": ("generator_trainer", "RALTTrainer"),
}


class TrainerManager:
    """Trains the retriever or the generator of one RAG system.

    Each trainer freezes the other part while it runs (`requires_grad`), so a mode cannot move the wrong weights.

    Args:
        mode: "retriever" or "generator"; may be changed later (`manager.mode = "generator"`).
        retriever_trainer: An `LSRTrainer`; needed in retriever mode.
        generator_trainer: A `RALTTrainer`; needed in generator mode.

    Raises:
        ValueError: An unknown mode, no trainer for the mode, or trainers of two different systems.
        TypeError: A trainer of the wrong kind; the sentence names the right one.

    Example:
        >>> manager = TrainerManager("retriever", retriever_trainer=LSRTrainer(system, data))  # doctest: +SKIP
        >>> manager.train().loss  # doctest: +SKIP
    """

    def __init__(
        self,
        mode: Literal["retriever", "generator"],
        retriever_trainer: SystemTrainer | None = None,
        generator_trainer: SystemTrainer | None = None,
    ) -> None:
        self._trainers = {"retriever": retriever_trainer, "generator": generator_trainer}
        for part, trainer in self._trainers.items():
            _check_kind(part, trainer)
        if retriever_trainer is not None and generator_trainer is not None:
            if retriever_trainer.system is not generator_trainer.system:
                raise ValueError(
                    "the retriever_trainer and the generator_trainer hold two different RAG systems; make both with "
                    "the same system object, or each trains a part that the other never sees"
                )
        self.mode = mode

    @property
    def mode(self) -> str:
        """The part that `train` trains."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mode: found {mode!r}, expected {' or '.join(map(repr, MODES))}{hint}")
        argument, kind = MODES[mode]
        if self._trainers[mode] is None:
            raise ValueError(f"mode {mode!r} needs {argument}={kind}(system, train_data)")
        self._mode = mode

    @property
    def trainer(self) -> SystemTrainer:
        """The trainer of the current mode."""
        trainer = self._trainers[self._mode]
        assert trainer is not None  # the setter of `mode` has seen to it
        return trainer

    @property
    def system(self) -> Any:
        """The RAG system that is trained."""
        return self.trainer.system

    def train(self, resume: bool = False) -> TrainResult:
        """Trains the part of the current mode in place; see the trainer's `train`."""
        return self.trainer.train(resume=resume)

    def evaluate(self, examples: Any = None, **options: Any) -> EvaluationResult:
        """Scores the system with the trainer of the current mode; see its `evaluate`."""
        return self.trainer.evaluate(examples, **options)

    def get_federated_task(self, **settings: Any) -> FederatedTask:
        """The training of the current mode as a federated one, on Flower (extra `federated`, Python 3.11 or later).

        Args:
            **settings: Those of `FederatedConfig`: rounds, local_steps, strategy, privacy, ...

        Returns:
            A task: `task.simulate(num_clients)` runs it here; `ragkit.federated.apps` makes it a Flower app.

        Raises:
            ConfigError: An unknown setting or a value out of its range.
        """
        return FederatedTask(self.trainer, FederatedConfig(**settings))

    def __repr__(self) -> str:
        return f"TrainerManager(mode={self.mode!r}, trainer={self.trainer!r})"


def _check_kind(part: str, trainer: Any) -> None:
    argument, wanted = MODES[part]
    if trainer is None or getattr(trainer, "trains", None) == part:
        return
    found = type(trainer).__name__
    trains = getattr(trainer, "trains", None)
    reason = f"{found} trains the {trains}" if trains in MODES else f"found {found}"
    raise TypeError(f"{argument} takes a trainer of the {part}, but {reason}; use {wanted} for it")
