"""Link prediction scored: where the model ranks the tails and heads of held-out facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ragkit.evaluation import EvaluationResult
from ragkit.gfm.easy_edges import inverse
from ragkit.gfm.graph_view import view_of
from ragkit.gfm.model import QueryGNN
from ragkit.gfm.triples import TrueTriples


def evaluate_links(
    model: QueryGNN,
    graph: Any,
    triples: Tensor,
    index: TrueTriples,
    ks: Sequence[int] = (1, 3, 10),
    batch_size: int = 8,
    shard: tuple[int, int] = (0, 1),
    bootstrap: int = 2000,
    seed: int = 0,
) -> EvaluationResult:
    """Filtered ranking of the tail and of the head of each triple among all entities (Bordes et al. 2013, TransE).

        rank = 1 + higher + ties / 2     over the entities that make no other true fact

    That is the mean of the best and the worst rank that the ties allow, so a model that scores everything alike does
    not look good (nor, as in GFM-RAG v1, which counts ties as worse, the worst). v1 also ranks training triples, and
    hides the easy edges in evaluation: where each entity is a candidate, those are all edges `(head, relation, *)` of
    the question. Here the triples are held out, and every edge of `graph` stays.

    Args:
        model: The model; scored in eval mode, left in the mode that it was in.
        graph: The graph to walk, without the triples (`graph.with_triples(keep)` of `hold_out`).
        triples: [V, 3] integer (head, tail, relation), each once; no inverse relations.
        index: All known facts, of training and held out: `TrueTriples.of(whole graph)`.
        ks: Cut-offs of hits@k.
        batch_size: Questions at once; a triple makes two.
        shard: (rank, world): only the triples at places rank, rank + world, ...
        bootstrap: Resamples behind the intervals.
        seed: Seed of the resampling.

    Returns:
        For each question, "head|relation|tail: tail" or "...: head" (with names where the graph has them): `mrr`
        (1 / rank), `mr` (rank), `hits@k` (1 where rank <= k). No question where the shard has no triple.

    Raises:
        GraphError: The graph or its relation embeddings do not fit the model.
        ValueError: No triple, one that stands twice, is turned round or not in the index, an index of another graph,
            or scores that are NaN.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard: expected (rank, world) with 0 <= rank < world, found {shard}")
    if batch_size < 1 or not ks or min(ks) < 1:
        raise ValueError(f"expected batch_size and each k 1 or more, found batch_size {batch_size}, ks {tuple(ks)}")
    view = view_of(graph)
    if (view.num_nodes, view.num_relations) != (index.num_entities, index.num_relations):
        raise ValueError(
            f"the graph has {view.num_nodes} entities and {view.num_relations} relations with inverses, the index "
            f"{index.num_entities} and {index.num_relations}; build it from the whole graph that this is a part of"
        )
    triples = _checked(triples, index)[rank::world]
    head, tail, rel = triples.unbind(1)  # [V] each
    # Both questions of a triple side by side: [V, 2] -> [2V]
    source = torch.stack([head, tail], 1).flatten()
    asked = torch.stack([rel, inverse(rel, index.num_relations)], 1).flatten()
    gold = torch.stack([tail, head], 1).flatten()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batches = torch.arange(len(gold)).split(batch_size) if len(gold) else ()
            ranks = [_ranks(model, graph, source[b], asked[b], gold[b], index) for b in batches]
    finally:
        model.train(training)
    places = np.concatenate([np.zeros(0), *ranks])  # [2V]
    values = {"mrr": 1 / places, "mr": places}
    values.update({f"hits@{k}": places <= k for k in sorted(set(ks))})
    return EvaluationResult(question_ids(graph, triples), values, bootstrap=bootstrap, seed=seed)


def _ranks(model: QueryGNN, graph: Any, source: Tensor, asked: Tensor, gold: Tensor, index: TrueTriples) -> np.ndarray:
    """[B] filtered ranks of the right answers."""
    scores = model.score_all(graph, source, asked)  # [B, N]
    broken = scores.isnan().any(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"the model's scores of (entity {int(source[first])}, relation {int(asked[first])}, ?) hold NaN; its "
            "weights or the relation embeddings are broken"
        )
    right = scores.gather(1, gold.to(scores.device)[:, None])  # [B, 1]
    higher, equal = (scores > right).sum(1).cpu(), (scores == right).sum(1).cpu() - 1  # [B]; the answer equals itself
    true = index.true_tails(source, asked)
    row = torch.arange(len(gold)).repeat_interleave(true.ptr.diff())
    other = true.ids != gold[row]
    row, ids = row[other], true.ids[other]
    of_true = scores[row.to(scores.device), ids.to(scores.device)].cpu()
    level = right.squeeze(1).cpu()[row]
    higher.index_add_(0, row, -(of_true > level).long())  # other true answers do not compete
    equal.index_add_(0, row, -(of_true == level).long())
    return (1 + higher + equal / 2).double().numpy()


def _checked(triples: Tensor, index: TrueTriples) -> Tensor:
    triples = index.check(triples)
    if not len(triples):
        raise ValueError("there are no triples to evaluate")
    different, counts = triples.unique(dim=0, return_counts=True)
    if len(different) < len(triples):
        twice = tuple(different[counts > 1][0].tolist())
        raise ValueError(
            f"{len(triples) - len(different)} of {len(triples)} triples stand there before, for example "
            f"(head, tail, relation) = {twice}; give each once"
        )
    head, tail, rel = triples.unbind(1)
    turned = rel >= index.num_relations // 2
    if turned.any():
        raise ValueError(
            f"row {int(turned.nonzero()[0])} of the triples has an inverse relation; give the fact the other way "
            "round, since both of its ends are asked for anyway"
        )
    unknown = ~index.contains(head, rel, tail)
    if unknown.any():
        raise ValueError(
            f"{int(unknown.sum())} of {len(triples)} triples are not in the index (first: row "
            f"{int(unknown.nonzero()[0])}), so they would compete with each other; build it with them: "
            "TrueTriples.of(graph, triples)"
        )
    return triples


def question_ids(graph: Any, triples: Tensor) -> list[str]:
    """The 2V ids of `evaluate_links`: for each triple (head, tail, relation) that of its tail, then of its head.

    Bars and backslashes in names have a backslash before them, so different facts have different ids.
    """
    entities, relations = getattr(graph, "entities", None), getattr(graph, "relations", None)
    ids = []
    for head, tail, rel in triples.tolist():
        names = [str(head), str(rel), str(tail)]
        if entities is not None and relations is not None:
            names = [entities[head], relations[rel], entities[tail]]
        fact = "|".join(name.replace("\\", "\\\\").replace("|", "\\|") for name in names)
        ids += [f"{fact}: tail", f"{fact}: head"]
    return ids
