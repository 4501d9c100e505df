"""FedRAG's knowledge stores on ragkit's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ragkit.compat.fedrag_names import refuse_unknown
from ragkit.compat.fedrag_nodes import KnowledgeNode, SourceNode, node_of, passage_of
from ragkit.rag.corpus import Passage, RetrievedPassage
from ragkit.rag.qdrant import QdrantStore
from ragkit.rag.store import KnowledgeStore, MemoryStore, StoreError, check_embeddings, check_new_ids, read_store

DEFAULT_TOP_K = 2
CACHE_DIR = ".fed_rag/data_cache/"  # FedRAG's own, where its stores lie that are to be read
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]{0,99}")


class NodeStore:
    """Knowledge nodes in a ragkit store.

    Attributes:
        store: The ragkit store, which a retriever searches.
        name: Name of the store.
        encoded_at: For each retriever's encoders, how often they had been trained when the store was filled.
    """

    def __init__(self, store: KnowledgeStore, name: str = "default") -> None:
        if not _NAME.fullmatch(name):  # it becomes part of a path
            raise StoreError(f"name: found {name!r}, expected letters, digits, '-', '_' and '.'")
        self.store, self.name = store, name
        self.encoded_at: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.count} nodes)"

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return len(self.store)

    def load_node(self, node: KnowledgeNode) -> None:
        """Adds a node; one that is there under the same id is replaced."""
        self.load_nodes([node])

    def load_nodes(self, nodes: Sequence[KnowledgeNode]) -> None:
        """Adds nodes; those that are there under the same id are replaced.

        Raises:
            StoreError: A node has no embedding, one of another size or with a value that is not finite, or two nodes
                have one id; then nothing is added.
        """
        nodes = list(nodes)
        if not nodes:
            return
        for node in nodes:
            if not isinstance(node, KnowledgeNode):
                raise TypeError(f"expected KnowledgeNodes, found {type(node).__name__}")
            if not node.embedding:
                raise StoreError(
                    f"the node {node.node_id!r} has no embedding; make it with "
                    "embedding=retriever.encode_context(text).tolist()"
                )
            if len(node.embedding) != len(nodes[0].embedding or []):
                raise StoreError(
                    f"the node {node.node_id!r} has an embedding of size {len(node.embedding)}, the node "
                    f"{nodes[0].node_id!r} one of size {len(nodes[0].embedding or [])}; encode all with one retriever"
                )
        self._put([passage_of(node) for node in nodes], torch.tensor([node.embedding for node in nodes]))

    def _put(self, passages: Sequence[Passage], matrix: Tensor) -> None:
        check_new_ids(passages, ())
        check_embeddings(passages, matrix, self.store.dim)  # all of them, before any is put in
        old = [number for number, passage in enumerate(passages) if passage.id in self.store]
        new = sorted(set(range(len(passages))) - set(old))
        if new:
            self.store.add([passages[number] for number in new], matrix[new])
        if old:
            self.store.update([passages[number] for number in old], matrix[old])

    def retrieve(self, query_emb: Any, top_k: int = DEFAULT_TOP_K) -> list[tuple[float, KnowledgeNode]]:
        """The nodes nearest to one query embedding (D numbers): (cosine, node), best first."""
        return self.batch_retrieve(torch.as_tensor(query_emb).reshape(1, -1), top_k)[0]

    def batch_retrieve(self, query_embs: Any, top_k: int = DEFAULT_TOP_K) -> list[list[tuple[float, KnowledgeNode]]]:
        """The same for B query embeddings, [B, D]."""
        found = self.store.search(torch.as_tensor(query_embs), top_k)
        return [[(source.score, source.node) for source in row] for row in self.sources(found)]

    def sources(self, found: Sequence[Sequence[RetrievedPassage]]) -> list[list[SourceNode]]:
        """Retrieved passages as source nodes, with the embeddings that the store holds of them."""
        ids = list(dict.fromkeys(passage.id for row in found for passage in row))
        embeddings = dict(zip(ids, self.store.embeddings(ids).tolist(), strict=True)) if ids else {}
        return [
            [SourceNode(passage.score, node_of(passage, embeddings[passage.id])) for passage in row] for row in found
        ]

    def delete_node(self, node_id: str) -> bool:
        """Removes a node; False if there is none of that id."""
        return self.store.delete([node_id]) > 0

    def clear(self) -> None:
        """Removes all nodes; the store is then as new."""
        self.store.clear()
        self.encoded_at.clear()


class InMemoryKnowledgeStore(NodeStore):
    """Nodes in memory (`ragkit.MemoryStore`).

    Args:
        name: Name of the store, and of its folder in `cache_dir`.
        cache_dir: Folder that `persist` writes to and `load` reads from.
    """

    def __init__(self, name: str = "default", cache_dir: str | Path = CACHE_DIR, **unknown: Any) -> None:
        refuse_unknown("InMemoryKnowledgeStore", unknown, ["name", "cache_dir"])
        # Searched where encoders run by default; its matrix is small beside theirs.
        super().__init__(MemoryStore(device="cuda" if torch.cuda.is_available() else "cpu"), name)
        self.cache_dir = str(cache_dir)

    @classmethod
    def from_nodes(cls, nodes: Sequence[KnowledgeNode], **arguments: Any) -> InMemoryKnowledgeStore:
        """A store that holds these nodes; `arguments` are those of the class."""
        store = cls(**arguments)
        store.load_nodes(nodes)
        return store

    def persist(self) -> None:
        """Writes the store, also an empty one, to the folder `cache_dir/name`, in place of what was there."""
        self.store.save(Path(self.cache_dir) / self.name)

    def load(self) -> None:
        """Adds the nodes of `cache_dir/name`, or of the `cache_dir/name.parquet` that FedRAG itself wrote.

        Raises:
            StoreError: There is neither, or a file is corrupt; it is named.
        """
        folder, parquet = Path(self.cache_dir) / self.name, Path(self.cache_dir) / f"{self.name}.parquet"
        if folder.is_dir():
            self._put(*read_store(folder))
        elif parquet.is_file():
            self.load_nodes(_read_parquet(parquet))
        else:
            raise StoreError(
                f"the knowledge store {self.name!r} was not found: there is no folder {folder} and no {parquet}; "
                "give the name and cache_dir with which persist() was called"
            )


def _read_parquet(path: Path) -> list[KnowledgeNode]:
    """The nodes of a file that FedRAG wrote; its metadata is JSON text, which a node reads."""
    from pyarrow import parquet  # only for files of FedRAG

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise StoreError(f"{path}: not a parquet file of knowledge nodes ({error})") from error
    return [KnowledgeNode(**row) for row in rows]


class QdrantKnowledgeStore(NodeStore):
    """Nodes in Qdrant (`ragkit.QdrantStore`). Collections that FedRAG itself filled must be filled again.

    Args:
        collection_name: Name of the collection.
        in_memory: No server: the collection lives as long as this object.
        host: Of the server.
        port: Of its HTTP interface.
        https: Whether it is reached by HTTPS.
        api_key: For a server that wants one.
        name: Name of the store, for messages.
    """

    def __init__(
        self,
        collection_name: str = "default",
        in_memory: bool = False,
        host: str = "localhost",
        port: int = 6333,
        https: bool = False,
        api_key: Any = None,
        name: str = "default",
        **unknown: Any,
    ) -> None:
        known = ["collection_name", "in_memory", "host", "port", "https", "api_key", "name"]
        if unknown.get("collection_distance") == "Cosine":
            del unknown["collection_distance"]  # the one that there is
        refuse_unknown("QdrantKnowledgeStore", unknown, known, {"collection_distance": "only Cosine is supported"})
        secret = api_key.get_secret_value() if hasattr(api_key, "get_secret_value") else api_key
        if in_memory:
            store = QdrantStore(path=":memory:", collection=collection_name)
        else:
            url = f"{'https' if https else 'http'}://{host}:{port}"
            store = QdrantStore(url=url, collection=collection_name, api_key=secret)
        super().__init__(store, name)

    def persist(self) -> None:
        """Not needed: a Qdrant server keeps what it is given."""
        raise StoreError("a Qdrant server keeps its nodes by itself; store.store.save(folder) writes a copy")

    def load(self) -> None:
        """Not needed: the collection holds what was loaded into it."""
        raise StoreError("a Qdrant collection is there as soon as it is opened; there is nothing to load")
