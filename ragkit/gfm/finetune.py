"""Fine-tuning of a graph foundation model on questions and their supporting documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ragkit.evaluation import EvaluationResult
from ragkit.gfm.batches import BatchKey
from ragkit.gfm.checkpoint import load_gfm
from ragkit.gfm.datasets import FinetuneData, GraphQuestions, load_finetune_data
from ragkit.gfm.document_losses import document_scores, share_loss
from ragkit.gfm.evaluate import evaluate_gfm, named_ranker
from ragkit.gfm.losses import bce_loss, listce_loss
from ragkit.gfm.model import GNNRetriever
from ragkit.gfm.rankers import Incidence, entity_weights
from ragkit.gfm.text_encoder import open_encoder
from ragkit.gfm.training import GFMTraining, new_model
from ragkit.gfm_config import GFMFinetuneConfig, LossConfig
from ragkit.graph import KnowledgeGraph
from ragkit.processes import rank, world_size
from ragkit.runs import Run
from ragkit.settings import ConfigError

KINDS = ("recall", "all", "filtered_hits")


class QuestionLoss(nn.Module):
    """A retriever with the losses of fine-tuning.

    Args:
        model: The retriever.
        data: The training questions of each data set.
        losses: The terms.
        init_entities_weight: Weigh question entities with 1 / number of documents.
    """

    def __init__(
        self,
        model: GNNRetriever,
        data: Mapping[str, GraphQuestions],
        losses: list[LossConfig],
        init_entities_weight: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.losses = list(losses)
        self._graphs = {name: part.graph for name, part in data.items()}
        self._weights = {
            name: entity_weights(graph) if init_entities_weight else None for name, graph in self._graphs.items()
        }
        self._incidence: dict[str, Incidence] = {}  # on the device that was last asked for

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Recomputes the model's layers in the backward pass; called by the Trainer."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The same under the name that transformers had for it before version 5."""
        self.model.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def forward(
        self,
        dataset: str,
        embeddings: Tensor,
        question_entities: list[Tensor],
        supporting_entities: list[Tensor],
        supporting_documents: list[Tensor],
        share: float = 1.0,
    ) -> dict[str, Tensor]:
        """The loss of B questions over one graph.

        Args:
            dataset: Whose graph.
            embeddings: [B, F].
            question_entities, supporting_entities, supporting_documents: B lists of ids.
            share: Factor of the loss (see `BatchKey`).

        Returns:
            {"loss": scalar, "logits": [B, N]}.
        """
        logits = self.model(self._graphs[dataset], embeddings, question_entities, self._weights[dataset])
        loss = self.loss(logits, dataset, supporting_entities, supporting_documents)
        return {"loss": loss * share, "logits": logits}

    def loss(
        self, logits: Tensor, dataset: str, supporting_entities: list[Tensor], supporting_documents: list[Tensor]
    ) -> Tensor:
        """The weighted sum of the terms on logits [B, N]."""
        total = logits.new_zeros(())
        for term in self.losses:
            if not term.weight:
                continue
            scores, target = logits, supporting_entities
            if term.is_doc_loss:
                kind = term.doc_score or ("score_weighted_idf" if term.name == "listce" else "simple")
                scores, target = (
                    document_scores(logits, self._documents(dataset, logits.device), kind),
                    supporting_documents,
                )
                if kind == "score_weighted_idf":
                    total = total + term.weight * share_loss(scores, target)
                    continue
            if term.name == "bce":
                total = total + term.weight * bce_loss(scores, target, term.adversarial_temperature)
            else:
                total = total + term.weight * listce_loss(scores, target)
        return total

    def _documents(self, dataset: str, device: torch.device) -> Incidence:
        kept = self._incidence.get(dataset)
        if kept is None or kept.ptr.device != device:
            kept = self._incidence[dataset] = Incidence.of(self._graphs[dataset]).to(device)
        return kept


class GFMFinetuneTrainer(GFMTraining[GNNRetriever, GFMFinetuneConfig]):
    """Fine-tunes a `GNNRetriever` on questions with supporting documents.

    The loss is GFM-RAG's by default, on the entities of the supporting documents:

        0.3 · BCE (negatives weighted by softmax(z / 0.2)) + 0.7 · ListCE

    (Luo et al. 2025, arXiv:2502.01113, section 3.2.3), and with `is_doc_loss` terms on the documents themselves. A
    batch is of one graph; every data set is seen whole in every epoch. After every epoch the validation questions
    are scored (by default a tenth of the training questions, split so that no supporting document is on both sides),
    and the weights with the best `train.watched_metric` are kept.

    Args:
        config: Settings; None: the defaults.
        model: The retriever to train; None: from `train.checkpoint`, or new.
        data: What to train on; None: what `config.datasets` names.
        encoder: The text encoder; None: the one of `config.text_emb_model`.
        run: Folder to write to; None: a new one in `config.output_dir`.

    Example:
        >>> trainer = GFMFinetuneTrainer(GFMFinetuneConfig(datasets={"train_names": ["wiki2_mini"]}))  # doctest: +SKIP
        >>> trainer.train().metrics["eval_doc_recall@5"]  # doctest: +SKIP
    """

    def __init__(
        self,
        config: GFMFinetuneConfig | None = None,
        *,
        model: GNNRetriever | None = None,
        data: FinetuneData | None = None,
        encoder: Any = None,
        run: Run | None = None,
    ) -> None:
        config = config or GFMFinetuneConfig()
        super().__init__(config, encoder, run)
        try:  # before anything is computed
            named_ranker(config.doc_ranker.name, config.doc_ranker.top_k)
        except ValueError as error:
            raise ConfigError(f"doc_ranker.top_k: {error}") from error
        if model is None and config.train.checkpoint is not None:
            with torch.random.fork_rng(devices=[]):  # before the data: it may not be there
                torch.manual_seed(config.seed)  # a pre-trained one has no question_mlp; the same new one everywhere
                model = load_gfm(config.train.checkpoint, kind="retriever")  # type: ignore[assignment]
        if encoder is None and data is None:
            encoder = self.encoder = open_encoder(config.text_emb_model, config.device)
        self.data = load_finetune_data(config.datasets, encoder, config.seed) if data is None else data
        if model is None:
            rel_emb = next(iter(self.data.train.values())).graph.rel_emb
            assert rel_emb is not None
            model = new_model(config, GNNRetriever, rel_emb.shape[1])
        self.model = model
        self.check()

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(part.questions) for name, part in self.data.train.items()}

    @property
    def graphs(self) -> dict[str, KnowledgeGraph]:
        return {name: part.graph for name, part in self.data.train.items()}

    @property
    def scores_while_training(self) -> bool:
        return bool(self.data.valid)

    @property
    def valid_names(self) -> list[str]:
        return list(self.data.valid)

    @property
    def metric_names(self) -> list[str]:
        kinds = [f"{what}_{kind}@{k}" for what in ("doc", "ent") for kind in KINDS for k in self.config.task.ks]
        return kinds + [f"{what}_{name}" for what in ("doc", "ent") for name in ("mrr", "filtered_mrr")]

    def loss_module(self) -> QuestionLoss:
        return QuestionLoss(
            self.model, self.data.train, self.config.task.losses, self.config.train.init_entities_weight
        )

    def make_batch(self, key: BatchKey) -> dict[str, Any]:
        batch = self.data.train[key.dataset].questions.batch(key.places[key.mine])
        return {
            "ids": batch.ids,
            "dataset": key.dataset,
            "embeddings": batch.embeddings,
            "question_entities": batch.question_entities,
            "supporting_entities": batch.supporting_entities,
            "supporting_documents": batch.supporting_documents,
            "share": key.share,
        }

    def validate(self, shard: tuple[int, int] = (0, 1)) -> dict[str, EvaluationResult]:
        return self._scores(self.data.valid, shard, bootstrap=100)

    def valid_ids(self, name: str) -> list[str]:
        return self.data.valid[name].questions.ids

    def shown(self, results: Mapping[str, EvaluationResult]) -> list[str]:
        names = [f"doc_recall@{k}" for k in self.config.task.ks if k in (2, 5)] + ["doc_mrr", "ent_mrr"]
        watched = self.config.train.watched_metric
        if len(results) > 1:
            names += [f"{name}/{watched}" for name in results]
        return names

    def test(self) -> dict[str, EvaluationResult]:
        data = self.data.test
        return self.gather(self._scores(data, (rank(), world_size())), lambda name: data[name].questions.ids)

    def evaluate(
        self, data: Mapping[str, GraphQuestions] | None = None, **options: Any
    ) -> dict[str, EvaluationResult]:
        """Scores of the model as it is now, data set by data set.

        Args:
            data: Questions by data set; None: the test questions.
            **options: Passed on to `evaluate_gfm` (ranker, ks, bootstrap, ...).
        """
        return self._scores(self.data.test if data is None else data, **options)

    def _scores(
        self, data: Mapping[str, GraphQuestions], shard: tuple[int, int] = (0, 1), **options: Any
    ) -> dict[str, EvaluationResult]:
        config = self.config
        given = {
            "ranker": config.doc_ranker.name,
            "ranker_k": config.doc_ranker.top_k,
            "ks": config.task.ks,
            "batch_size": config.train.eval_batch_size or config.train.batch_size,
            "init_entities_weight": config.train.init_entities_weight,
            **options,
        }
        return {
            name: evaluate_gfm(self.model, part.graph, part.questions, shard=shard, **given)
            for name, part in data.items()
            if len(part.questions) > shard[0]  # fewer questions than processes leave some without any
        }
