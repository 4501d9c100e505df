"""FedRAG's retriever on ragkit's `DenseRetriever`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.compat.fedrag_store import NodeStore
from ragkit.rag.encoder import Encoder
from ragkit.rag.loading import resolve_encoder
from ragkit.rag.retriever import DenseRetriever
from ragkit.rag.store import KnowledgeStore


@dataclass
class LoadKwargs:
    """Arguments of `SentenceTransformer` for each encoder."""

    encoder: dict[str, Any] = field(default_factory=dict)
    query_encoder: dict[str, Any] = field(default_factory=dict)
    context_encoder: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Encoders:
    """The encoders of a retriever, which all systems that use it share.

    Attributes:
        query: Of questions.
        passage: Of passages; the same object while there is one encoder for both.
        moved: How often the passage side was changed by training.
    """

    query: Encoder
    passage: Encoder
    moved: int = 0


class JoinedRetriever(DenseRetriever):
    """A `DenseRetriever` whose encoders and store are those of FedRAG's objects.

    FedRAG's retriever has no store and may be part of several systems, and so may its store: what trains a retriever
    in one of them trains it in all, and makes each store stale where the passages' encoder moves.
    """

    def __init__(self, encoders: Encoders, nodes: NodeStore) -> None:
        self._encoders, self._nodes = encoders, nodes
        passage = None if encoders.query is encoders.passage else encoders.passage
        encoded_at = nodes.encoded_at.get(encoders, encoders.moved)
        super().__init__(encoders.query, passage, nodes.store, device=None)
        nodes.encoded_at[encoders] = encoded_at  # a store that is stale for these encoders already stays it

    @property
    def store(self) -> KnowledgeStore:  # type: ignore[override]
        """Where the passages are."""
        return self._nodes.store

    @store.setter
    def store(self, store: KnowledgeStore) -> None:
        self._nodes.store = store

    @property
    def query_encoder(self) -> Encoder:  # type: ignore[override]
        """Encodes questions."""
        return self._encoders.query

    @query_encoder.setter
    def query_encoder(self, encoder: Encoder) -> None:
        self._encoders.query = encoder

    @property
    def passage_encoder(self) -> Encoder:  # type: ignore[override]
        """Encodes passages."""
        return self._encoders.passage

    @passage_encoder.setter
    def passage_encoder(self, encoder: Encoder) -> None:
        self._encoders.passage = encoder

    @property
    def stale(self) -> bool:  # type: ignore[override]
        """Whether the passages' encoder has moved since the store was filled."""
        return self._nodes.encoded_at.get(self._encoders, self._encoders.moved) != self._encoders.moved

    @stale.setter
    def stale(self, stale: bool) -> None:
        self._nodes.encoded_at.setdefault(self._encoders, self._encoders.moved)
        if stale:
            self._encoders.moved += 1
        else:
            self._nodes.encoded_at[self._encoders] = self._encoders.moved

    def separate_query_encoder(self) -> bool:
        """As in `DenseRetriever`, but the passages get the copy: `retriever.encoder` is then the one that is trained,
        for those who look at its weights before and after."""
        if not self.shared:
            return False
        self.passage_encoder = copy.deepcopy(self.query_encoder)
        return True


class HFSentenceTransformerRetriever:
    """A sentence-transformers encoder, or one for queries and one for contexts.

    Args:
        model_name: One model for both: a name on the hub, a folder, "default", or a live `SentenceTransformer`.
        query_model_name: For two encoders: that of the queries.
        context_model_name: For two encoders: that of the contexts.
        load_model_kwargs: Arguments of `SentenceTransformer`: a dict for all, or a `LoadKwargs`.
        load_model_at_init: False: the models are loaded when they are first needed.

    Raises:
        ValueError: Neither one name nor two.
    """

    def __init__(
        self,
        model_name: Any = None,
        query_model_name: Any = None,
        context_model_name: Any = None,
        load_model_kwargs: LoadKwargs | dict[str, Any] | None = None,
        load_model_at_init: bool = True,
        **unknown: Any,
    ) -> None:
        known = ["model_name", "query_model_name", "context_model_name", "load_model_kwargs", "load_model_at_init"]
        refuse_unknown("HFSentenceTransformerRetriever", unknown, known)
        given = [name is not None for name in (model_name, query_model_name, context_model_name)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError(
                "give model_name for one encoder, or query_model_name and context_model_name for two; found "
                f"model_name={model_name!r}, query_model_name={query_model_name!r}, "
                f"context_model_name={context_model_name!r}"
            )
        self.model_name, self.query_model_name, self.context_model_name = (
            model_name,
            query_model_name,
            context_model_name,
        )
        if isinstance(load_model_kwargs, Mapping):
            load_model_kwargs = LoadKwargs(*(dict(load_model_kwargs) for _ in range(3)))
        self.load_model_kwargs = load_model_kwargs or LoadKwargs()
        self._encoders: Encoders | None = None
        if load_model_at_init:
            self.encoders  # noqa: B018 - loads them

    def __repr__(self) -> str:
        names = self.model_name or f"{self.query_model_name}, {self.context_model_name}"
        return f"HFSentenceTransformerRetriever({names})"

    @property
    def encoders(self) -> Encoders:
        """ragkit's encoders; loads the models if they are not."""
        if self._encoders is None:
            loads = self.load_model_kwargs
            if self.model_name is not None:
                one = _load(self.model_name, loads.encoder)
                self._encoders = Encoders(one, one)
            else:
                query = _load(self.query_model_name, loads.query_encoder)
                self._encoders = Encoders(query, _load(self.context_model_name, loads.context_encoder))
        return self._encoders

    def join(self, nodes: NodeStore) -> JoinedRetriever:
        """The ragkit retriever that searches a store with these encoders."""
        return JoinedRetriever(self.encoders, nodes)

    @property
    def encoder(self) -> Any:
        """The `SentenceTransformer` of `model_name`, which LSR trains; None where there were two from the start."""
        return self.encoders.query.model if self.model_name is not None else None

    @property
    def query_encoder(self) -> Any:
        """The `SentenceTransformer` of the queries; None while one encodes both."""
        return None if self.encoders.query is self.encoders.passage else self.encoders.query.model

    @property
    def context_encoder(self) -> Any:
        """The `SentenceTransformer` of the contexts; None while one encodes both."""
        return None if self.encoders.query is self.encoders.passage else self.encoders.passage.model

    def encode_query(self, query: Any, **unknown: Any) -> Tensor:
        """The embedding of a query, float32 [D], or of a list of N queries, [N, D]; of length 1."""
        refuse_unknown("encode_query", unknown, ["query"])
        return _one_or_many(query, lambda texts: self.encoders.query.encode(texts, "query"))

    def encode_context(self, context: Any, **unknown: Any) -> Tensor:
        """The embedding of a context, float32 [D], or of a list of N contexts, [N, D]; of length 1."""
        refuse_unknown("encode_context", unknown, ["context"])
        return _one_or_many(context, lambda texts: self.encoders.passage.encode(texts, "passage"))


def _load(name: Any, arguments: dict[str, Any]) -> Encoder:
    if not arguments or not isinstance(name, str):
        return Encoder(name)
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    try:
        return Encoder(SentenceTransformer(resolve_encoder(name), **arguments))
    except (OSError, ValueError) as error:
        raise ValueError(f"no text encoder could be loaded from {name!r} with {arguments}: {error}") from error


def _one_or_many(given: Any, encode: Any) -> Tensor:
    many = isinstance(given, Sequence) and not isinstance(given, str)
    embeddings: Tensor = encode([str(text) for text in (given if many else [given])])
    return embeddings if many else embeddings[0]
