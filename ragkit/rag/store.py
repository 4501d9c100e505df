"""The knowledge store: passages and their embeddings, searched by cosine similarity.

`KnowledgeStore` is the contract; `MemoryStore` keeps everything in one matrix, `ragkit.rag.qdrant.QdrantStore`
keeps it in Qdrant. Both keep the order in which passages were added, and give equal scores back in that order.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragkit.files import atomic_dir
from ragkit.rag.corpus import Passage, RetrievedPassage
from ragkit.rag.topk import top_k_rows

FORMAT = 1


class StoreError(ValueError):
    """A store that cannot do what was asked; the message names the file or the id."""


@runtime_checkable
class KnowledgeStore(Protocol):
    """What a retriever needs of a store. Embeddings go in as [N, D] and are normalised by the store."""

    @property
    def dim(self) -> int | None:
        """D, the size of an embedding; None while the store is empty and was not told."""

    def __len__(self) -> int: ...

    def __contains__(self, passage_id: object) -> bool: ...

    def add(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Appends passages; an id that is there already is an error and nothing is added."""

    def update(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Replaces passages that are there, each in its place."""

    def delete(self, ids: Sequence[str]) -> int:
        """Removes the passages of these ids and returns how many there were; unknown ids count as none."""

    def clear(self) -> None:
        """Removes everything; the store is then as new."""

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages of these ids, in this order."""

    def embeddings(self, ids: Sequence[str]) -> Tensor:
        """The normalised embeddings of these ids, float32 [N, D], in this order."""

    def passages(self) -> Iterator[Passage]:
        """All passages in the order in which they were added."""

    def search(self, queries: Tensor, top_k: int) -> list[list[RetrievedPassage]]:
        """For each query of [B, D] the `top_k` passages of highest cosine, best first; all where there are fewer."""

    def save(self, directory: str | Path) -> Path:
        """Writes the whole store as a folder that any store can load."""


class MemoryStore:
    """A store in memory: one normalised float32 matrix that doubles when it is full, so appending costs O(1).

    Args:
        dim: D, if it is to be checked from the first passage on.
        device: Where the matrix lies and the search runs, for example `"cuda"`.

    Example:
        >>> store = MemoryStore()
        >>> store.add([Passage("a", "Lima is the capital of Peru.")], torch.tensor([[3.0, 4.0]]))
        >>> store.search(torch.tensor([[1.0, 0.0]]), top_k=1)[0][0].score  # cosine
        0.6000000238418579
    """

    def __init__(self, dim: int | None = None, device: str | torch.device = "cpu"):
        self._declared_dim = dim
        self.device = torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Removes everything; the store is then as new."""
        self._matrix = torch.empty(0, self._declared_dim or 0, device=self.device)  # [capacity, D]
        self._passages: list[Passage] = []
        self._row: dict[str, int] = {}

    @property
    def dim(self) -> int | None:
        """D, the size of an embedding; None while the store is empty and was not told."""
        return self._matrix.shape[1] if self._passages else self._declared_dim

    def __len__(self) -> int:
        return len(self._passages)

    def __contains__(self, passage_id: object) -> bool:
        return passage_id in self._row

    def __repr__(self) -> str:
        return f"MemoryStore({len(self)} passages, dim={self.dim}, device={str(self.device)!r})"

    def add(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Appends passages.

        Args:
            passages: N passages with ids that are not in the store.
            embeddings: [N, D], any float type; normalised here, once.

        Raises:
            StoreError: Another D than the store's, another N, a duplicate id, or a value that is not finite; then
                nothing is added.
        """
        rows = check_embeddings(passages, embeddings, self.dim).to(self.device)
        check_new_ids(passages, self)
        start, end = len(self), len(self) + len(passages)
        if end == start:
            return
        if start == 0:
            self._matrix = rows.new_empty(end, rows.shape[1])
        elif end > self._matrix.shape[0]:
            grown = rows.new_empty(max(end, 2 * self._matrix.shape[0]), rows.shape[1])
            grown[:start] = self._matrix[:start]
            self._matrix = grown
        self._matrix[start:end] = rows
        self._passages.extend(passages)
        self._row.update((passage.id, start + offset) for offset, passage in enumerate(passages))

    def update(self, passages: Sequence[Passage], embeddings: Tensor) -> None:
        """Replaces passages that are there, each in its place.

        Raises:
            StoreError: As `add`, or an id that is not in the store; then nothing changes.
        """
        rows = check_embeddings(passages, embeddings, self.dim).to(self.device)
        where = self._rows([passage.id for passage in passages])
        self._matrix[where] = rows
        for row, passage in zip(where, passages, strict=True):
            self._passages[row] = passage

    def delete(self, ids: Sequence[str]) -> int:
        """Removes the passages of these ids and returns how many there were; the others keep their order. O(N)."""
        gone = {self._row[passage_id] for passage_id in ids if passage_id in self._row}
        if gone:
            kept = [row for row in range(len(self)) if row not in gone]
            # Indexing copies, so nothing is read after it was overwritten; this also gives unused capacity back.
            self._matrix = self._matrix[torch.tensor(kept, dtype=torch.long, device=self.device)]
            self._passages = [self._passages[row] for row in kept]
            self._row = {passage.id: row for row, passage in enumerate(self._passages)}
        return len(gone)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages of these ids, in this order. Raises StoreError for an unknown id."""
        return [self._passages[row] for row in self._rows(ids)]

    def embeddings(self, ids: Sequence[str]) -> Tensor:
        """The normalised embeddings of these ids (a copy), float32 [N, D]. Raises StoreError for an unknown id."""
        return self._matrix[self._rows(ids)]

    def passages(self) -> Iterator[Passage]:
        """All passages in the order in which they were added."""
        return iter(tuple(self._passages))

    def search(self, queries: Tensor, top_k: int) -> list[list[RetrievedPassage]]:
        """For each query the `top_k` passages of highest cosine, best first.

        Args:
            queries: [B, D]; normalised here.
            top_k: Passages for each query; with more than the store holds, all of them come back.

        Returns:
            B lists. Equal scores stand in the order in which the passages were added.
        """
        rows = check_queries(queries, top_k, self.dim)
        if not len(self):
            return [[] for _ in rows]
        scores, indices = top_k_rows(rows.to(self.device), self._matrix[: len(self)], top_k)  # [B, K] each
        return [
            [RetrievedPassage.of(self._passages[i], s) for i, s in zip(row_i, row_s, strict=True)]
            for row_i, row_s in zip(indices.tolist(), scores.tolist(), strict=True)
        ]

    def save(self, directory: str | Path) -> Path:
        """Writes `embeddings.safetensors`, `passages.jsonl` and `store.json` atomically."""
        return write_store(directory, self._passages, self._matrix[: len(self)])

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> MemoryStore:
        """Reads a folder that a store wrote. Raises StoreError naming the file that is missing or corrupt."""
        passages, matrix = read_store(directory)
        store = cls(device=device)
        if passages:
            store.add(passages, matrix)
        return store

    def _rows(self, ids: Sequence[str]) -> list[int]:
        try:
            return [self._row[passage_id] for passage_id in ids]
        except KeyError as error:
            raise StoreError(f"no passage has the id {error.args[0]!r} (the store holds {len(self)})") from None


def check_embeddings(passages: Sequence[Passage], embeddings: Tensor, dim: int | None) -> Tensor:
    """Embeddings as float32 [N, D] of length 1, or a StoreError that says what does not fit."""
    embeddings = torch.as_tensor(embeddings)
    if embeddings.ndim != 2 or embeddings.shape[0] != len(passages):
        raise StoreError(
            f"expected embeddings [{len(passages)}, D], one row for each passage; found {list(embeddings.shape)}"
        )
    if dim is not None and embeddings.shape[1] != dim:
        raise StoreError(
            f"the embeddings have size {embeddings.shape[1]}, the store holds size {dim}: "
            "they come from another encoder; clear() the store and index the corpus again"
        )
    embeddings = embeddings.detach().float()
    bad = (~torch.isfinite(embeddings).all(dim=1)).nonzero()
    if len(bad):
        raise StoreError(f"the embedding of the passage {passages[int(bad[0])].id!r} is not finite")
    return torch.nn.functional.normalize(embeddings, dim=1)


def check_new_ids(passages: Sequence[Passage], present: Container[str]) -> None:
    """Raises StoreError if an id is among those present in the store already, or twice among `passages`."""
    seen: set[str] = set()
    for passage in passages:
        if passage.id in seen or passage.id in present:
            where = "twice among the new passages" if passage.id in seen else "in the store already; use update()"
            raise StoreError(f"the id {passage.id!r} is {where}")
        seen.add(passage.id)


def check_queries(queries: Tensor, top_k: int, dim: int | None) -> Tensor:
    """Queries as float32 [B, D] of length 1, or a StoreError."""
    if top_k < 1:
        raise StoreError(f"top_k must be at least 1, found {top_k}")
    queries = torch.as_tensor(queries).detach()
    if queries.ndim != 2 or (dim is not None and queries.shape[1] != dim):
        raise StoreError(f"expected queries [B, {dim if dim is not None else 'D'}], found {list(queries.shape)}")
    return torch.nn.functional.normalize(queries.float(), dim=1)


def write_store(directory: str | Path, passages: Sequence[Passage], matrix: Tensor) -> Path:
    """Writes the folder that `read_store` reads: all of it or nothing."""
    with atomic_dir(directory) as folder:
        save_file({"embeddings": matrix.detach().cpu().contiguous().clone()}, str(folder / "embeddings.safetensors"))
        with open(folder / "passages.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for passage in passages:
                row = {"id": passage.id, "title": passage.title, "text": passage.text, "metadata": passage.metadata}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        head = {"format": FORMAT, "passages": len(passages), "dim": matrix.shape[1] if len(passages) else None}
        (folder / "store.json").write_text(json.dumps(head) + "\n", encoding="utf-8")
    return Path(directory)


def read_store(directory: str | Path) -> tuple[list[Passage], Tensor]:
    """Reads what `write_store` wrote and checks that its parts belong together.

    Raises:
        StoreError: A file is missing, cut off or of another store; the message names it.
    """
    folder = Path(directory)
    head = _read_json(folder / "store.json", folder)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{folder / 'store.json'}: expected format {FORMAT}, found {head!r}")
    path = folder / "embeddings.safetensors"
    try:
        matrix = load_file(str(path))["embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise StoreError(f"{path}: missing or corrupt ({error})") from error
    passages = _read_passages(folder / "passages.jsonl")
    for found, where in ((len(passages), "passages.jsonl"), (matrix.shape[0], "embeddings.safetensors")):
        if found != head.get("passages"):
            raise StoreError(f"{folder / where}: holds {found} passages, store.json says {head.get('passages')}")
    if len(passages) and matrix.shape[1] != head.get("dim"):
        raise StoreError(f"{path}: embeddings of size {matrix.shape[1]}, store.json says {head.get('dim')}")
    return passages, matrix


def _read_passages(path: Path) -> list[Passage]:
    passages = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    passages.append(Passage(row["id"], row["text"], row["title"], row["metadata"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise StoreError(f"{path}, line {number}: not a passage ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: missing or corrupt ({error})") from error
    return passages


def _read_json(path: Path, folder: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is not a saved store, or it was cut off while written: no {path.name}") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: corrupt ({error})") from error
