"""A graph from triples in memory: tuples, an Arrow table or a pandas frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ragkit.graph.documents import from_lists
from ragkit.graph.names import large_strings
from ragkit.graph.normalise import v1_name
from ragkit.graph.parts import GraphParts, encode_triples
from ragkit.graph.report import GraphError, LoadReport

COLUMNS = ("head", "relation", "tail")


def parts_from_triples(
    triples: Any,
    documents: Mapping[str, Iterable[str]] | None,
    texts: Mapping[str, str] | None,
    v1_names: bool,
    strict: bool,
) -> GraphParts:
    """See `KnowledgeGraph.from_triples`; rows with a missing or blank name are counted in the report."""
    report = LoadReport("the triples", unit="row")
    heads, relations, tails = _columns(triples)
    report.rows = len(heads)
    rows = np.arange(len(heads), dtype=np.int64)
    places = np.stack([rows, rows + len(heads)], 1).reshape(-1)
    ends = pa.concat_arrays([heads, tails]).take(pa.array(places))  # head 0, tail 0, head 1, ...
    rename = v1_name if v1_names else None
    parts = encode_triples(pa.chunked_array([ends]), pa.chunked_array([relations]), rows + 1, report, rename)
    if not len(parts.head):
        raise GraphError(f"no usable triple; {report.summary()}" if len(heads) else "no triples: the list is empty")
    if documents is not None or texts is not None:
        lists = {
            name: list(names) if not isinstance(names, str) else names for name, names in (documents or {}).items()
        }
        parts.documents = from_lists(lists, texts, parts.entities, report, "documents", rename)
    report.finish(strict)
    return parts


def _columns(triples: Any) -> list[pa.Array]:
    if hasattr(triples, "iterrows"):  # pandas.DataFrame
        picked = _pick([str(name) for name in triples.columns])
        return [large_strings(triples.iloc[:, place].tolist(), name) for place, name in picked]
    if isinstance(triples, (pa.Table, pa.RecordBatch)):
        return [large_strings(triples.column(place), name) for place, name in _pick(triples.column_names)]
    rows = list(triples)
    for number, row in enumerate(rows, start=1):
        if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != 3:
            raise GraphError(f"row {number}: expected (head, relation, tail), found {str(row)[:80]!r}")
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return [large_strings(column, name) for column, name in zip(columns, COLUMNS, strict=True)]


def _pick(names: list[str]) -> list[tuple[int, str]]:
    """(place, name) of head, relation and tail."""
    if all(name in names for name in COLUMNS):
        return [(names.index(name), name) for name in COLUMNS]
    if len(names) == 3:
        return list(enumerate(COLUMNS))
    raise GraphError(f"expected the columns head, relation and tail, found: {', '.join(names) or 'none'}")
