"""A `GFMRetriever` on disk: one folder, whose every file is checked before it is read."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ragkit.files import atomic_dir
from ragkit.gfm.checkpoint import load_gfm, save_gfm
from ragkit.gfm.entity_search import EntitySearch
from ragkit.gfm.fact_search import FactLinker, FactSearch
from ragkit.graph import KnowledgeGraph
from ragkit.graph.link import EntityLinker
from ragkit.rag.corpus import load_corpus
from ragkit.rag.encoder import Encoder
from ragkit.rag.retriever import DenseRetriever

FORMAT = {"format": "ragkit.gfm_retriever", "version": 1}
HEAD = "retriever.json"
SETTINGS = ("ranker", "ranker_options", "batch_size", "init_entities_weight", "score_ranker")
LINKER = ("threshold", "fallback", "common")


def write_retriever(retriever: Any, directory: str | Path) -> Path:
    """Writes a `GFMRetriever`; the folder appears whole or not at all.

    model/ (`save_gfm`), graph/ (a data set in format v2, which keeps all ids), tensors.safetensors (embeddings of the
    relations, and of the entity names if there are any), passages.jsonl (if they are not the graph's own), encoder/,
    fallback/, and retriever.json with the settings and the size and checksum of each file.
    """
    encoder, fallback = retriever.encoder, retriever.fallback
    with atomic_dir(directory) as folder:
        head: dict[str, Any] = {
            **FORMAT,
            "settings": {name: getattr(retriever, name) for name in SETTINGS},
            "fingerprint": retriever.graph.fingerprint,
            "passages": len(retriever.store),
            "linker": _linker_settings(retriever.linker),
            "encoder": encoder.save(folder / "encoder") if isinstance(encoder, Encoder) else None,
            "max_tokens": encoder.model.max_seq_length if isinstance(encoder, Encoder) else None,
            "kinds": {name: type(getattr(retriever, name)).__name__ for name in ("encoder", "linker", "fallback")},
        }
        named = isinstance(encoder, Encoder) and encoder.source is not None
        save_gfm(retriever.model, folder / "model", encoder if named else None)
        retriever.graph.save(folder / "graph", format="v2")
        tensors = {"rel_emb": retriever.graph.rel_emb.detach().cpu().contiguous()}
        search = getattr(getattr(retriever.linker, "linker", retriever.linker), "nearest", None)
        if head["linker"] is not None and search is not None and search.ready:
            tensors["entity_embeddings"] = search.embeddings
        save_file(tensors, folder / "tensors.safetensors")
        if not retriever.store.own:
            with open(folder / "passages.jsonl", "w", encoding="utf-8", newline="\n") as file:
                for p in retriever.store.passages():
                    row = {"id": p.id, "title": p.title, "text": p.text, "metadata": p.metadata}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if isinstance(fallback, DenseRetriever):
            fallback.save(folder / "fallback")
        head["files"] = {
            path.relative_to(folder).as_posix(): _state(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        (folder / HEAD).write_text(json.dumps(head, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Path(directory)


def read_retriever(
    directory: str | Path,
    given: dict[str, Any],
    device: torch.device,
    cache: bool | str | Path,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The arguments of the `GFMRetriever` that was saved.

    Args:
        directory: The folder.
        given: encoder, linker and fallback in place of the saved ones, or None.
        device: Where model and encoder go.
        cache: For the linker.
        trust_remote_code: As in `Encoder`.

    Raises:
        ValueError: A file is missing, cut short or altered (it is named), or a part is needed that is not in it.
    """
    folder = Path(directory)
    head = _read_head(folder)
    for name, what in (("encoder", "Encoder"), ("linker", "EntityLinker"), ("fallback", "DenseRetriever")):
        saved = head[name] is not None if name != "fallback" else head["kinds"][name] in ("DenseRetriever", "NoneType")
        if given[name] is None and not saved:
            raise ValueError(
                f"{folder}: its {name} was a {head['kinds'][name]}, and only a {what} of ragkit is saved; "
                f"load it with GFMRetriever.load({str(directory)!r}, {name}=...)"
            )
    for name, state in head["files"].items():
        _check_file(folder / name, state)
    model = load_gfm(folder / "model", kind="retriever", device=device)
    graph = KnowledgeGraph.load(folder / "graph")
    if graph.fingerprint != head["fingerprint"]:
        raise ValueError(f"{folder / 'graph'}: it is not read as the graph that was saved; save the retriever anew")
    tensors = load_file(folder / "tensors.safetensors")
    graph.rel_emb = tensors["rel_emb"]
    encoder = given["encoder"]
    if encoder is None:
        options = {"device": device, "max_tokens": head["max_tokens"], "trust_remote_code": trust_remote_code}
        encoder = Encoder.load(folder / "encoder", head["encoder"], **options)
    linker, fallback = given["linker"], given["fallback"]
    if linker is None:
        linker = _make_linker(head["linker"], graph, encoder, cache, tensors.get("entity_embeddings"))
    if fallback is None and head["kinds"]["fallback"] == "DenseRetriever":
        fallback = DenseRetriever.load(folder / "fallback", device=device, trust_remote_code=trust_remote_code)
    return {
        "model": model,
        "graph": graph,
        "encoder": encoder,
        "passages": load_corpus(folder / "passages.jsonl") if (folder / "passages.jsonl").is_file() else None,
        "linker": linker,
        "fallback": fallback,
        "cache": cache,
        **head["settings"],
    }


def _linker_settings(linker: Any) -> dict[str, Any] | None:
    """What makes an `EntityLinker` again, or a `FactLinker` over one; None for any other linker."""
    if type(linker) is FactLinker:
        inner = _linker_settings(linker.linker)
        return None if inner is None else {**inner, "top_facts": linker.top_facts}
    if type(linker) is not EntityLinker or not (linker.nearest is None or isinstance(linker.nearest, EntitySearch)):
        return None
    settings = {name: getattr(linker, name) for name in LINKER}
    return {**settings, "stop_words": sorted(linker.stop_words), "embedding": linker.nearest is not None}


def _make_linker(settings: dict[str, Any], graph: Any, encoder: Any, cache: Any, embeddings: Any) -> Any:
    settings = {**settings, "stop_words": frozenset(settings["stop_words"])}
    top_facts = settings.pop("top_facts", None)
    search = EntitySearch(graph, encoder, cache, embeddings) if settings.pop("embedding") else None
    linker = EntityLinker(graph, search, **settings)
    return linker if top_facts is None else FactLinker(linker, FactSearch(graph, encoder, cache), top_facts)


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / HEAD
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; it is no saved GFMRetriever, or was cut off while copied") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cut short or damaged ({error})") from error
    if not isinstance(head, dict) or {name: head.get(name) for name in FORMAT} != FORMAT:
        found = {name: head.get(name) for name in FORMAT} if isinstance(head, dict) else type(head).__name__
        raise ValueError(f"{path}: expected {FORMAT}, found {found}")
    return head


def _state(path: Path) -> list[int]:
    """[bytes, checksum] of a file."""
    checksum = size = 0
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return [size, checksum]


def _check_file(path: Path, state: list[int]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing; the folder was cut off while it was copied")
    size, checksum = _state(path)
    if size != state[0]:
        raise ValueError(f"{path}: has {size:,} bytes, expected {state[0]:,}: it is cut short or altered")
    if checksum != state[1]:
        raise ValueError(f"{path}: its content has changed since it was saved")
