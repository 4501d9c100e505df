"""The folders that graphs live in: GFM-RAG v1's layout and v2's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ragkit import small_world
from ragkit.files import atomic_file, atomic_write_json
from ragkit.graph.documents import from_lists, read_json_object
from ragkit.graph.kg_text import read_kg_text, write_kg_text
from ragkit.graph.normalise import v1_name
from ragkit.graph.parts import Documents, GraphParts, encode_triples
from ragkit.graph.report import GraphError, LoadReport
from ragkit.graph.v2_csv import read_v2, write_v2

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}  # what people's triples come with instead of commas


@dataclass(frozen=True)
class Layout:
    """Where the files of one data set are.

    Attributes:
        format: "v1" or "v2".
        stage1: Folder of the graph's files.
        root: The data set's folder, where caches go.
        texts: The corpus (JSON), if there is one.
    """

    format: str
    stage1: Path
    root: Path
    texts: Path | None

    @property
    def files(self) -> list[Path]:
        """All files that the graph is read from."""
        names = ["kg.txt", "document2entities.json"] if self.format == "v1" else ["nodes.csv", "relations.csv"]
        names += ["edges.csv"] if self.format == "v2" else []
        found = [self.stage1 / name for name in names if (self.stage1 / name).is_file()]
        return found + ([self.texts] if self.texts else [])


def find_layout(path: str | Path, format: str | None = None) -> Layout:
    """Finds a graph's files.

    Args:
        path: The data set's folder (with `processed/stage1`), `stage1` itself, a folder with the files, a kg.txt, or
            "small_world".
        format: "v1" or "v2"; needed only where a folder holds both.

    Raises:
        GraphError: Nothing there, or both formats and no word which.
    """
    small = str(path) == "small_world" and not Path(path).exists()
    path = small_world.path() if small else Path(path).expanduser()
    if format not in (None, "v1", "v2"):
        raise GraphError(f'format is {format!r}, expected "v1" or "v2"')
    if path.is_file() and path.name == "kg.txt":
        path = path.parent
    if not path.is_dir():
        raise GraphError(f"no graph at {path}: expected a folder with processed/stage1/kg.txt, or one with kg.txt")
    stage1 = next((p for p in (path / "processed" / "stage1", path) if p.is_dir() and _formats(p)), None)
    if stage1 is None:
        raise GraphError(
            f"the folder {path} holds no graph: expected kg.txt (GFM-RAG v1) or nodes.csv, relations.csv and "
            "edges.csv (v2), in it or in processed/stage1"
        )
    found = _formats(stage1)
    if format is None and len(found) > 1:
        raise GraphError(f'{stage1} holds a graph in both formats: say format="v1" or format="v2"')
    if format is not None and format not in found:
        raise GraphError(f"{stage1} holds no graph in format {format}, but one in format {found[0]}")
    format = format or found[0]
    in_data_set = stage1.name == "stage1" and stage1.parent.name == "processed"
    root = stage1.parent.parent if in_data_set else stage1
    corpus = "dataset_corpus.json" if format == "v1" else "documents.json"
    texts = next((p for p in (root / "raw" / corpus, stage1 / corpus) if p.is_file()), None)
    return Layout(format, stage1, root, texts)


def _formats(folder: Path) -> list[str]:
    return [
        name
        for name, files in (("v1", ("kg.txt",)), ("v2", ("nodes.csv", "edges.csv")))
        if all((folder / file).is_file() for file in files)
    ]


def read_graph(layout: Layout, v1_names: bool, strict: bool) -> GraphParts:
    """Reads the files of either format; see `read_v1` and `read_v2`."""
    if layout.format == "v1":
        return read_v1(layout, v1_names, strict)
    if v1_names:
        raise GraphError(f"{layout.stage1}: v1_names is for kg.txt; the ids of v2 are rows of its files")
    return read_v2(layout.stage1, layout.texts, strict)


def write_graph(root: Path, parts: GraphParts, format: str) -> list[str]:
    """Writes a data set, each file atomically.

    Returns:
        What the format cannot hold, one sentence each.

    Raises:
        GraphError: An unknown format, or the folder holds a graph in the other one.
    """
    if format not in ("v1", "v2"):
        raise GraphError(f'format is {format!r}, expected "v1" or "v2"')
    other = [name for name in _formats(root / "processed" / "stage1") if name != format]
    if other:
        raise GraphError(f"{root} holds a graph in format {other[0]} already; save to another folder")
    if format == "v1":
        return write_v1(root, parts)
    write_v2(root / "processed" / "stage1", parts)
    write_texts(root / "raw" / "documents.json", parts.documents)
    return []


def read_v1(layout: Layout, v1_names: bool, strict: bool) -> GraphParts:
    """Reads kg.txt, document2entities.json and dataset_corpus.json.

    Args:
        layout: Where they are.
        v1_names: Bring entity and relation names to v1's normal form.
        strict: Raise where something cannot be used.

    Raises:
        GraphError: See `read_kg_text`; or no line could be used; or `strict`.
    """
    path = layout.stage1 / "kg.txt"
    report = LoadReport(str(path))
    rename = v1_name if v1_names else None
    ends, relations, numbers = read_kg_text(path, report)
    parts = encode_triples(ends, relations, numbers, report, rename)
    if not len(parts.head):
        first = report.skipped[0].text if report.skipped else ""
        other = next((name for sign, name in SEPARATORS.items() if first.count(sign) == 2), None)
        hint = f" (values separated by {other}? expected commas)" if other else ""
        raise GraphError(f"{path}: no usable line head,relation,tail{hint}; {'; '.join(report.problems())}")
    _note_quotes(parts)
    lists = layout.stage1 / "document2entities.json"
    if lists.is_file() or layout.texts:
        entities_of = read_json_object(lists) if lists.is_file() else {}
        if not lists.is_file():
            report.notes.append(f"no {lists.name}: no document is linked to an entity")
        texts = read_json_object(layout.texts) if layout.texts else None
        parts.documents = from_lists(entities_of, texts, parts.entities, report, str(lists), rename)
    report.finish(strict)
    return parts


def _note_quotes(parts: GraphParts) -> None:
    """Names like `"A"` are letters in v1's format; whoever wrote them as CSV quotes should know."""
    in_quotes = pc.match_substring_regex(parts.entities.array, '^".*"$')
    count = pc.sum(in_quotes).as_py() or 0
    if count:
        name = parts.entities[in_quotes.index(True).as_py()]
        parts.report.notes.append(
            f"{count:,} entity names stand in quotes (first: {name}); in this format the quotes are part of the name"
        )


def write_v1(root: Path, parts: GraphParts) -> list[str]:
    """Writes the v1 layout, each file atomically.

    Returns:
        What the format cannot hold, one sentence each.
    """
    stage1 = root / "processed" / "stage1"
    losses = []
    with atomic_file(stage1 / "kg.txt") as file:
        marked = write_kg_text(file, parts.entities, parts.relations, parts.head, parts.relation, parts.tail)
    if marked:
        losses.append("GFM-RAG v1 cannot read the lines with quotes (a name holds a comma or a line break)")
    used = np.zeros(len(parts.entities), bool)
    used[parts.head] = used[parts.tail] = True
    if not used.all():
        losses.append(f"kg.txt cannot hold the {int((~used).sum()):,} entities without a triple")
    if len(np.unique(parts.relation)) < len(parts.relations):
        losses.append("kg.txt cannot hold relations without a triple")
    atomic_write_json(stage1 / "document2entities.json", entity_lists(parts))
    write_texts(root / "raw" / "dataset_corpus.json", parts.documents)
    return losses


def entity_lists(parts: GraphParts) -> Mapping[str, list[str]]:
    """`{document: [entity, ...]}`."""
    documents = parts.documents
    names = parts.entities.array.take(documents.entities).to_pylist()
    bounds = zip(documents.ptr[:-1].tolist(), documents.ptr[1:].tolist(), strict=True)
    return {name: names[a:b] for name, (a, b) in zip(documents.names, bounds, strict=True)}


def write_texts(path: Path, documents: Documents) -> None:
    """Writes `{document: text}`, if there are texts."""
    if documents.texts is not None:
        pairs: Iterator[tuple[str, Any]] = zip(documents.names, documents.texts.to_pylist(), strict=True)
        atomic_write_json(path, {name: text for name, text in pairs if text is not None})
