"""The texts of a graph (names, facts) by nearness of meaning: encoded once, kept in the cache, searched by cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ragkit.gfm.tensor_cache import cached, key_of
from ragkit.gfm.text_encoder import TextEncoder, encode, encoder_identity
from ragkit.notes import note
from ragkit.rag.topk import top_k_rows

CHUNK = 16_384  # texts that are encoded at once
TELL = 5_000  # texts from which on encoding takes so long that a line is printed


class TextIndex:
    """Finds the nearest of M fixed texts.

    The texts are encoded once (side "passage"), when the first question is searched for; questions as side "query". A
    product of questions and texts is never whole in memory (`top_k_rows`).

    Args:
        count: M.
        texts: (start, end) -> the texts of these places.
        kind: What they are ("entities"), for the cache's folder and for messages.
        content: Tells these texts from others, for the cache's key.
        encoder: Encodes texts and questions.
        cache: True: the embeddings are kept in the user's cache folder; a folder; False: not kept.
        embeddings: [M, F] of length 1, where they are known already.
    """

    def __init__(
        self,
        count: int,
        texts: Callable[[int, int], Sequence[str]],
        kind: str,
        content: bytes,
        encoder: TextEncoder,
        cache: bool | str | Path = True,
        embeddings: Tensor | None = None,
    ) -> None:
        if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != count):
            raise ValueError(
                f"embeddings: expected [{count}, F] (a row for each of the {kind}), found {list(embeddings.shape)}"
            )
        self.encoder, self.cache = encoder, cache
        self._count, self._texts, self._kind, self._content = count, texts, kind, content
        self._embeddings = embeddings

    @property
    def ready(self) -> bool:
        """Whether the texts are encoded."""
        return self._embeddings is not None

    @property
    def embeddings(self) -> Tensor:
        """[M, F] float32 on the CPU, of length 1."""
        if self._embeddings is None:
            identity = "" if self.cache is False else encoder_identity(self.encoder)
            key = key_of(self._kind, self._content, identity)
            tensors, _ = cached(self.cache, self._kind, key, lambda: ({"embeddings": self._encode()}, {}))
            self._embeddings = tensors["embeddings"]
        return self._embeddings

    def __call__(self, texts: Sequence[str], k: int) -> tuple[Tensor, Tensor]:
        """The k nearest to each of B texts.

        Args:
            texts: B texts.
            k: How many for each; at most M are given.

        Returns:
            (cosines [B, k], places [B, k]), best first; equal ones in the order of places.
        """
        queries = F.normalize(encode(self.encoder, texts, "query"), dim=1)
        return top_k_rows(queries, self.embeddings, k)

    def forget(self) -> None:
        """Lets go of the embeddings; the next search encodes the texts again (after the encoder was trained)."""
        self._embeddings = None

    def _encode(self) -> Tensor:
        if self._count > TELL:
            kept = "" if self.cache is False else ", once; they are kept in the cache"
            note(f"encoding {self._count:,} {self._kind}{kept}")
        rows: Tensor | None = None
        for start in range(0, self._count, CHUNK):
            texts = self._texts(start, min(start + CHUNK, self._count))
            part = F.normalize(encode(self.encoder, texts, "passage"), dim=1)
            if rows is None:
                rows = part.new_empty(self._count, part.shape[1])
            rows[start : start + len(part)] = part
        return torch.zeros(0, 0) if rows is None else rows
