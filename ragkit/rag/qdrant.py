"""A knowledge store in Qdrant: embedded in a folder by default, or a server."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ragkit.optional import require
from ragkit.rag.corpus import Passage, RetrievedPassage
from ragkit.rag.store import StoreError, check_embeddings, check_new_ids, check_queries, read_store, write_store

DEFAULT_PATH = "qdrant_store"
BATCH = 512
# Qdrant gives equal scores in any order; so many more than asked for are fetched to put them in the order of adding.
TIE_MARGIN = 16


class QdrantStore:
    """Passages in a Qdrant collection; the same contract as `MemoryStore`.

    Qdrant's point ids must be numbers or UUIDs, so a passage's own id, any string, is kept in the payload and its
    point id is made from it. What is added is on disk at once: opening the same folder or server again finds it.
    More than 16 passages of one score at the end of the result list may come in another order than they were added.

    Args:
        path: Folder of the embedded database (made if missing), `":memory:"` for none. Without path and url:
            `qdrant_store` in the current folder. One process at a time can use a folder.
        url: Address of a server, for example `"http://localhost:6333"`, instead of a path.
        collection: Name of the collection; made with the first passages.
        api_key: For a server that wants one; never written to disk.
        dim: D, if it is to be checked from the first passage on.

    Raises:
        ImportError: qdrant-client is not installed.
        StoreError: The folder is in use, or the server or collection cannot be used.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        url: str | None = None,
        collection: str = "ragkit",
        api_key: str | None = None,
        dim: int | None = None,
    ):
        if path is not None and url is not None:
            raise StoreError("give a path or a url, not both")
        self._api: Any = require("qdrant_client", extra="qdrant")
        self.collection, self._declared_dim = collection, dim
        self.where = url or str(path or DEFAULT_PATH)
        try:
            if url is not None:
                self._client: Any = self._api.QdrantClient(url=url, api_key=api_key)
            elif self.where == ":memory:":
                self._client = self._api.QdrantClient(location=":memory:")
            else:
                self._client = self._api.QdrantClient(path=self.where)
            self._dim = self._read_dim()
        except StoreError:
            raise
        except Exception as error:  # the client raises RuntimeError, ValueError, its own and its transport's types
            raise StoreError(f"Qdrant at {self.where} cannot be opened: {error}") from error
        # Numbers passages in the order of adding, over restarts too, without asking for the highest one.
        self._counter = itertools.count(time.time_ns())

    def _read_dim(self) -> int | None:
        if not self._client.collection_exists(self.collection):
            return None
        vectors = self._client.get_collection(self.collection).config.params.vectors
        if not hasattr(vectors, "size") or vectors.distance != self._api.models.Distance.COSINE:
            raise StoreError(
                f"the collection {self.collection!r} at {self.where} was not made by ragkit: expected one vector of "
                f"cosine distance, found {vectors!r}; choose another collection name"
            )
        return int(vectors.size)

    @property
    def dim(self) -> int | None:
        """D, the size of an embedding; None while the store is empty and was not told."""
        return self._dim if self._dim is not None else self._declared_dim

    def __len__(self) -> int:
        return 0 if self._dim is None else int(self._client.count(self.collection, exact=True).count)

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and bool(self._records([passage_id]))

    def __repr__(self) -> str:
        return f"QdrantStore({self.where!r}, collection={self.collection!r})"

    def close(self) -> None:
        """Lets go of the folder or the connection; the store cannot be used after."""
        self._client.close()

    def clear(self) -> None:
        """Removes everything; the store is then as new."""
        if self._dim is not None:
            self._client.delete_collection(self.collection)
            self._dim = None

    def add(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Appends passages. Raises StoreError as `MemoryStore.add`, and then adds nothing."""
        rows = check_embeddings(passages, embeddings, self.dim)
        check_new_ids(passages, self._records([passage.id for passage in passages]))
        if not passages:
            return
        if self._dim is None:
            models = self._api.models
            parameters = models.VectorParams(size=rows.shape[1], distance=models.Distance.COSINE)
            self._client.create_collection(self.collection, vectors_config=parameters)
            self._dim = rows.shape[1]
        self._upsert(passages, rows, [next(self._counter) for _ in passages])

    def update(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Replaces passages that are there, each in its place. Raises StoreError for an id that is not there."""
        rows = check_embeddings(passages, embeddings, self.dim)
        numbers = [record.payload["n"] for record in self._found([passage.id for passage in passages])]
        self._upsert(passages, rows, numbers)

    def delete(self, ids: Sequence[str]) -> int:
        """Removes the passages of these ids and returns how many there were; unknown ids count as none."""
        points = [record.id for record in self._records(ids).values()]
        if points:
            selector = self._api.models.PointIdsList(points=points)
            self._client.delete(self.collection, points_selector=selector, wait=True)
        return len(points)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages of these ids, in this order. Raises StoreError for an unknown id."""
        return [_passage(record.payload) for record in self._found(ids)]

    def embeddings(self, ids: Sequence[str]) -> Tensor:
        """The normalised embeddings of these ids, float32 [N, D]. Raises StoreError for an unknown id."""
        vectors = [record.vector for record in self._found(ids, vectors=True)]
        return torch.tensor(vectors, dtype=torch.float32).reshape(len(vectors), self.dim or 0)

    def passages(self) -> Iterator[Passage]:
        """All passages in the order in which they were added."""
        return iter([_passage(record.payload) for record in self._all()])

    def search(self, queries: Tensor, top_k: int) -> list[list[RetrievedPassage]]:
        """For each query of [B, D] the `top_k` passages of highest cosine, best first; all where there are fewer."""
        rows = check_queries(queries, top_k, self.dim)
        if not len(self):
            return [[] for _ in rows]
        models, found = self._api.models, []
        for part in rows.cpu().split(BATCH):
            requests = [
                models.QueryRequest(query=query, limit=top_k + TIE_MARGIN, with_payload=True)
                for query in part.tolist()
            ]
            for response in self._client.query_batch_points(self.collection, requests=requests):
                points = sorted(response.points, key=lambda point: (-point.score, point.payload["n"]))
                found.append([RetrievedPassage.of(_passage(p.payload), float(p.score)) for p in points[:top_k]])
        return found

    def save(self, directory: str | Path) -> Path:
        """Writes everything as a folder that any store can load; the collection stays as it is."""
        records = self._all(vectors=True)
        matrix = torch.tensor([record.vector for record in records], dtype=torch.float32)
        return write_store(
            directory,
            [_passage(record.payload) for record in records],
            matrix.reshape(len(records), (self.dim or 0) if records else 0),
        )

    @classmethod
    def load(cls, directory: str | Path, **arguments: Any) -> QdrantStore:
        """Fills a collection from a folder that a store wrote.

        Args:
            directory: The folder.
            **arguments: Of the constructor; the collection must be empty or missing.

        Raises:
            StoreError: A file of the folder is missing or corrupt, or the collection holds passages.
        """
        passages, matrix = read_store(directory)
        store = cls(**arguments)
        if len(store):
            store.close()
            raise StoreError(f"{store!r} holds passages already; clear() it first or choose another collection")
        if passages:
            store.add(passages, matrix)
        return store

    def _upsert(self, passages: Sequence[Passage], rows: Tensor, numbers: Sequence[int]) -> None:
        models = self._api.models
        for start in range(0, len(passages), BATCH):
            points = [
                models.PointStruct(
                    id=_point_id(passage.id),
                    vector=vector,
                    payload={
                        "id": passage.id,
                        "title": passage.title,
                        "text": passage.text,
                        "metadata": passage.metadata,
                        "n": number,
                    },
                )
                for passage, vector, number in zip(
                    passages[start : start + BATCH],
                    rows[start : start + BATCH].tolist(),
                    numbers[start : start + BATCH],
                    strict=True,
                )
            ]
            self._client.upsert(self.collection, points=points, wait=True)

    def _records(self, ids: Sequence[str], vectors: bool = False) -> dict[str, Any]:
        """The records there are of these ids, by passage id."""
        found: dict[str, Any] = {}
        for start in range(0, len(ids) if self._dim is not None else 0, BATCH):
            points = [_point_id(passage_id) for passage_id in ids[start : start + BATCH]]
            records = self._client.retrieve(self.collection, points, with_payload=True, with_vectors=vectors)
            found.update((record.payload["id"], record) for record in records)
        return found

    def _found(self, ids: Sequence[str], vectors: bool = False) -> list[Any]:
        records = self._records(ids, vectors)
        missing = next((passage_id for passage_id in ids if passage_id not in records), None)
        if missing is not None:
            raise StoreError(f"no passage has the id {missing!r} (the store holds {len(self)})")
        return [records[passage_id] for passage_id in ids]

    def _all(self, vectors: bool = False) -> list[Any]:
        records: list[Any] = []
        offset: Any = None
        while self._dim is not None:
            part, offset = self._client.scroll(
                self.collection, limit=BATCH, offset=offset, with_payload=True, with_vectors=vectors
            )
            records += part
            if offset is None:
                break
        return sorted(records, key=lambda record: record.payload["n"])


def _point_id(passage_id: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "ragkit:" + passage_id))


def _passage(payload: dict[str, Any]) -> Passage:
    return Passage(payload["id"], payload["text"], payload["title"], payload["metadata"] or {})
