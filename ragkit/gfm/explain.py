"""Why a graph foundation model scored an entity or a document: gradients of the score for the edges, and best paths.

Zhu et al. 2021 (arXiv:2106.06935), path interpretations: every edge of every layer has a weight, which is 1; the
gradient of the score for it says how much the message over it matters there, and a path matters by the mean over its
edges. GFM-RAG v1 takes these gradients of another function, whose messages go the other way round; here they are those
of the model's own forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ragkit_kernels.relational_conv import GraphLayout
from torch import Tensor

from ragkit.gfm.graph_names import GraphNames
from ragkit.gfm.graph_view import view_of
from ragkit.gfm.model import GNNRetriever
from ragkit.gfm.path_search import MAX_EXTENSIONS, FoundPath, Hops, best_paths
from ragkit.gfm.paths import Explanation, Path, PathStep
from ragkit.gfm.rankers import RANKERS, Incidence
from ragkit.gfm.text_encoder import TextEncoder, encode

SMOOTH = ("score_weighted_idf", "idf", "simple")  # the rankers with a gradient


def explain(
    model: GNNRetriever,
    graph: Any,
    question: str | Tensor,
    question_entities: Sequence[int | str],
    target: int | str,
    *,
    encoder: TextEncoder | None = None,
    text: str | None = None,
    target_kind: str = "auto",
    entities_weight: Tensor | None = None,
    top_paths: int = 10,
    beam: int = 10,
    ranker: str = "score_weighted_idf",
) -> Explanation:
    """The paths from a question's entities to an entity or a document that raise its score most.

        weight(path) = max over layers l_1 < ... < l_m of  1/m Σ_i ∂ score / ∂ w[l_i, e_i]     at w = 1

    A path has at most as many hops as the model has layers, and visits no entity twice. Weights below 0 belong to
    paths that lower the score. The gradient is that of the first order: deleting an edge changes the score by about
    it only where the score bends little, and with "mean" or "pna" it does not see the node's degree change.

    Args:
        model: The model; any of its settings.
        graph: As in `GNNRetriever.forward`. A document as the target needs a `KnowledgeGraph`.
        question: Its text (then `encoder` is needed), or its embedding [F].
        question_entities: Ids or names of the entities that the question starts from.
        target: Id or name of an entity, or name of a document. Of a document, the score is `ranker`'s, and paths end
            at its entities.
        encoder: The one that embedded the relations.
        text: The question's text where `question` is an embedding.
        target_kind: "entity" or "document", where a name is both, or where `target` is a document's number; "auto":
            what has that name (a number is an entity's id).
        entities_weight: [N] factors of the question's entities, as in training (`entity_weights(graph)`); None: ones.
        top_paths: Paths wanted.
        beam: Partial paths that are extended of those with the same last entity and number of hops. The search is
            best-first, so that this seldom cuts anything off; greater is nearer to exact.
        ranker: The score of a document: "score_weighted_idf", Σ σ(logit) / number of documents over its entities;
            "idf" or "simple", the same with logits, and without the number. "topk" and "idf_topk" have no gradient.

    Returns:
        The explanation; without paths where none leads to the target, with a note that says so.

    Raises:
        GraphError: A name that the graph does not have (the nearest one is named) or that is both, or no documents.
        ValueError: No question entity, ids out of range, no encoder for a text, or a ranker without gradient.

    Example:
        >>> print(explain(model, graph, "Which country borders Peru?", ["peru"], "chile", encoder=encoder))
        ... # doctest: +SKIP
    """
    if not isinstance(model, GNNRetriever):
        raise TypeError(f"explain takes a GNNRetriever, found a {type(model).__name__}")
    for name, value in (("top_paths", top_paths), ("beam", beam)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1, found {value!r}")
    if ranker not in SMOOTH:
        why = "it only counts the best entities, which has no gradient" if ranker in RANKERS else "there is no such"
        raise ValueError(f"ranker: {ranker!r} cannot be explained ({why}); take one of {', '.join(SMOOTH)}")
    names = GraphNames(graph)
    starts = list(dict.fromkeys(names.entity(entity, "question_entities") for entity in _listed(question_entities)))
    if not starts:
        raise ValueError("question_entities is empty: paths have nowhere to begin, and the model nothing to spread")
    kind, number, label = names.target(target, target_kind)
    ends = [number] if kind == "entity" else graph.entities_of(number).tolist()
    if isinstance(question, str):
        if encoder is None:
            raise ValueError("question is a text: give encoder=, or the question's embedding [F]")
        embedding, text = encode(encoder, [question], "query")[0], question if text is None else text
    else:
        embedding = question.squeeze(0) if question.ndim == 2 else question
    with torch.inference_mode(False), torch.enable_grad():
        logits, weights, mask = forward(model, graph, embedding, starts, ends, entities_weight)
        score = logits.sum() if kind == "entity" else document_score(logits, Incidence.of(graph).idf[ends], ranker)
        gradients = edge_gradients(score, weights)  # [L, E]
    begin = [start for start in starts if float(mask[start]) != 0]
    hops = Hops.of(view_of(graph).layout(torch.device("cpu")))
    found, stopped = best_paths(hops, hops.weights(gradients), begin, ends, top_paths, beam)
    total = gradients.sum(0)
    return Explanation(
        question=text or "",
        target=label,
        target_kind=kind,
        score=float(score.detach()),
        score_kind="logit" if kind == "entity" else ranker,
        question_entities={start: names.entities[start] for start in starts},
        target_entities={end: names.entities[end] for end in ends},
        paths=tuple(_named(path, hops, gradients, total, names) for path in found),
        note=_note(found, stopped, begin, starts, ends, kind, len(gradients), top_paths),
        edge_gradient=torch.from_numpy(total),
    )


def forward(
    model: GNNRetriever,
    graph: Any,
    embedding: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    entities_weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The model's forward pass for one question, with a weight of 1 on every edge of every layer.

    Args:
        model, graph, entities_weight: As in `explain`.
        embedding: [F] of the question.
        starts: Ids of its entities.
        ends: M ids of entities to score.

    Returns:
        Logits [M] with gradient for L edge weights [E], and those; and the weighted mask [N] of the starts.
    """
    view = view_of(graph)
    with torch.no_grad():
        query, mask = model.inputs(view, embedding.unsqueeze(0), [list(starts)], entities_weight)  # [1, D], [N, 1]
        tables = [_tracked(table) for table in model.relation_tables(graph)]
    # A copy whose weights want no gradient: theirs is not computed, and a training in another thread is not disturbed.
    entity_model = copy.deepcopy(model.entity_model).requires_grad_(False)
    layout = view.layout(model.device)
    if layout.order.is_inference():
        layout = GraphLayout.from_flat([_tracked(tensor) for tensor in layout.flat()])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    ones = torch.ones(layout.num_edges, dtype=wide, device=model.device)
    weights = [ones.clone().requires_grad_() for _ in tables]
    states = entity_model.states(layout, tables, mask, query, edge_weight=weights)
    rows = torch.as_tensor(list(ends), dtype=torch.long, device=model.device)
    parts = [states] if isinstance(states, Tensor) else states
    logits = entity_model.score([part[rows] for part in parts], query)[:, 0]  # [M, 1] -> [M]
    return logits, weights, mask[:, 0]


def edge_gradients(score: Tensor, weights: list[Tensor]) -> np.ndarray:
    """[L, E] float64 gradients of a score for the edges' weights in every layer."""
    if not score.requires_grad:  # a document without entities
        return np.zeros((len(weights), len(weights[0])))
    gradients = torch.autograd.grad(score, weights, allow_unused=True, materialize_grads=True)
    return torch.stack(gradients).double().cpu().numpy()


def document_score(logits: Tensor, idf: Tensor, ranker: str) -> Tensor:
    """A ranker's score of one document, from the logits [M] of its entities and 1 / their numbers of documents."""
    factor = idf.to(logits)
    if ranker == "score_weighted_idf":
        return (logits.sigmoid() * factor).sum()
    return (logits * factor).sum() if ranker == "idf" else logits.sum()


def _named(path: FoundPath, hops: Hops, gradients: np.ndarray, total: np.ndarray, names: GraphNames) -> Path:
    """The path with names; an edge of type r + R/2 over which a message goes from a to b is the triple (a, r, b)."""
    steps, here = [], path.source
    for hop, layer in zip(path.hops, path.layers, strict=True):
        there, kind, edges = int(hops.dst[hop]), int(hops.rel[hop]), hops.edges(hop)
        inverse = kind < names.half  # messages of the triples themselves go from tail to head
        head, tail = (there, here) if inverse else (here, there)
        relation = kind if inverse else kind - names.half
        steps.append(
            PathStep(
                head=names.entities[head],
                head_id=head,
                relation=names.relations[relation],
                relation_id=relation,
                tail=names.entities[tail],
                tail_id=tail,
                inverse=inverse,
                layer=layer,
                weight=float(gradients[layer - 1, edges].sum()),
                total=float(total[edges].sum()),
                edges=tuple(edges),
            )
        )
        here = there
    return Path(tuple(steps), path.weight)


def _note(
    found: list[FoundPath],
    stopped: str,
    begin: list[int],
    starts: list[int],
    ends: list[int],
    kind: str,
    layers: int,
    top: int,
) -> str:
    """What a reader must know besides the paths."""
    notes = []
    if not begin:
        notes.append("No path: entities_weight is 0 for all entities of the question, so nothing starts from them.")
    elif not ends:
        notes.append("No path: the document has no entities.")
    elif not found and not stopped:
        ways = f"no path of at most {layers} hops (the model's layers) leads from the question's entities to it"
        notes.append(f"No path: {ways}. The score is what the model gives without them.")
    if stopped == "beam":
        notes.append(f"{len(found)} of {top} paths: the beam cut off others; a wider one finds more.")
    elif stopped:
        notes.append(f"The search stopped after {MAX_EXTENSIONS:,} partial paths, with {len(found)} of {top} paths.")
    if set(starts) & set(ends):
        what = "The target is" if kind == "entity" else "Some entities of the document are"
        notes.append(f"{what} in the question itself, which counts without any path.")
    return " ".join(notes)


def _listed(entities: Any) -> list[Any]:
    if isinstance(entities, (str, int)):
        return [entities]
    return entities.tolist() if hasattr(entities, "tolist") else list(entities)


def _tracked(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode, which autograd does not take."""
    return tensor.clone() if tensor.is_inference() else tensor
