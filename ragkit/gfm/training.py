"""What GFM pre-training and fine-tuning share: the engine's settings, the run, the best model."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback

from ragkit.best import best_of, give_to_all, keep_if_better
from ragkit.config import TrainConfig
from ragkit.engine import RunTrainer, TrainResult, run_training, training_arguments
from ragkit.evaluation import EvaluationResult
from ragkit.gfm.batches import BatchKey, EpochBatches, EpochLoader
from ragkit.gfm.checkpoint import load_gfm, save_gfm
from ragkit.gfm.graph_view import view_of
from ragkit.gfm.model import GraphModel
from ragkit.gfm.settings import GFMSettings
from ragkit.gfm.shards import mean_metrics, merge_shards
from ragkit.gfm.text_encoder import InstructedEncoder
from ragkit.gfm_config import GFMRunConfig
from ragkit.graph import KnowledgeGraph
from ragkit.processes import is_first, join, rank, world_size
from ragkit.rag.loading import resolve_device
from ragkit.run_opening import open_run
from ragkit.runs import Run
from ragkit.settings import ConfigError

MODEL = "model"
LOWER_IS_BETTER = ("mr",)
__all__ = ["MODEL", "GFMTraining", "best_of", "new_model"]
M = TypeVar("M", bound=GraphModel)
C = TypeVar("C", bound=GFMRunConfig)


class GFMTraining(ABC, Generic[M, C]):
    """A training of a graph foundation model; `GFMFinetuneTrainer` and `GFMPretrainTrainer` are the two there are.

    Attributes:
        config: The settings.
        model: The model; trained in place. After `train` it has the weights of the best evaluation.
        encoder: The text encoder of questions and relations.
        run: The run folder; None until training starts. Its `model/` is the best model so far, in our format.
        callbacks: `transformers.TrainerCallback`s that each training is given.
    """

    model: M

    def __init__(self, config: C, encoder: Any, run: Run | None) -> None:
        self.config = config
        self.encoder = encoder
        self.run = run
        self.trainer: RunTrainer | None = None
        self.callbacks: list[TrainerCallback] = []
        self._check_metric(self.config.train.watched_metric.rpartition("/")[2], self.metric_names)

    # ---- what the two differ in ----

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Number of training examples of each data set."""

    @property
    @abstractmethod
    def graphs(self) -> dict[str, KnowledgeGraph]:
        """The graphs that are trained on."""

    @property
    @abstractmethod
    def scores_while_training(self) -> bool:
        """Whether there is something to choose the best model by."""

    @property
    @abstractmethod
    def valid_names(self) -> list[str]:
        """The data sets that are scored to choose the best model."""

    @property
    @abstractmethod
    def metric_names(self) -> list[str]:
        """The metrics that an evaluation gives."""

    @abstractmethod
    def loss_module(self) -> nn.Module:
        """The model with its loss: takes what `make_batch` makes, returns {"loss": scalar}."""

    @abstractmethod
    def make_batch(self, key: BatchKey) -> dict[str, Any]:
        """The batch of a key."""

    @abstractmethod
    def validate(self, shard: tuple[int, int] = (0, 1)) -> dict[str, EvaluationResult]:
        """Scores of this process's part of what chooses the best model."""

    @abstractmethod
    def shown(self, results: Mapping[str, EvaluationResult]) -> list[str]:
        """The metrics that are logged at every evaluation."""

    # ---- the training ----

    def train(self, resume: bool = False) -> TrainResult:
        """Trains the model in place, and keeps the best weights in the run's `model/`.

        Args:
            resume: Go on with `run` (or with the run called `config.name`) from its last checkpoint.

        Returns:
            Loss, history, steps and the run's folder.

        Raises:
            NonFiniteLossError: The loss became NaN or infinite; the message names the batch.
            RunError: The run has events already, or (resume) there is none.
        """
        config = self.config
        run = self.open_run(resume)
        loader = EpochLoader(self._order(), self.make_batch)
        settings = self.engine_settings(len(loader))
        evaluates = settings.eval_steps is not None
        best = _Best(run, config.train.watched_metric, self)
        trainer = _Trainer(
            self.loss_module(),
            training_arguments(settings, run, device=config.device),
            run,
            evaluate_fn=self._evaluate if evaluates else None,
            train_dataset=loader.dataset,
            callbacks=[*([best] if evaluates else []), *self.callbacks],
        )
        trainer.loader, self.trainer = loader, trainer
        self.model.train()
        result = run_training(trainer, run, resume=resume)
        self.model.eval()
        folder = run.dir / MODEL
        if is_first() and not (evaluates and folder.is_dir()):
            save_gfm(self.model, folder, encoder=self.encoder_facts())
        elif is_first():
            self.model.load_state_dict(load_gfm(folder).state_dict())
        give_to_all(self.model.parameters())  # the best weights are with the first process
        return result

    def engine_settings(self, batches: int) -> TrainConfig:
        """The engine's settings.

        Args:
            batches: Batches in an epoch, on each process.
        """
        t, o = self.config.train, self.config.optimizer
        steps = max(1, -(-batches // t.gradient_accumulation_steps))
        total = t.max_steps or round(steps * t.num_epoch)
        every = {"eval": t.eval_steps or steps, "save": t.save_steps or steps}
        return TrainConfig(
            batch_size=t.batch_size,
            learning_rate=o.lr,
            weight_decay=o.weight_decay,
            num_epochs=t.num_epoch,
            max_steps=t.max_steps,
            warmup_steps=t.warmup_steps,
            schedule=t.schedule,
            max_grad_norm=t.max_grad_norm,
            gradient_accumulation_steps=t.gradient_accumulation_steps,
            precision=t.precision,
            gradient_checkpointing=t.gradient_checkpointing,
            seed=self.config.seed,
            logging_steps=t.log_interval,
            save_steps=every["save"],
            eval_steps=min(every["eval"], max(1, total)) if t.do_eval and self.scores_while_training else None,
            save_total_limit=t.save_total_limit,
            num_threads=t.num_threads,
            report_to=t.report_to,
        )

    def open_run(self, resume: bool) -> Run:
        """The run of this training: a new one, or for `resume` the one to go on with; see `run_opening.open_run`."""
        self.run = open_run(self.config, self.run, resume, again=self.trainer is not None)
        return self.run

    def _order(self) -> EpochBatches:
        t = self.config.train
        return EpochBatches(self.sizes, t.batch_size, self.config.seed, rank(), world_size(), most=t.batch_per_epoch)

    def _evaluate(self) -> dict[str, float]:
        """The logged metrics of the validation sets."""
        results = self.gather(self.validate((rank(), world_size())), self.valid_ids)
        means = mean_metrics(results)
        names = [*self.shown(results), self.config.train.watched_metric]
        return {name: means[name] for name in dict.fromkeys(names) if name in means}

    @staticmethod
    def gather(results: dict[str, EvaluationResult], ids: Callable[[str], list[str]]) -> dict[str, EvaluationResult]:
        """The whole results on every process, each example counted once.

        Args:
            results: What this process has scored: its shard of each data set.
            ids: The ids of a data set, in order.
        """
        if world_size() == 1:
            return results
        parts: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(parts, results)
        names = list(dict.fromkeys(name for part in parts for name in part))
        return {name: merge_shards([part[name] for part in parts if name in part], ids(name)) for name in names}

    @abstractmethod
    def test(self) -> dict[str, EvaluationResult]:
        """Scores of the model as it is now, on what is compared before and after; all processes take part."""

    @abstractmethod
    def valid_ids(self, name: str) -> list[str]:
        """The ids of a validation set, in order."""

    def encoder_facts(self) -> Any:
        """What a checkpoint says of the encoder; None if nothing is known of it."""
        encoder = self.encoder
        if getattr(encoder, "name", None) is not None:  # an `Encoder` that was given as it is
            encoder = InstructedEncoder(encoder)
        facts = getattr(encoder, "facts", None)
        return facts if facts is not None else self.model.encoder_info

    def check(self) -> None:
        """Puts the model on its device and looks for what would fail later: encoder and metric that do not fit.

        Raises:
            GraphError: The encoder gives another number of values than the model wants.
            ConfigError: `train.watched_metric` is of a data set that is not scored.
        """
        join(self.config.device)  # each of several processes gets its own GPU, which is "cuda" from then on
        self.model.to(resolve_device(self.config.device))
        for graph in self.graphs.values():
            view_of(graph).check_rel_emb(graph.rel_emb, self.model.settings.rel_emb_dim)
        name, slash, _ = self.config.train.watched_metric.rpartition("/")
        if slash and self.scores_while_training and self.config.train.do_eval:
            self._check_metric(name, self.valid_names, "a data set that is scored while training, ")

    def _check_metric(self, found: str, known: list[str], what: str = "") -> None:
        if found not in known:
            near = difflib.get_close_matches(found, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            watched = self.config.train.watched_metric
            raise ConfigError(
                f"train.watched_metric: found {watched!r}, expected {what}one of {', '.join(known)}{hint}"
            )


class _Trainer(RunTrainer):
    """The engine with our own order of batches, and AdamW as PyTorch and GFM-RAG have it."""

    loader: EpochLoader

    def get_train_dataloader(self) -> Any:
        return self.loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them: transformers would leave out biases and norms, which v1's AdamW decays too."""
        return [name for name, _ in model.named_parameters()]


class _Best(TrainerCallback):
    """Keeps the weights of the best evaluation in the run's folder."""

    def __init__(self, run: Run, metric: str, training: GFMTraining[Any, Any]) -> None:
        self.run, self.metric, self.training = run, metric, training

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Saves the model if it is better than all before; a resumed run compares with what it had reached."""
        if not state.is_world_process_zero:
            return
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None:
            return
        training, run = self.training, self.run
        lower = self.metric.rpartition("/")[2] in LOWER_IS_BETTER
        save = lambda: save_gfm(training.model, run.dir / MODEL, encoder=training.encoder_facts())  # noqa: E731
        keep_if_better(run, self.metric, value, state.global_step, save, lower)


def new_model(config: GFMRunConfig, kind: Any, width: int) -> Any:
    """A model from scratch, with weights drawn by the run's seed.

    Args:
        config: Its `model.entity_model` gives sizes and kinds.
        kind: `GNNRetriever` or `QueryGNN`.
        width: F, numbers in an embedding of the encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return kind(GFMSettings(rel_emb_dim=width, **config.model.entity_model.model_dump()))
