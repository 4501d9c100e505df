"""Documents and the entities in each, from the files and dicts that people keep them in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ragkit.graph.names import Names
from ragkit.graph.parts import Documents
from ragkit.graph.report import GraphError, LoadReport


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        GraphError: Not UTF-8, not JSON, no object, or a key that stands there twice; names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise GraphError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file first") from error
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_repeated_keys(pairs, path))
    except json.JSONDecodeError as error:
        raise GraphError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise GraphError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _no_repeated_keys(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise GraphError(f"{path}: the key {repeated!r} stands there twice")
    return value


def from_lists(
    entities_of: Mapping[str, Any],
    texts: Mapping[str, Any] | None,
    entities: Names,
    report: LoadReport,
    source: str = "documents",
    rename: Callable[[str], str] | None = None,
) -> Documents:
    """Documents from `{document: [entity name, ...]}`.

    Args:
        entities_of: Names of the entities in each document. The order of its keys is the order of the documents.
        texts: Document -> text; a document that is here only comes after the others, with no entity.
        entities: The graph's entities.
        report: Gets names that are no entity of the graph, repeats, and documents without entities or text.
        source: For messages.
        rename: Applied to each entity name, as it was to those of the triples.

    Raises:
        GraphError: An entry of the wrong type; names the document.
    """
    flat: list[str] = []
    counts = np.zeros(len(entities_of), np.int64)
    for row, (document, names) in enumerate(entities_of.items()):
        if isinstance(names, str) or not isinstance(names, (list, tuple)):
            raise GraphError(
                f"{source}, document {document!r}: expected a list of entity names, found {type(names).__name__}"
            )
        wrong = next((name for name in names if not isinstance(name, str)), None)
        if wrong is not None or None in names:
            raise GraphError(f"{source}, document {document!r}: expected entity names, found {wrong!r}")
        counts[row] = len(names)
        flat += [rename(name) for name in names] if rename else names
    ids = entities.ids(flat)
    owner = np.repeat(np.arange(len(entities_of), dtype=np.int64), counts)
    documents = list(entities_of)
    unknown = np.flatnonzero(ids < 0)
    report.unknown_entities += len(unknown)
    report.unknown((documents[owner[place]], flat[place]) for place in unknown[:10])
    known = ids >= 0
    return from_pairs(owner[known], ids[known], documents, texts, report, source)


def from_pairs(
    owner: np.ndarray,
    ids: np.ndarray,
    documents: list[str],
    texts: Mapping[str, Any] | None,
    report: LoadReport,
    source: str = "documents",
) -> Documents:
    """Documents from (document number, entity id) pairs.

    Args:
        owner: [M] int64 number of a document, in any order.
        ids: [M] int32 entity id.
        documents: Ids of the documents.
        texts: As in `from_lists`.
        report: As in `from_lists`.
        source: For messages.
    """
    key = owner.astype(np.int64) << 32 | ids.astype(np.int64)
    first = np.unique(key, return_index=True)[1]
    report.repeated_entities += len(key) - len(first)
    first.sort()
    first = first[np.argsort(owner[first], kind="stable")]  # by document, and in it as the file has them
    text_column = None
    if texts is not None:
        for document, text in texts.items():
            if not isinstance(text, str):
                raise GraphError(f"the text of document {document!r}: expected a string, found {type(text).__name__}")
        known = set(documents)
        documents = documents + [document for document in texts if document not in known]
        report.documents_without_text = sum(document not in texts for document in documents)
        text_column = pa.array([texts.get(document) for document in documents], pa.large_string())
    ptr = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(np.bincount(owner[first], minlength=len(documents)), out=ptr[1:])
    report.documents_without_entities = int((ptr[1:] == ptr[:-1]).sum())
    try:
        names = Names(documents, "document")
    except GraphError as error:
        raise GraphError(f"{source}: {error}") from error
    return Documents(names, ptr, ids[first].astype(np.int32), text_column)


def transpose(ptr: np.ndarray, columns: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR [rows, size] -> CSR of the transpose: (ptr [size + 1] int64, row numbers int32, rising in each)."""
    rows = np.repeat(np.arange(len(ptr) - 1, dtype=np.int32), np.diff(ptr))
    out = np.zeros(size + 1, np.int64)
    np.cumsum(np.bincount(columns, minlength=size), out=out[1:])
    return out, rows[np.argsort(columns, kind="stable")]
