"""Pre-training of a graph foundation model: link prediction on knowledge graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ragkit.evaluation import EvaluationResult
from ragkit.gfm.batches import BatchKey
from ragkit.gfm.checkpoint import load_gfm
from ragkit.gfm.datasets import DatasetError, load_graphs, short_names
from ragkit.gfm.link_evaluation import evaluate_links, question_ids
from ragkit.gfm.losses import link_prediction_loss
from ragkit.gfm.model import QueryGNN
from ragkit.gfm.text_encoder import open_encoder
from ragkit.gfm.training import GFMTraining, new_model
from ragkit.gfm.triples import TrueTriples, corrupt, graph_triples, hold_out
from ragkit.gfm_config import GFMPretrainConfig, GFMPretrainTask
from ragkit.graph import KnowledgeGraph
from ragkit.processes import rank, world_size
from ragkit.runs import Run


@dataclass(frozen=True, eq=False)
class GraphTriples:
    """A graph's facts, those that are learnt from and those that are held out.

    Attributes:
        name: The data set's name.
        graph: The graph without the held-out facts; the message passing walks it in training and evaluation.
        train: [T, 3] (head, tail, relation), each fact once.
        valid: [V, 3].
        facts: All facts of the whole graph: what no negative may be, and what an evaluation filters.
    """

    name: str
    graph: KnowledgeGraph
    train: Tensor
    valid: Tensor
    facts: TrueTriples


def split_triples(name: str, graph: KnowledgeGraph, task: GFMPretrainTask, seed: int) -> GraphTriples:
    """Holds out `task.valid_share` of a graph's facts, at most `task.max_valid`.

    Raises:
        DatasetError: No fact is left to train on.
    """
    keep, held = hold_out(graph, task.valid_share, seed, task.max_valid)
    part = graph.with_triples(keep.numpy())
    train = torch.unique(graph_triples(part), dim=0)
    if not len(train):
        raise DatasetError(f"{name}: the graph has no triple to train on")
    return GraphTriples(name, part, train, held, TrueTriples.of(graph))


class TripleLoss(nn.Module):
    """A link predictor with the loss of pre-training.

    Args:
        model: The link predictor.
        data: The facts of each data set.
        task: Temperature, and whether easy edges are removed.
    """

    def __init__(self, model: QueryGNN, data: Mapping[str, GraphTriples], task: GFMPretrainTask) -> None:
        super().__init__()
        self.model, self.task = model, task
        self._graphs = {name: part.graph for name, part in data.items()}

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Recomputes the model's layers in the backward pass; called by the Trainer."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The same under the name that transformers had for it before version 5."""
        self.model.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def forward(
        self, dataset: str, triples: Tensor, share: float = 1.0, hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of B facts with their negatives.

        Args:
            dataset: Whose graph.
            triples: [B, 1 + K, 3], as `corrupt` makes them.
            share: Factor of the loss (see `BatchKey`).
            hidden: Triples whose edges are hidden; None: `triples`.

        Returns:
            {"loss": scalar, "scores": [B, 1 + K]}.
        """
        hide = self.training and self.task.remove_easy_edges
        scores = self.model(self._graphs[dataset], triples, hide, hidden)
        loss = link_prediction_loss(scores, self.task.adversarial_temperature)
        return {"loss": loss * share, "scores": scores}


class GFMPretrainTrainer(GFMTraining[QueryGNN, GFMPretrainConfig]):
    """Pre-trains a `QueryGNN` to tell true tails of (head, relation, ?) from wrong ones.

    Self-adversarial binary cross-entropy over one true and `task.num_negative` wrong entities for each fact (ULTRA,
    arXiv:2310.04562; GFM-RAG, arXiv:2502.01113). A part of each graph's facts is held out of the graph itself, and
    scored by filtered ranking after every epoch.

    Args:
        config: Settings; None: the defaults.
        model: The model to train; None: from `train.checkpoint`, or new.
        data: The facts by data set; None: what `config.datasets.train_names` names.
        encoder: The text encoder; None: the one of `config.text_emb_model`.
        run: Folder to write to; None: a new one in `config.output_dir`.

    Example:
        >>> trainer = GFMPretrainTrainer(GFMPretrainConfig(datasets={"train_names": ["codex_s"]}))  # doctest: +SKIP
        >>> trainer.train().metrics["eval_mrr"]  # doctest: +SKIP
    """

    def __init__(
        self,
        config: GFMPretrainConfig | None = None,
        *,
        model: QueryGNN | None = None,
        data: Mapping[str, GraphTriples] | None = None,
        encoder: Any = None,
        run: Run | None = None,
    ) -> None:
        config = config or GFMPretrainConfig()
        super().__init__(config, encoder, run)
        if model is None and config.train.checkpoint is not None:
            model = load_gfm(config.train.checkpoint, kind="link_prediction")  # type: ignore[assignment]
        if encoder is None and data is None:
            encoder = self.encoder = open_encoder(config.text_emb_model, config.device)
        if data is None:
            names = config.datasets.train_names
            graphs = load_graphs(names, config.datasets, encoder)
            data = {name: split_triples(name, graphs[name], config.task, config.seed) for name in short_names(names)}
        self.data = dict(data)
        if model is None:
            rel_emb = next(iter(self.data.values())).graph.rel_emb
            assert rel_emb is not None
            model = new_model(config, QueryGNN, rel_emb.shape[1])
        self.model = model
        self.check()

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(part.train) for name, part in self.data.items()}

    @property
    def graphs(self) -> dict[str, KnowledgeGraph]:
        return {name: part.graph for name, part in self.data.items()}

    @property
    def scores_while_training(self) -> bool:
        return bool(self.valid_names)

    @property
    def valid_names(self) -> list[str]:
        return [name for name, part in self.data.items() if len(part.valid)]

    @property
    def metric_names(self) -> list[str]:
        return ["mrr", "mr", *(f"hits@{k}" for k in self.config.task.ks)]

    def loss_module(self) -> TripleLoss:
        return TripleLoss(self.model, self.data, self.config.task)

    def make_batch(self, key: BatchKey) -> dict[str, Any]:
        part, task = self.data[key.dataset], self.config.task
        # The negatives of all processes are drawn, and then a part of them taken: they are those of one process.
        generator = torch.Generator().manual_seed(key.seed)
        rows = corrupt(part.train[key.places], part.facts, task.num_negative, task.strict_negative, generator)
        return {"dataset": key.dataset, "triples": rows[key.mine], "share": key.share, "hidden": rows}

    def validate(self, shard: tuple[int, int] = (0, 1)) -> dict[str, EvaluationResult]:
        return self.evaluate(shard=shard, bootstrap=100)

    def valid_ids(self, name: str) -> list[str]:
        return question_ids(self.data[name].graph, self.data[name].valid)

    def shown(self, results: Mapping[str, EvaluationResult]) -> list[str]:
        names = list(self.metric_names)
        if len(results) > 1:
            names += [f"{name}/{self.config.train.watched_metric}" for name in results]
        return names

    def test(self) -> dict[str, EvaluationResult]:
        return self.gather(self.evaluate(shard=(rank(), world_size())), self.valid_ids)

    def evaluate(self, **options: Any) -> dict[str, EvaluationResult]:
        """Filtered ranking of the held-out facts of each graph, by the model as it is now.

        Args:
            **options: Passed on to `evaluate_links` (ks, bootstrap, ...).
        """
        train = self.config.train
        given = {"ks": self.config.task.ks, "batch_size": train.eval_batch_size or train.batch_size, **options}
        return {
            name: evaluate_links(self.model, part.graph, part.valid, part.facts, **given)
            for name, part in self.data.items()
            if len(part.valid) > given.get("shard", (0, 1))[0]
        }
