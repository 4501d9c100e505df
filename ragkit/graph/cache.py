"""A parsed copy of a graph beside its files, with the layout for the kernels.

The folder's name is the hash of the files' content and of what shapes the result, so an edited file never meets an old
copy. `meta.json` has the size and the checksum of each file: a copy that is cut short, altered or not ours is not used
but made anew. Nothing in it can run code: Arrow, safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from ragkit_kernels.relational_conv import layout as graph_layout
from ragkit_kernels.relational_conv.layout import GraphLayout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ragkit import small_world
from ragkit.files import atomic_dir
from ragkit.graph.formats import Layout
from ragkit.graph.names import Names
from ragkit.graph.parts import Documents, GraphParts
from ragkit.graph.report import LoadReport, SkippedRow

VERSION = 1  # raise it whenever the same files give another result
ARRAYS = ("head", "relation", "tail")
NAMES = ("entities", "relations", "documents")
Cached = tuple[GraphParts, GraphLayout, str]


def cache_key(layout: Layout, v1_names: bool) -> str:
    """Hash of the content of the graph's files and the options; about a second for a gigabyte."""
    state = hashlib.blake2b(digest_size=16)
    options = [VERSION, graph_layout.UNIT_EDGES, layout.format, v1_names, [path.name for path in layout.files]]
    state.update(json.dumps(options).encode())
    for path in layout.files:
        state.update(path.stat().st_size.to_bytes(8, "little"))
        for block in _blocks(path):
            state.update(block)
    return state.hexdigest()


def places(layout: Layout, key: str) -> list[Path]:
    """Where the copy may be: in the data set, or in the user's cache folder."""
    outside = user_cache() / "graphs" / f"ragkit-{key}"
    if layout.root == small_world.path():  # part of the installed library
        return [outside]
    inside = layout.root / "processed" / "stage2" if layout.root != layout.stage1 else layout.root
    return [inside / f"ragkit-{key}", outside]


def user_cache() -> Path:
    """The folder for what can be made again: $RAGKIT_CACHE, or the system's place for caches."""
    if os.environ.get("RAGKIT_CACHE"):
        return Path(os.environ["RAGKIT_CACHE"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ragkit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ragkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ragkit"


def write_cache(layout: Layout, key: str, parts: GraphParts, graph: GraphLayout, fingerprint: str) -> Path | None:
    """Writes the copy atomically, to the first place that can be written; warns and goes on where none can."""
    errors = []
    for folder in places(layout, key):
        try:
            with atomic_dir(folder) as temporary:
                _write(temporary, key, parts, graph, fingerprint)
            return folder
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            errors.append(f"{folder.parent}: {getattr(error, 'strerror', None) or error}")
    warnings.warn(f"the graph could not be cached ({'; '.join(errors)}); the next load reads the files", stacklevel=3)
    return None


def _write(folder: Path, key: str, parts: GraphParts, graph: GraphLayout, fingerprint: str) -> None:
    documents = parts.documents
    columns = {
        "entities": parts.entities.array,
        "relations": parts.relations.array,
        "documents": documents.names.array,
    }
    if documents.texts is not None:
        columns["texts"] = documents.texts
    for name, array in columns.items():
        table = pa.record_batch([array], [name])
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_batch(table)
    arrays = {name: torch.from_numpy(getattr(parts, name)) for name in ARRAYS}
    arrays["document_ptr"] = torch.from_numpy(documents.ptr)
    arrays["document_entities"] = torch.from_numpy(documents.entities)
    save_file(arrays, folder / "arrays.safetensors")
    save_file({name: value.contiguous() for name, value in graph.tensors().items()}, folder / "layout.safetensors")
    files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
    report = asdict(parts.report)
    meta = {"version": VERSION, "key": key, "files": files, "fingerprint": fingerprint, "report": report}
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")


def read_cache(layout: Layout, key: str) -> Cached | None:
    """The copy, or None where there is none that is whole and ours."""
    for folder in places(layout, key):
        if (folder / "meta.json").is_file():
            try:
                return _read(folder, key)
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, SafetensorError) as error:
                warnings.warn(f"{folder} cannot be used ({error}); the files are read again", stacklevel=3)
    return None


def _read(folder: Path, key: str) -> Cached:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["version"] != VERSION or meta["key"] != key:
        raise ValueError("it is of another graph or version")
    for name, (size, checksum) in meta["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{name} is cut short or missing")
        if _checksum(path) != checksum:
            raise ValueError(f"{name} has changed")
    columns = {name: _column(folder, name) for name in NAMES}
    arrays = {name: tensor.numpy() for name, tensor in load_file(folder / "arrays.safetensors").items()}
    texts = _column(folder, "texts") if "texts.arrow" in meta["files"] else None
    names = {name: Names.trusted(columns[name], what) for name, what in zip(NAMES, WHAT, strict=True)}
    report = LoadReport(**meta["report"])
    report.skipped = [SkippedRow(**row) for row in meta["report"]["skipped"]]
    report.unknown_examples = [(document, name) for document, name in meta["report"]["unknown_examples"]]
    report.cached = True
    parts = GraphParts(
        names["entities"],
        names["relations"],
        arrays["head"],
        arrays["relation"],
        arrays["tail"],
        Documents(names["documents"], arrays["document_ptr"], arrays["document_entities"], texts),
        report,
    )
    tensors = load_file(folder / "layout.safetensors")
    graph = GraphLayout.from_tensors(tensors, len(parts.entities), 2 * len(parts.relations))
    return parts, graph, str(meta["fingerprint"])


WHAT = ("entity", "relation", "document")


def _column(folder: Path, name: str) -> pa.Array:
    """A memory-mapped column: millions of names cost neither time nor memory before they are used."""
    table = pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))).read_all()
    column = table.column(0)
    if table.column_names != [name] or column.type != pa.large_string():
        raise ValueError(f"{name}.arrow holds {table.schema}")
    return column.chunk(0) if column.num_chunks else pa.array([], pa.large_string())


def _checksum(path: Path) -> int:
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            yield block
