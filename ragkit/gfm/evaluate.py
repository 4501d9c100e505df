"""How well a graph foundation model finds the supporting entities and documents of questions.

Two kinds of figures stand side by side, since they answer different questions and only the first compares with other
retrievers: the true ranking (recall@k, all@k, mrr), and GFM-RAG v1's filtered one (`ragkit.metrics.filtered_ranks`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ragkit.evaluation import EvaluationResult
from ragkit.gfm.questions import QuestionSet
from ragkit.gfm.rankers import RANKERS, Incidence, entity_weights
from ragkit.gfm.rankings import Rankings
from ragkit.gfm.shards import each_once
from ragkit.graph import KnowledgeGraph

KS = (1, 2, 5, 10, 20)


def evaluate_gfm(
    model: nn.Module,
    graph: KnowledgeGraph,
    questions: QuestionSet,
    ranker: str = "idf_topk",
    ranker_k: int | None = None,
    ks: Sequence[int] = KS,
    batch_size: int = 8,
    init_entities_weight: bool = True,
    bootstrap: int = 2000,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> EvaluationResult:
    """Scores a model on questions: documents through a ranker (`doc_...`), and entities (`ent_...`).

    | value of a question | meaning |
    |---|---|
    | `doc_recall@k` | share of its supporting documents among the first k |
    | `doc_all@k` | 1 if all of them are among the first k |
    | `doc_mrr` | 1 / rank of the first of them, in the whole ranking |
    | `doc_filtered_hits@k` | share of them with filtered rank <= k (GFM-RAG v1's hits@k) |
    | `doc_filtered_mrr` | mean of 1 / filtered rank over them (v1's mrr) |

    The true ranking takes equal scores in the order of ids, as `ragkit.gfm.rankers.rank` does when it retrieves; the
    filtered one counts them half.

    Args:
        model: A `GNNRetriever`. It scores in eval mode without gradient, under the autocast that is active, and has
            its mode back afterwards.
        graph: With `rel_emb` set.
        questions: Over this graph.
        ranker: One of `RANKERS`.
        ranker_k: Its k; None: its own default.
        ks: Cut-offs.
        batch_size: Questions that the model scores at once; one batch of [questions, entities] exists at a time.
        init_entities_weight: Weigh question entities with 1 / number of documents, as GFM-RAG does.
        bootstrap: Resamples behind the intervals.
        seed: Seed of the resampling.
        shard: (rank, world): score only the questions whose place leaves `rank` when divided by `world`, for several
            processes whose results `merge_shards` puts together. A model whose logits depend (in their last bits) on
            which questions share a batch may break ties otherwise than in one process.

    Returns:
        The values by question id (nan for a question without a supporting entity or document), and as `retrieved` the
        best max(ks) documents.

    Raises:
        ValueError: Unknown ranker, no question, ids twice or not of this graph, or scores that are NaN.
        GraphError: `rel_emb` is missing or does not fit the model.
    """
    chosen = {ranker: named_ranker(ranker, ranker_k)}
    found = evaluate_rankers(
        model, graph, questions, chosen, ks, batch_size, init_entities_weight, bootstrap, seed, shard
    )
    return found[ranker]


def evaluate_rankers(
    model: nn.Module,
    graph: KnowledgeGraph,
    questions: QuestionSet,
    rankers: Mapping[str, Callable[..., Tensor]],
    ks: Sequence[int] = KS,
    batch_size: int = 8,
    init_entities_weight: bool = True,
    bootstrap: int = 2000,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, EvaluationResult]:
    """The same for several rankers, with one run of the model.

    Args:
        rankers: Name -> function of (logits [B, N], `Incidence`) that gives [B, docs]; `RANKERS` itself, or some of
            it. The other arguments are those of `evaluate_gfm`.

    Returns:
        For each ranker its result; the `ent_...` values are the same in all.
    """
    incidence = Incidence.of(graph)
    if not rankers:
        raise ValueError(f"there is no ranker; the known ones are {', '.join(RANKERS)}")
    places = _places(graph, questions, ks, batch_size, shard)
    weights = entity_weights(incidence) if init_entities_weight else None
    entities, documents = Rankings(max(ks)), {name: Rankings(max(ks)) for name in rankers}
    ids: list[str] = []
    with scoring(model):
        for start in range(0, len(places), batch_size):
            batch = questions.batch(places[start : start + batch_size])
            logits = model(graph, batch.embeddings, batch.question_entities, weights)
            if incidence.ptr.device != logits.device:
                incidence = incidence.to(logits.device)
            entities.add("the logits", batch.ids, logits, graph.num_entities, batch.supporting_entities)
            for name, ranker in rankers.items():
                scores = ranker(logits, incidence)
                what = f"ranker {name!r}"
                documents[name].add(what, batch.ids, scores, graph.num_documents, batch.supporting_documents)
            ids += batch.ids
    of_entities = entities.values("ent", ks)
    results = {}
    for name, ranking in documents.items():
        values = {**ranking.values("doc", ks), **of_entities}
        retrieved = [[graph.documents[place] for place in row] for row in ranking.top]
        results[name] = EvaluationResult(list(ids), values, None, retrieved, bootstrap, seed)
    return results


def evaluate_datasets(
    model: nn.Module, datasets: Mapping[str, tuple[KnowledgeGraph, QuestionSet]], **options: Any
) -> dict[str, EvaluationResult]:
    """`evaluate_gfm` on several data sets.

    Args:
        model: A `GNNRetriever`.
        datasets: Name -> (graph, questions).
        **options: Arguments of `evaluate_gfm`.
    """
    return {name: evaluate_gfm(model, graph, questions, **options) for name, (graph, questions) in datasets.items()}


def named_ranker(name: str, k: int | None = None) -> Callable[..., Tensor]:
    """A ranker of `RANKERS` by its name, with its k (None: its own default).

    Raises:
        ValueError: No such name (the message has the nearest one), or a k for one that takes none.
    """
    if name not in RANKERS:
        near = difflib.get_close_matches(name, RANKERS, n=1, cutoff=0.0)
        raise ValueError(f"no ranker {name!r} (did you mean {near[0]!r}?); known: {', '.join(RANKERS)}")
    if k is None:
        return RANKERS[name]
    takes = [other for other, ranker in RANKERS.items() if "k" in inspect.signature(ranker).parameters]
    if name not in takes:
        raise ValueError(f"ranker {name!r} takes no k, found {k}; leave it out, or use one of {', '.join(takes)}")
    if k < 1:
        raise ValueError(f"ranker_k: expected a whole number from 1, found {k}")
    return partial(RANKERS[name], k=k)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient inside; afterwards every part has its own mode back.

    A model that was training is set to train again as a whole first, by which it lets go of the tables and
    backgrounds that it kept for the questions (up to gigabytes).
    """
    modes = [(part, part.training) for part in model.modules()]
    if any(training for _, training in modes):  # else what a model keeps for its next call may stay
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if modes[0][1]:
            model.train()
        for part, training in modes:
            part.training = training


def _places(
    graph: KnowledgeGraph, questions: QuestionSet, ks: Sequence[int], batch_size: int, shard: tuple[int, int]
) -> range:
    """The places of this shard's questions, after checks that need no computing."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected at least one cut-off, each 1 or more, found {list(ks)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, found {batch_size}")
    number, world = shard
    if not 0 <= number < world:
        raise ValueError(f"shard: expected (rank, world) with 0 <= rank < world, found {shard}")
    if not len(questions):
        raise ValueError("there are no questions to evaluate")
    each_once(questions.ids)
    for column, limit, what in (
        (questions.question_entities, graph.num_entities, "entities"),
        (questions.supporting_entities, graph.num_entities, "entities"),
        (questions.supporting_documents, graph.num_documents, "documents"),
    ):
        wrong = (column.ids < 0) | (column.ids >= limit)
        if wrong.any():
            raise ValueError(
                f"the questions name {what} with ids such as {int(column.ids[wrong][0])}, the graph has {limit:,}: "
                "they were loaded for another graph"
            )
    return range(number, len(questions), world)
