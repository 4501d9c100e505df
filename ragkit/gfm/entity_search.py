"""Entities by the nearness of their names: the embedding half of entity linking."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ragkit.gfm.tensor_cache import cached, key_of
from ragkit.gfm.text_encoder import TextEncoder, encode, encoder_identity
from ragkit.graph import KnowledgeGraph
from ragkit.rag.topk import top_k_rows

CHUNK = 16_384  # names that are encoded at once
TELL = 5_000  # names from which on encoding takes so long that a line is printed


class EntitySearch:
    """Finds the entities of a graph whose names are nearest to given texts, by cosine.

    The names are encoded once (side "passage"), when the first text is searched for; texts as side "query". A product
    of texts and names is never whole in memory (`top_k_rows`).

    Args:
        graph: Its entities are searched.
        encoder: Encodes names and texts.
        cache: True: the names' embeddings are kept in the user's cache folder; a folder; False: not kept. The key is
            the names and the encoder.
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
        if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != graph.num_entities):
            raise ValueError(
                f"embeddings: expected [{graph.num_entities}, F] (a row for each entity), "
                f"found {list(embeddings.shape)}"
            )
        self.graph, self.encoder, self.cache = graph, encoder, cache
        self._embeddings = embeddings

    @property
    def ready(self) -> bool:
        """Whether the names are encoded."""
        return self._embeddings is not None

    @property
    def embeddings(self) -> Tensor:
        """[N, F] float32 on the CPU, of length 1."""
        if self._embeddings is None:
            identity = "" if self.cache is False else encoder_identity(self.encoder)
            names = hashlib.blake2b(digest_size=16)
            self.graph.entities.update_hash(names)  # not the graph's fingerprint: triples do not matter here
            key = key_of("entities", names.digest(), identity)
            tensors, _ = cached(self.cache, "entities", key, lambda: ({"embeddings": self._encode()}, {}))
            self._embeddings = tensors["embeddings"]
        return self._embeddings

    def __call__(self, texts: Sequence[str], k: int) -> tuple[Tensor, Tensor]:
        """The k entities nearest to each text.

        Args:
            texts: B texts.
            k: Entities for each; at most N are given.

        Returns:
            (cosines [B, k], ids [B, k]), best first; equal ones in the order of ids.
        """
        queries = F.normalize(encode(self.encoder, texts, "query"), dim=1)
        return top_k_rows(queries, self.embeddings, k)

    def forget(self) -> None:
        """Lets go of the embeddings; the next search encodes the names again (after the encoder was trained)."""
        self._embeddings = None

    def _encode(self) -> Tensor:
        names = self.graph.entities
        if len(names) > TELL:
            kept = "" if self.cache is False else ", once; they are kept in the cache"
            print(f"encoding the names of {len(names):,} entities{kept}")
        rows: Tensor | None = None
        for start in range(0, len(names), CHUNK):
            part = F.normalize(encode(self.encoder, names[start : start + CHUNK], "passage"), dim=1)
            if rows is None:
                rows = part.new_empty(len(names), part.shape[1])
            rows[start : start + len(part)] = part
        return torch.zeros(0, 0) if rows is None else rows
