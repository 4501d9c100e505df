"""Graphs on disk for the tests of the graph room, and the real data where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ragkit.graph import KnowledgeGraph

SHARED = Path(os.environ.get("RAGKIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))

TRIPLES = [
    ("lima", "capital of", "peru"),
    ("peru", "borders", "chile"),
    ("lima", "on", "pacific"),
    ("lima", "capital of", "peru"),
    ("chile", "borders", "peru"),
]
DOCUMENTS = {"Peru": ["peru", "lima", "chile"], "Chile": ["chile", "peru"], "Atlantis": []}
TEXTS = {"Peru": "Lima is the capital of Peru.", "Chile": "Chile borders Peru.", "Atlantis": "It sank."}


@pytest.fixture
def ingredients():
    """What `graph` is made of: triples, documents, texts."""
    return TRIPLES, DOCUMENTS, TEXTS


@pytest.fixture
def graph() -> KnowledgeGraph:
    """Four entities, three relations, five triples (one twice), three documents (one without an entity)."""
    return KnowledgeGraph.from_triples(TRIPLES, DOCUMENTS, TEXTS)


@pytest.fixture
def write_v1(tmp_path):
    """write_v1(kg, documents=None, texts=None): a data set in v1's layout from the bytes or text of its kg.txt."""

    def write(kg: str | bytes, documents: object = None, texts: object = None) -> Path:
        root = tmp_path / "set"
        stage1 = root / "processed" / "stage1"
        stage1.mkdir(parents=True, exist_ok=True)
        (stage1 / "kg.txt").write_bytes(kg if isinstance(kg, bytes) else kg.encode())
        if documents is not None:
            (stage1 / "document2entities.json").write_text(json.dumps(documents), encoding="utf-8")
        if texts is not None:
            (root / "raw").mkdir(exist_ok=True)
            (root / "raw" / "dataset_corpus.json").write_text(json.dumps(texts), encoding="utf-8")
        return root

    return write


@pytest.fixture(
    params=["musique_mini", "musique_plus", "hotpot_mini", "wiki2_mini", "codex_s", "fb15k237_vt"], scope="session"
)
def real_set(request) -> Path:
    """The folder of each real data set."""
    return real_folder(request.param)


def real_folder(name: str) -> Path:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set RAGKIT_SHARED")
    return folder


@pytest.fixture(scope="session")
def wiki2() -> Path:
    return real_folder("wiki2_mini")
