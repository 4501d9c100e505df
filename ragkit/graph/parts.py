"""The plain arrays of a graph, and how they are made from columns of names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ragkit.graph.names import Names, blank_names
from ragkit.graph.report import LoadReport


@dataclass
class Documents:
    """Documents and the entities in each, as CSR: document i has entities[ptr[i] : ptr[i + 1]].

    Attributes:
        names: Ids of the documents.
        ptr: [docs + 1] int64.
        entities: [entries] int32 entity ids; within a document each once, in the order of the file.
        texts: [docs] large_string, null where a document has no text; None where no document has one.
    """

    names: Names = field(default_factory=lambda: Names.trusted(pa.array([], pa.large_string()), "document"))
    ptr: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    entities: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    texts: pa.Array | None = None


@dataclass
class GraphParts:
    """What a loader hands over: names, triples as three id columns [T] int32, documents, and its report."""

    entities: Names
    relations: Names
    head: np.ndarray
    relation: np.ndarray
    tail: np.ndarray
    documents: Documents = field(default_factory=Documents)
    report: LoadReport = field(default_factory=LoadReport)


def encode_triples(
    ends: pa.ChunkedArray,
    relations: pa.ChunkedArray,
    numbers: np.ndarray,
    report: LoadReport,
    rename: Callable[[str], str] | None = None,
) -> GraphParts:
    """Gives ids in first-seen order (head, then tail, row by row) and leaves out rows with a blank name.

    Args:
        ends: [2T] large_string: head 0, tail 0, head 1, ...
        relations: [T] large_string.
        numbers: [T] line or row number of each triple, for the report.
        report: Gets the rows that are left out.
        rename: Applied to each different name, such as `v1_name`.

    Returns:
        The parts, without documents.
    """
    entity_names, entity_ids = _encode(ends)
    relation_names, relation_ids = _encode(relations)
    renamed_entities, renamed_relations = entity_names, relation_names
    if rename:
        renamed_entities = pa.array([rename(name or "") for name in entity_names.to_pylist()], pa.large_string())
        renamed_relations = pa.array([rename(name or "") for name in relation_names.to_pylist()], pa.large_string())
    blank_entity, blank_relation = blank_names(renamed_entities), blank_names(renamed_relations)
    pairs = entity_ids.reshape(-1, 2)  # [T, 2]
    if blank_entity.any() or blank_relation.any():
        blank = np.stack([blank_entity[pairs[:, 0]], blank_relation[relation_ids], blank_entity[pairs[:, 1]]])
        bad = np.flatnonzero(blank.any(0))
        reasons = [f"empty {what}" + (" once normalised" if rename else "") for what in ("head", "relation", "tail")]

        def text(place: int) -> str:
            head, tail = (entity_names[end].as_py() or "" for end in pairs[bad[place]])
            return f"{head},{relation_names[relation_ids[bad[place]]].as_py() or ''},{tail}"

        report.skip_many(numbers[bad], blank[:, bad].argmax(0), reasons, text)
        keep = ~blank.any(0)
        pairs, relation_ids = pairs[keep], relation_ids[keep]  # [T kept, 2], [T kept]
        entity_ids = pairs.reshape(-1)
        rename = rename or str  # ids have gaps now: number anew below
    if rename:
        entity_names, entity_ids = _renumber(renamed_entities, entity_ids)
        relation_names, relation_ids = _renumber(renamed_relations, relation_ids)
        pairs = entity_ids.reshape(-1, 2)
    return GraphParts(
        Names.trusted(entity_names, "entity"),
        Names.trusted(relation_names, "relation"),
        np.ascontiguousarray(pairs[:, 0], np.int32),
        np.ascontiguousarray(relation_ids, np.int32),
        np.ascontiguousarray(pairs[:, 1], np.int32),
        report=report,
    )


def _encode(values: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """(different values in first-seen order, [M] int32 place of each value)."""
    encoded = values.dictionary_encode(null_encoding="encode").unify_dictionaries()
    if encoded.num_chunks == 0:
        return pa.array([], pa.large_string()), np.zeros(0, np.int32)
    ids = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks])
    return encoded.chunk(encoded.num_chunks - 1).dictionary, ids.astype(np.int32, copy=False)


def _renumber(names: pa.Array, ids: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """New ids in first-seen order for names of which some may be equal and some unused."""
    merged = names.dictionary_encode()
    ids = merged.indices.to_numpy(zero_copy_only=False)[ids] if len(ids) else ids
    seen = pa.array(ids, pa.int32()).dictionary_encode()
    return merged.dictionary.take(seen.dictionary), seen.indices.to_numpy(zero_copy_only=False)
