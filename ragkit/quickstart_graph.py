"""The quick start's graph step: a small graph foundation model learns to find what is two hops away."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from ragkit import small_world
from ragkit.config import QuickstartConfig
from ragkit.engine import TrainResult
from ragkit.evaluation import Comparison, EvaluationResult, compare, evaluate
from ragkit.gfm.datasets import FinetuneData, GraphQuestions, hold_out_questions
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.gfm.questions import QuestionSet
from ragkit.gfm.retriever import GFMRetriever
from ragkit.gfm.text_encoder import InstructedEncoder, embed_relations
from ragkit.graph import KnowledgeGraph
from ragkit.inputs import Retrieval
from ragkit.rag.corpus import load_corpus
from ragkit.rag.encoder import Encoder
from ragkit.rag.retriever import Retriever
from ragkit.runs import Run
from ragkit.tuning.qa_data import QAData, load_qa

NAME = "small_world"
KS = (1, 2, 5)
DENSE, GRAPH = "dense", "graph"


@dataclass(frozen=True, eq=False)
class GraphStep:
    """What the graph step works on.

    Attributes:
        graph: The small world's knowledge graph.
        encoder: The text encoder of questions and relations.
        data: Training and validation questions.
        test: The two-hop questions that both retrievers are scored on.
    """

    graph: KnowledgeGraph
    encoder: InstructedEncoder
    data: FinetuneData
    test: QAData


def load_graph_step(config: QuickstartConfig) -> GraphStep:
    """Graph and questions: all two-hop training questions and `n_graph` one-hop ones; all two-hop test questions.

    No entity that a training question is about is in a test question.
    """
    graph = KnowledgeGraph.load(NAME)
    encoder = InstructedEncoder(Encoder("default", config.rag.device))
    embed_relations(graph, encoder)
    questions = QuestionSet.load(_training_rows(config), graph, encoder)
    kept, held_out = hold_out_questions(questions, config.gfm.datasets.valid_share, config.seed)
    train, valid = (GraphQuestions(NAME, graph, questions.subset(places)) for places in (kept, held_out))
    two_hop = [example for example in load_qa(NAME, split="test") if example.metadata["hops"] == 2]
    return GraphStep(graph, encoder, FinetuneData({NAME: train}, {NAME: valid}, {}), QAData(two_hop, NAME))


def _training_rows(config: QuickstartConfig) -> list[dict[str, Any]]:
    path = small_world.path() / "processed" / "stage1" / "train.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    one_hop = [row for row in rows if row["hops"] == 1]
    drawn = random.Random(config.seed).sample(one_hop, min(config.n_graph, len(one_hop)))
    return [row for row in rows if row["hops"] == 2] + drawn


def tune_graph(step: GraphStep, config: QuickstartConfig, run: Run) -> tuple[TrainResult, GFMRetriever]:
    """Fine-tunes a graph foundation model from scratch.

    Args:
        step: From `load_graph_step`.
        config: The settings; `gfm` are those of the training.
        run: The quickstart's run folder; the training gets a folder in it.

    Returns:
        (what the training gave, a retriever with the model).
    """
    settings = config.gfm.model_copy(deep=True)
    settings.output_dir, settings.name, settings.seed = str(run.dir), "gfm", config.seed
    settings.device = config.rag.device
    trainer = GFMFinetuneTrainer(settings, data=step.data, encoder=step.encoder)
    result = trainer.train()
    ranker = settings.doc_ranker
    retriever = GFMRetriever(
        trainer.model,
        step.graph,
        step.encoder.encoder,
        load_corpus(NAME),
        ranker=ranker.name,
        ranker_options={} if ranker.top_k is None else {"k": ranker.top_k},
        init_entities_weight=settings.train.init_entities_weight,
    )
    return result, retriever


def score_retriever(retriever: Retriever, step: GraphStep, config: QuickstartConfig) -> EvaluationResult:
    """Retrieval scores on the two-hop test questions."""
    return evaluate(
        Retrieval(retriever), step.test, ks=KS, generate=False, bootstrap=config.bootstrap, seed=config.seed
    )


def compare_retrievers(dense: EvaluationResult, graph: EvaluationResult) -> Comparison:
    """The dense retriever beside the graph retriever, with the intervals of the differences."""
    return compare(dense, graph, labels=(DENSE, GRAPH))
