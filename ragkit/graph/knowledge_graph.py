"""The one graph of the house: entities, relations, triples, and which document tells of which entity."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ragkit_kernels.relational_conv.layout import GraphLayout, build_layout
from torch import Tensor

from ragkit.graph import formats
from ragkit.graph.cache import cache_key, read_cache, write_cache
from ragkit.graph.documents import transpose
from ragkit.graph.info import GraphInfo, graph_html, graph_info
from ragkit.graph.parts import Documents, GraphParts
from ragkit.graph.pyg import parts_from_pyg, to_pyg
from ragkit.graph.report import GraphError, LoadReport
from ragkit.graph.triples import parts_from_triples


class KnowledgeGraph:
    """A knowledge graph with its documents.

    Make one with `load`, `from_triples` or `from_pyg`. Ids are places in `entities`, `relations` and `documents`; for
    triples from a list or a kg.txt they count names as they are first seen (head before tail), as GFM-RAG v1 does.

    Attributes:
        entities: N names.
        relations: R names, without the inverse relations.
        head: [T] int32 entity ids of the triples, `relation` [T] int32 relation ids, `tail` [T] int32 entity ids.
            Triples that stand there twice stay twice.
        documents: Ids of the documents.
        document_ptr: [docs + 1] int64; document i tells of `document_entities[document_ptr[i] : document_ptr[i + 1]]`.
        document_entities: [entries] int32 entity ids, each once in a document.
        texts: [docs] Arrow strings (null where a document has none), or None.
        report: What the loader could not use.

    Raises:
        GraphError: Ids out of range or columns of different length.

    Example:
        >>> graph = KnowledgeGraph.from_triples([("Lima", "capital of", "Peru")], {"Peru": ["Peru", "Lima"]})
        >>> graph.relation_texts
        ['capital of', 'inverse_capital of']
    """

    def __init__(self, parts: GraphParts) -> None:
        self.entities, self.relations = parts.entities, parts.relations
        self.head = _ids(parts.head, len(parts.entities), "head")
        self.relation = _ids(parts.relation, len(parts.relations), "relation")
        self.tail = _ids(parts.tail, len(parts.entities), "tail")
        if not len(self.head) == len(self.relation) == len(self.tail):
            raise GraphError(
                f"{len(self.head)} heads, {len(self.relation)} relations and {len(self.tail)} tails: "
                "a triple has one of each"
            )
        documents = parts.documents
        self.documents, self.texts = documents.names, documents.texts
        self.document_ptr = np.ascontiguousarray(documents.ptr, np.int64)
        self.document_entities = _ids(documents.entities, len(parts.entities), "document_entities")
        if (
            len(self.document_ptr) != len(self.documents) + 1
            or self.document_ptr[0] != 0
            or self.document_ptr[-1] != len(self.document_entities)
            or (np.diff(self.document_ptr) < 0).any()
        ):
            raise GraphError(
                f"document_ptr does not cut {len(self.document_entities)} entries into {len(self.documents)} documents"
            )
        self.report: LoadReport = parts.report
        self._rel_emb: Tensor | None = None

    # ---- counts and tensors ----

    @property
    def num_entities(self) -> int:
        """N."""
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        """R; the message passing sees 2R, each relation and its inverse."""
        return len(self.relations)

    @property
    def num_triples(self) -> int:
        """T; the message passing sees 2T edges."""
        return len(self.head)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.documents)

    @property
    def relation_texts(self) -> list[str]:
        """2R texts to embed: the relations, then each once more with `inverse_` before it."""
        names = list(self.relations)
        return names + [f"inverse_{name}" for name in names]

    @cached_property
    def edge_index(self) -> Tensor:
        """[2, 2T] int64: heads and tails, then tails and heads (the inverse edges)."""
        return self._edges()[0]

    @cached_property
    def edge_type(self) -> Tensor:
        """[2T] int64: relation ids, then the same + R."""
        return self._edges()[1]

    def _edges(self) -> tuple[Tensor, Tensor]:
        head, tail = torch.from_numpy(self.head).long(), torch.from_numpy(self.tail).long()
        relation = torch.from_numpy(self.relation).long()
        index = torch.stack([torch.cat([head, tail]), torch.cat([tail, head])])  # [2, 2T]
        return index, torch.cat([relation, relation + self.num_relations])

    @cached_property
    def layout(self) -> GraphLayout:
        """The edges as the kernels take them: messages go from `edge_index[1]` to `edge_index[0]`. Built once."""
        index, kind = self._edges()  # not the cached properties: nobody may need them besides
        return build_layout(index[0], index[1], kind, self.num_entities, 2 * self.num_relations)

    @property
    def rel_emb(self) -> Tensor | None:
        """[2R, F] embeddings of `relation_texts`, or None before they are set.

        Raises:
            GraphError: On setting: another number of rows, no floats, or values that are not finite.
        """
        return self._rel_emb

    @rel_emb.setter
    def rel_emb(self, value: Tensor | None) -> None:
        if value is not None:
            value = torch.as_tensor(value)
            rows = 2 * self.num_relations
            if value.ndim != 2 or len(value) != rows:
                raise GraphError(
                    f"rel_emb has shape {list(value.shape)}, expected [{rows}, F]: a row for each of the "
                    f"{self.num_relations} relations and for each of their inverses (see relation_texts)"
                )
            if not value.is_floating_point():
                raise GraphError(f"rel_emb is {value.dtype}, expected a float type")
            bad = ~torch.isfinite(value).all(1)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise GraphError(
                    f"rel_emb: {int(bad.sum())} of {rows} rows hold NaN or infinity (first: row {row}, "
                    f"{self.relation_texts[row]!r})"
                )
        self._rel_emb = value

    # ---- documents ----

    @cached_property
    def _entity_documents(self) -> tuple[np.ndarray, np.ndarray]:
        return transpose(self.document_ptr, self.document_entities, self.num_entities)

    def entity_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """(ptr [N + 1] int64, documents [entries] int32): entity e stands in `documents[ptr[e] : ptr[e + 1]]`."""
        return self._entity_documents

    @cached_property
    def document_frequency(self) -> np.ndarray:
        """[N] int64, number of documents that tell of each entity."""
        return np.bincount(self.document_entities, minlength=self.num_entities)

    def entities_of(self, document: int) -> np.ndarray:
        """Entity ids of document number `document`."""
        return self.document_entities[self.document_ptr[document] : self.document_ptr[document + 1]]

    def document_text(self, document: int) -> str | None:
        """Text of document number `document`, or None if it has none."""
        return None if self.texts is None else self.texts[document].as_py()

    # ---- in and out ----

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        v1_names: bool = False,
        strict: bool = False,
        format: str | None = None,
        cache: bool = False,
    ) -> KnowledgeGraph:
        """Reads a graph from a folder.

        Args:
            path: A data set's folder in the layout of GFM-RAG v1 (`processed/stage1/kg.txt`, `document2entities.json`,
                `raw/dataset_corpus.json`) or v2 (`nodes.csv`, `relations.csv`, `edges.csv`, `raw/documents.json`); or
                its `stage1`; or a folder with nothing but `kg.txt`; or "small_world", the one that comes with ragkit.
            v1_names: Bring entity and relation names to v1's normal form (`ragkit.graph.normalise.v1_name`). By
                default they stay as they stand in the files.
            strict: Raise where a row or an entry cannot be used, instead of counting it in `.report` and printing
                a line.
            format: "v1" or "v2"; needed only where the folder holds both.
            cache: Keep the parsed graph and its layout beside the files (`processed/stage2/ragkit-...`; where that
                cannot be written, in the user's cache folder), under a key made of the files' content. The next load
                reads that.

        Raises:
            GraphError: No graph there, a file that cannot be read (file and line are named), or `strict`.
        """
        layout = formats.find_layout(path, format)
        if not cache:
            return cls(formats.read_graph(layout, v1_names, strict))
        key = cache_key(layout, v1_names)
        cached = read_cache(layout, key)
        if cached:
            parts, graph_layout, fingerprint = cached
            parts.report.finish(strict)
            graph = cls(parts)
            graph.__dict__.update(layout=graph_layout, fingerprint=fingerprint)  # as the cached properties do
            return graph
        graph = cls(formats.read_graph(layout, v1_names, strict))
        write_cache(layout, key, graph.parts(), graph.layout, graph.fingerprint)
        return graph

    @classmethod
    def from_triples(
        cls,
        triples: Any,
        documents: Mapping[str, Iterable[str]] | None = None,
        texts: Mapping[str, str] | None = None,
        *,
        v1_names: bool = False,
        strict: bool = False,
    ) -> KnowledgeGraph:
        """Makes a graph from triples in memory.

        Args:
            triples: (head, relation, tail) tuples; or a `pyarrow.Table` or `pandas.DataFrame` with columns head,
                relation and tail (or exactly three columns, in this order).
            documents: Document id -> names of its entities.
            texts: Document id -> text.
            v1_names: As in `load`.
            strict: As in `load`.

        Raises:
            GraphError: A row that is no triple (its number is named), or no usable row.
        """
        return cls(parts_from_triples(triples, documents, texts, v1_names, strict))

    @classmethod
    def from_pyg(
        cls, data: Any, entities: Sequence[str] | None = None, relations: Sequence[str] | None = None
    ) -> KnowledgeGraph:
        """Makes a graph from PyTorch Geometric's.

        Args:
            data: A `Data` with `edge_index` [2, E] (or `target_edge_index`, as GFM-RAG's have) and, if edges have
                types, `edge_type` [E]; or a `HeteroData`; or a data set of one graph. An edge list that is followed by
                its inverse (GFM-RAG's and ULTRA's form) is seen as such, and its first half is taken. `edge_index[0]`
                are the heads.
            entities: N names; default `data.entity_names`, else "entity 0", "entity 1", ...
            relations: R names; default `data.relation_names`, else "relation 0", ...

        Raises:
            GraphError: No edge_index, ids out of range, or another number of names than of nodes or relations.
        """
        graph = cls(parts_from_pyg(data, entities, relations))
        if isinstance(getattr(data, "rel_emb", None), Tensor):
            graph.rel_emb = data.rel_emb
        return graph

    def to_pyg(self, names: bool = True) -> Any:
        """The graph as GFM-RAG's `torch_geometric.data.Data`, without documents.

        Args:
            names: Also `entity_names` and `relation_names` (lists; leave them out of graphs with millions).

        Returns:
            `Data` with `edge_index` [2, 2T], `edge_type` [2T], `num_nodes`, `num_relations` (2R), `target_edge_index`
            [2, T], `target_edge_type` [T] and, if it is set, `rel_emb` [2R, F].

        Raises:
            ImportError: torch_geometric is not installed.
        """
        return to_pyg(self.parts(), self.edge_index, self.edge_type, self.rel_emb, names)

    def info(self) -> GraphInfo:
        """Counts, degrees and the most frequent relations."""
        return graph_info(self.parts())

    def save(self, path: str | Path, format: str = "v1") -> Path:
        """Writes the graph as a data set that `load` and GFM-RAG read; each file atomically, other files stay.

        Args:
            path: The data set's folder; made if need be.
            format: "v1" (kg.txt) or "v2" (three CSV files). v1 numbers entities as they are first seen, and cannot
                hold entities or relations without a triple; a warning says what is lost. v2 keeps all ids.

        Returns:
            The folder.
        """
        root = Path(path).expanduser()
        if not self.num_triples:
            raise GraphError(f"{root}: a graph without triples cannot be saved, since no file of it could be loaded")
        for loss in formats.write_graph(root, self.parts(), format):
            warnings.warn(f"{root}: {loss}", stacklevel=2)
        return root

    def parts(self) -> GraphParts:
        """The graph's plain arrays (shared, not copied)."""
        documents = Documents(self.documents, self.document_ptr, self.document_entities, self.texts)
        return GraphParts(self.entities, self.relations, self.head, self.relation, self.tail, documents, self.report)

    def with_triples(self, keep: Any) -> KnowledgeGraph:
        """The graph with only some of its triples, for example without those that are held out.

        Entities, relations, documents and `rel_emb` are shared with this graph, ids included; layout and fingerprint
        are its own.

        Args:
            keep: [T] bool array or tensor, True for the triples that stay.

        Raises:
            GraphError: `keep` is not one bool for each triple.
        """
        keep = np.asarray(keep)
        if keep.dtype != np.bool_ or keep.shape != self.head.shape:
            raise GraphError(
                f"keep: expected bool [{self.num_triples}], one for each triple, found {keep.dtype} {list(keep.shape)}"
            )
        kept = {name: getattr(self, name)[keep] for name in ("head", "relation", "tail")}
        graph = KnowledgeGraph(replace(self.parts(), **kept))
        graph._rel_emb = self._rel_emb
        return graph

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, triples and incidence (not of texts and embeddings); the same on every machine."""
        state = hashlib.blake2b(b"ragkit graph 1", digest_size=16)
        for names in (self.entities, self.relations, self.documents):
            names.update_hash(state)
        for ids in (self.head, self.relation, self.tail, self.document_ptr, self.document_entities):
            state.update(len(ids).to_bytes(8, "little"))
            state.update(np.ascontiguousarray(ids, ids.dtype.newbyteorder("<")).data)
        return state.hexdigest()

    def _repr_html_(self) -> str:
        return graph_html(self.parts())

    def __repr__(self) -> str:
        return (
            f"KnowledgeGraph({self.num_entities:,} entities, {self.num_relations:,} relations, "
            f"{self.num_triples:,} triples, {self.num_documents:,} documents)"
        )


def _ids(values: np.ndarray, limit: int, name: str) -> np.ndarray:
    """Checked int32 ids."""
    values = np.asarray(values)
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise GraphError(f"{name}: expected one column of integer ids, found {values.dtype} {list(values.shape)}")
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= limit):
        row = int(np.flatnonzero((values < 0) | (values >= limit))[0])
        raise GraphError(f"{name}, row {row}: id {int(values[row])} is out of range, expected 0 ... {limit - 1}")
    values = np.ascontiguousarray(values, np.int32)
    return values if values.flags.writeable else values.copy()  # torch warns of arrays that it cannot write to
