"""Passages beside a graph's documents: what a document's score leads to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ragkit.graph import KnowledgeGraph
from ragkit.notes import note
from ragkit.rag.corpus import Passage, load_corpus


class GraphPassages:
    """The passages of a graph's documents, matched by id; for trainers it is a knowledge store without embeddings.

    A document without a passage is never retrieved, nor is a passage that the graph has no document for. Both are
    counted, and a line is printed.

    Args:
        graph: Its `documents` are ids of passages.
        source: Anything that `load_corpus` reads; None: the graph's own `texts`.

    Attributes:
        own: Whether they are the graph's own texts.
        documents: [U] int64 ids of the documents that have a passage, ascending.
        without_passage: Number of documents that have none.
        unknown: Number of passages that no document of the graph has.

    Raises:
        ValueError: No passage (`CorpusError` is such), or none that is a document of the graph.
    """

    def __init__(self, graph: KnowledgeGraph, source: Any = None) -> None:
        self.own = source is None
        self._passages = _own_texts(graph) if source is None else load_corpus(source)
        self._place = {passage.id: place for place, passage in enumerate(self._passages)}
        found = torch.from_numpy(graph.documents.ids([passage.id for passage in self._passages])).long()  # [P]
        self.unknown = int((found < 0).sum())
        self._document = {p.id: d for p, d in zip(self._passages, found.tolist(), strict=True) if d >= 0}
        if not self._document:
            raise ValueError(
                f"none of the {len(self)} passages is a document of the graph: the passages have ids like "
                f"{self._passages[0].id!r}, the documents {list(graph.documents[:1]) or 'none'}"
            )
        place_of = torch.full((graph.num_documents,), -1)
        known = found >= 0
        place_of[found[known]] = known.nonzero()[:, 0]
        self.documents = (place_of >= 0).nonzero()[:, 0]
        self._places = place_of[self.documents].tolist()
        self.without_passage = graph.num_documents - len(self.documents)
        if not self.ok:
            note(str(self))

    @property
    def ok(self) -> bool:
        """Whether every document has a passage and every passage a document."""
        return not (self.without_passage or self.unknown)

    def __str__(self) -> str:
        text = f"{len(self.documents):,} passages can be retrieved"
        if self.without_passage:
            text += f"; {self.without_passage:,} documents of the graph have no passage"
        if self.unknown:
            text += f"; {self.unknown:,} passages are not in the graph"
        return text

    def of_column(self, column: int) -> Passage:
        """The passage of document `documents[column]`."""
        return self._passages[self._places[column]]

    def document_of(self, passage_id: str) -> int:
        """Id of a passage's document, -1 where the graph has none.

        Raises:
            ValueError: No passage has this id.
        """
        if passage_id not in self._place:
            raise ValueError(f"no passage has the id {passage_id!r} (there are {len(self)})")
        return self._document.get(passage_id, -1)

    # ---- as a knowledge store ----

    def __len__(self) -> int:
        return len(self._passages)

    def __contains__(self, passage_id: object) -> bool:
        return passage_id in self._place

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages of these ids, in this order. Raises ValueError for an unknown id."""
        for passage_id in ids:
            self.document_of(passage_id)
        return [self._passages[self._place[passage_id]] for passage_id in ids]

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order of their source."""
        return iter(self._passages)

    def columns(self, scores: Tensor) -> Tensor:
        """Of scores [B, docs] those of the documents that have a passage: [B, U]."""
        return scores if not self.without_passage else scores[:, self.documents.to(scores.device)]


def _own_texts(graph: KnowledgeGraph) -> list[Passage]:
    texts = [] if graph.texts is None else graph.texts.to_pylist()
    passages = [
        Passage(name, text, re.sub(r" \[\d+\]$", "", name))  # the title is the key without its " [2]"
        for name, text in zip(graph.documents, texts, strict=False)
        if text is not None and text.strip()
    ]
    if not passages:
        raise ValueError("the graph has no texts of its documents; give passages= (anything that load_corpus reads)")
    return passages
