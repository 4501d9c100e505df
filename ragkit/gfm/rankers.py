"""From entity logits to document scores, over the sparse incidence of entities and documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ragkit.graph import KnowledgeGraph

CHUNK_NUMBERS = 1 << 24  # numbers of entries × questions that exist at once


@dataclass(frozen=True, eq=False)
class Incidence:
    """Which entities each document tells of.

    Attributes:
        ptr: [docs + 1] int64; document i has `entities[ptr[i] : ptr[i + 1]]`.
        entities: [entries] int64, each once in a document.
        num_entities: N.
    """

    ptr: Tensor
    entities: Tensor
    num_entities: int

    @classmethod
    def of(cls, given: Any) -> Incidence:
        """From a `KnowledgeGraph`, a sparse or dense [N, docs] tensor (not 0 means "tells of"), or another one."""
        if isinstance(given, Incidence):
            return given
        if isinstance(given, KnowledgeGraph):
            ptr, entities = torch.from_numpy(given.document_ptr), torch.from_numpy(given.document_entities)
            return cls(ptr, entities.long(), given.num_entities)
        if isinstance(given, Tensor) and given.ndim == 2:
            sparse = given.to_sparse_coo().coalesce()
            entity, document = sparse.indices()[:, sparse.values() != 0]
            document, order = document.sort(stable=True)
            count = torch.bincount(document, minlength=given.shape[1])
            return cls(torch.cat([count.new_zeros(1), count.cumsum(0)]), entity[order], given.shape[0])
        raise ValueError(f"expected a KnowledgeGraph or a [N, docs] tensor, found {type(given).__name__}")

    @cached_property
    def frequency(self) -> Tensor:
        """[N] int64, number of documents that tell of each entity."""
        return torch.bincount(self.entities, minlength=self.num_entities)

    @property
    def idf(self) -> Tensor:
        """[N] float64, 1 / frequency; 0 for an entity of no document."""
        return torch.where(self.frequency > 0, 1 / self.frequency.double(), 0.0)

    def to(self, device: torch.device | str) -> Incidence:
        """The same on another device."""
        return Incidence(self.ptr.to(device), self.entities.to(device), self.num_entities)

    def sum(self, weights: Tensor) -> Tensor:
        """Sums over each document's entities, in one order, so the same weights give the same bits.

        Args:
            weights: [B, N].

        Returns:
            [B, docs].
        """
        rows = max(1, CHUNK_NUMBERS // max(1, len(self.entities)))
        parts = [self._sum(weights[i : i + rows]) for i in range(0, max(1, len(weights)), rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sum(self, weights: Tensor) -> Tensor:
        picked = weights.t()[self.entities]  # [B, N] -> [entries, B]
        if len(self.ptr) == 1 or not picked.numel():  # segment_reduce takes no empty tensors
            return weights.new_zeros(len(weights), len(self.ptr) - 1) + picked.sum()
        return torch.segment_reduce(picked, "sum", offsets=self.ptr, axis=0).t()  # [docs, B] -> [B, docs]


def entity_weights(given: Any) -> Tensor:
    """Weights of the question's entities: 1 / number of documents, 0 for an entity of none.

    Args:
        given: As in `Incidence.of`.

    Returns:
        [N] float32.
    """
    return Incidence.of(given).idf.float()


def simple(logits: Tensor, documents: Any) -> Tensor:
    """A document's score is the sum of its entities' logits.

    Args:
        logits: [B, N] of a `GNNRetriever`.
        documents: `KnowledgeGraph`, [N, docs] tensor or `Incidence`.

    Returns:
        [B, docs] scores, float32 (float64 for float64); 0 for a document without entities. This holds for all rankers.
    """
    z, incidence = _inputs(logits, documents)
    return incidence.sum(z)


def idf(logits: Tensor, documents: Any) -> Tensor:
    """Σ logit / number of documents of the entity. Arguments and result as in `simple`."""
    z, incidence = _inputs(logits, documents)
    return incidence.sum(z * incidence.idf.to(z))


def topk(logits: Tensor, documents: Any, k: int = 10) -> Tensor:
    """The number of a document's entities that are among the query's k best.

    Args:
        logits, documents: As in `simple`.
        k: Entities to look at; of equal logits the lower ids are taken.
    """
    z, incidence = _inputs(logits, documents)
    return incidence.sum(best(z, k).to(z))


def idf_topk(logits: Tensor, documents: Any, k: int = 20) -> Tensor:
    """Σ 1 / number of documents, over a document's entities among the query's k best: GFM-RAG's default.

    The logits' sizes do not matter beyond that choice. Arguments and result as in `topk`.
    """
    z, incidence = _inputs(logits, documents)
    return incidence.sum(best(z, k).to(z) * incidence.idf.to(z))


def score_weighted_idf(logits: Tensor, documents: Any, k: int | None = None) -> Tensor:
    """Σ σ(logit) / number of documents, over all of a document's entities or those among the query's k best.

    Unlike `idf_topk` it lets a surer entity count for more, so that documents seldom tie.

    Args:
        logits, documents: As in `simple`.
        k: Entities to look at; None: all.
    """
    z, incidence = _inputs(logits, documents)
    p = z.sigmoid() * incidence.idf.to(z)
    return incidence.sum(p if k is None else p * best(z, k).to(z))


RANKERS: dict[str, Callable[..., Tensor]] = {
    "simple": simple,
    "idf": idf,
    "topk": topk,
    "idf_topk": idf_topk,
    "score_weighted_idf": score_weighted_idf,
}
"""The rankers by the names that settings use; `topk`, `idf_topk` and `score_weighted_idf` take `k`."""


def best(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row (all, if there are fewer); of equal ones those with the lower ids.

    Args:
        scores: [B, N].
        k: At least 1.

    Returns:
        [B, N] bool.

    Raises:
        ValueError: k < 1, or NaN scores, which have no order.
    """
    if k < 1:
        raise ValueError(f"k: expected a whole number from 1, found {k}")
    if scores.isnan().any():
        raise ValueError(f"logits: row {int(scores.isnan().any(1).nonzero()[0])} holds NaN, which cannot be ranked")
    if k >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(k, dim=1).values[:, -1:]  # [B, 1]; topk itself breaks ties at random
    above, equal = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def rank(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best documents of each row, best first; of equal ones the lower ids first.

    Args:
        scores: [B, docs].
        k: Documents to return; fewer if there are fewer.

    Returns:
        (scores [B, k], ids [B, k]).
    """
    kept = best(scores, k).nonzero()[:, 1].view(len(scores), min(k, scores.shape[1]))  # [B, k] ascending ids
    order = scores.gather(1, kept).sort(dim=1, descending=True, stable=True)
    return order.values, kept.gather(1, order.indices)


def _inputs(logits: Tensor, documents: Any) -> tuple[Tensor, Incidence]:
    incidence = Incidence.of(documents).to(logits.device)
    if logits.ndim != 2 or logits.shape[1] != incidence.num_entities:
        raise ValueError(f"logits: expected [B, {incidence.num_entities}], found {list(logits.shape)}")
    return (logits if logits.dtype == torch.float64 else logits.float()), incidence
