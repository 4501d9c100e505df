"""GFM-RAG v2's graph: nodes.csv, relations.csv and edges.csv.

Nodes of type "document" become documents, all others entities; entity and relation ids count rows of the files. Edges
between an entity and a document (`is_mentioned_in`) are the incidence; edges between entities are the triples. A
relation that links nothing but documents is no relation of the graph. Attributes are not kept (and not evaluated).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from ragkit.files import atomic_file
from ragkit.graph.documents import from_pairs, read_json_object
from ragkit.graph.names import Names, joined, large_strings
from ragkit.graph.parts import GraphParts
from ragkit.graph.report import GraphError, LoadReport

DOCUMENT = "document"
MENTIONED = "is_mentioned_in"
BLOCK = 32 << 20
TEXT_COLUMNS = ("uid", "name", "type", "attributes", "source", "relation", "target")


def read_v2(stage1: Path, texts_path: Path | None, strict: bool) -> GraphParts:
    """Reads the three files and, if it is there, raw/documents.json.

    Args:
        stage1: Their folder.
        texts_path: The documents' texts.
        strict: Raise where something cannot be used.

    Raises:
        GraphError: A file or column is missing, a name stands there twice, or no edge joins two entities.
    """
    report = LoadReport(str(stage1 / "edges.csv"), unit="row")
    nodes, _ = _read(stage1 / "nodes.csv", ["type"], report, ["uid", "name"])
    key = "uid" if "uid" in nodes.column_names else "name"
    keys = _names(nodes.column(key), stage1 / "nodes.csv", "node")
    shown = large_strings(nodes.column("name" if "name" in nodes.column_names else key), "node")
    is_document = pc.equal(nodes.column("type"), DOCUMENT).to_numpy()
    place = np.where(is_document, np.cumsum(is_document), np.cumsum(~is_document)).astype(np.int64) - 1
    relations = _relations(stage1 / "relations.csv", report)
    edges, bad = _read(stage1 / "edges.csv", ["source", "relation", "target"], report)
    source, target = keys.ids(edges.column("source")), keys.ids(edges.column("target"))
    relation = relations.ids(edges.column("relation"))
    report.rows = edges.num_rows + len(bad)
    known = (source >= 0) & (target >= 0) & (relation >= 0)
    numbers = np.setdiff1d(np.arange(2, 2 + report.rows), bad)  # row 1 is the head
    lost = np.flatnonzero(~known)
    kinds = np.stack([source[lost], target[lost], relation[lost]]).argmin(0)  # -1, where one is missing, is least
    reasons = [f"{what} that is in no file" for what in ("source", "target", "relation")]
    report.skip_many(numbers[lost], kinds, reasons, lambda place: _edge_text(edges, int(lost[place])))
    source, target, relation = source[known], target[known], relation[known]
    from_document, to_document = is_document[source], is_document[target]
    report.count_only("edges from document to document", int((from_document & to_document).sum()))
    triple, mention = ~from_document & ~to_document, from_document != to_document
    if not triple.any():
        raise GraphError(f"{stage1 / 'edges.csv'}: no edge joins two entities; {report.summary()}")
    flip = from_document[mention]
    owner = place[np.where(flip, source[mention], target[mention])]
    inside = place[np.where(flip, target[mention], source[mention])]
    used = np.zeros(len(relations), bool)
    used[relation[mention]] = True
    used[relation[triple]] = False  # now: relations of documents only
    new_id = np.cumsum(~used) - 1
    entity_rows = np.flatnonzero(~is_document)
    parts = GraphParts(
        _names(shown.take(pa.array(entity_rows)), stage1 / "nodes.csv", "entity"),
        Names(relations.array.take(pa.array(np.flatnonzero(~used))), "relation"),
        place[source[triple]].astype(np.int32),
        new_id[relation[triple]].astype(np.int32),
        place[target[triple]].astype(np.int32),
        report=report,
    )
    names = shown.take(pa.array(np.flatnonzero(is_document))).to_pylist()
    texts = read_json_object(texts_path) if texts_path else None
    if names or texts:
        parts.documents = from_pairs(owner, inside.astype(np.int32), names, texts, report, str(stage1 / "nodes.csv"))
    report.finish(strict)
    return parts


def _edge_text(edges: pa.Table, row: int) -> str:
    return ",".join(edges.column(name)[row].as_py() for name in ("source", "relation", "target"))


def _relations(path: Path, report: LoadReport) -> Names:
    table, _ = _read(path, ["name"], report)
    return _names(table.column("name"), path, "relation")


def _names(values: pa.ChunkedArray | pa.Array, path: Path, what: str) -> Names:
    try:
        return Names(values, what)
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error


def _read(
    path: Path, columns: list[str], report: LoadReport, one_of: list[str] | None = None
) -> tuple[pa.Table, list[int]]:
    """A CSV file with all columns as text, so that "nan" and "null" stay names; and the rows that were left out."""
    if not path.is_file():
        raise GraphError(f"{path}: no such file; a graph of GFM-RAG v2 has nodes.csv, relations.csv and edges.csv")
    if not path.stat().st_size:
        raise GraphError(f"{path} is empty")
    check_utf8(path)

    bad: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        bad.append(row)
        return "skip"

    try:
        table = _parse(path, BLOCK, skip)
    except pa.ArrowInvalid as error:
        if "straddl" not in str(error):
            raise GraphError(f"{path}: {error}") from error
        bad.clear()  # a value is larger than a block: all in one
        table = _parse(path, min(path.stat().st_size + 1, 2**31 - 1), skip)
    for row in bad:
        reason = f"{row.actual_columns} values in {path.name}, expected {row.expected_columns}"
        report.skip(row.number, reason, row.text)
    if "attributes" in table.column_names:
        kept = pc.is_in(table.column("attributes"), value_set=pa.array(["", "{}"], pa.large_string()))
        count = table.num_rows - (pc.sum(kept).as_py() or 0)
        if count:
            report.notes.append(f"the attributes of {count:,} rows of {path.name} are not kept")
    missing = [name for name in columns if name not in table.column_names]
    if one_of and not any(name in table.column_names for name in one_of):
        missing.append(" or ".join(one_of))
    if missing:
        raise GraphError(f"{path}: no column {missing[0]}; found {', '.join(table.column_names)}")
    return table, [row.number for row in bad]


def _parse(path: Path, block: int, skip: object) -> pa.Table:
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=block, use_threads=False),  # threads lose the rows' numbers
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(TEXT_COLUMNS, pa.large_string()), strings_can_be_null=False, null_values=[]
        ),
    )


def check_utf8(path: Path) -> None:
    """Raises a GraphError with the line of the first byte that is no UTF-8."""
    line = 1
    with path.open("rb") as file:
        carry = b""
        while block := file.read(BLOCK):
            block = carry + block
            cut = block.rfind(b"\n") + 1  # 0 in the middle of a huge line: read on
            block, carry = block[:cut], block[cut:]
            line = _check_block(block, path, line)
        _check_block(carry, path, line)


def _check_block(block: bytes, path: Path, line: int) -> int:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        at = line + block.count(b"\n", 0, error.start)
        raise GraphError(f"{path}, line {at}: not UTF-8 (byte 0x{block[error.start]:02x})") from error
    return line + block.count(b"\n")


def write_v2(stage1: Path, parts: GraphParts) -> None:
    """Writes the three files.

    Where a document has the name of an entity, nodes.csv gets a column uid besides name, in which the document is
    called `document: <name>`; GFM-RAG v2 takes the uid, our reader both.
    """
    documents = parts.documents
    entities, names = parts.entities.array, documents.names.array
    uids = names
    clash = pc.is_in(names, value_set=entities)
    if pc.any(clash).as_py():
        uids = pc.if_else(clash, joined("document: ", names), names)
    kinds = pa.array(["entity", DOCUMENT], pa.large_string())
    kind = pa.array(np.repeat([0, 1], [len(entities), len(names)]))
    nodes = {"name": pa.concat_arrays([entities, names]), "type": kinds.take(kind)}
    if uids is not names:
        nodes = {"uid": pa.concat_arrays([entities, uids]), **nodes}
        Names(nodes["uid"], "uid")  # a name may look like a uid of ours
    _write(stage1 / "nodes.csv", nodes)
    used = MENTIONED in parts.relations or not len(documents.entities)
    more = pa.array([] if used else [MENTIONED], pa.large_string())
    _write(stage1 / "relations.csv", {"name": pa.concat_arrays([parts.relations.array, more])})
    owner = np.repeat(np.arange(len(names)), np.diff(documents.ptr))
    mentioned = pa.array([MENTIONED], pa.large_string()).take(pa.array(np.zeros(len(owner), np.int64)))
    take = {name: pa.array(getattr(parts, name)) for name in ("head", "relation", "tail")}
    edges = {
        "source": pa.concat_arrays([entities.take(take["head"]), entities.take(pa.array(documents.entities))]),
        "relation": pa.concat_arrays([parts.relations.array.take(take["relation"]), mentioned]),
        "target": pa.concat_arrays([entities.take(take["tail"]), uids.take(pa.array(owner))]),
    }
    _write(stage1 / "edges.csv", edges)


def _write(path: Path, columns: dict[str, pa.Array]) -> None:
    rows = len(next(iter(columns.values())))
    empty = pa.array(["{}"], pa.large_string()).take(pa.array(np.zeros(rows, np.int64)))
    with atomic_file(path) as file:
        pa_csv.write_csv(pa.table({**columns, "attributes": empty}), file)
