"""Entities by the nearness of their names: the embedding half of entity linking."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ragkit.gfm.text_encoder import TextEncoder
from ragkit.gfm.text_index import TextIndex
from ragkit.graph import KnowledgeGraph


class EntitySearch(TextIndex):
    """Finds the entities of a graph whose names are nearest to given texts, by cosine.

    Args:
        graph: Its entities are searched.
        encoder, cache: As in `TextIndex`; the cache's key is the names and the encoder.
        embeddings: [N, F] of length 1, where they are known already.

    Example:
        >>> linker = EntityLinker(graph, EntitySearch(graph, encoder))  # doctest: +SKIP
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        encoder: TextEncoder,
        cache: bool | str | Path = True,
        embeddings: Tensor | None = None,
    ) -> None:
        names = graph.entities
        state = hashlib.blake2b(digest_size=16)
        names.update_hash(state)  # not the graph's fingerprint: triples do not matter here
        super().__init__(len(names), lambda i, j: names[i:j], "entities", state.digest(), encoder, cache, embeddings)
        self.graph = graph
