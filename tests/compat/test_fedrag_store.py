"""The contract of FedRAG's knowledge stores, and the cases in which FedRAG's own break."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ragkit.compat.fedrag import InMemoryKnowledgeStore, KnowledgeNode, NodeType, QdrantKnowledgeStore, SourceNode
from ragkit.rag.store import StoreError
from ragkit.settings import ConfigError


def node(name, embedding, **fields):
    return KnowledgeNode(
        node_id=name, embedding=embedding, node_type=NodeType.TEXT, text_content=f"text of {name}", **fields
    )


@pytest.fixture
def nodes():
    return [
        node("a", [2.0, 0.0], metadata={"title": "A", "n": 1}),
        node("b", [0.0, 3.0]),
        node("c", [1.0, 1.0]),
    ]


@pytest.fixture(params=["memory", "qdrant"])
def store(request, nodes):
    if request.param == "qdrant":
        pytest.importorskip("qdrant_client")
        store = QdrantKnowledgeStore(collection_name="test", in_memory=True)
        store.load_nodes(nodes)
        return store
    return InMemoryKnowledgeStore.from_nodes(nodes)


def test_retrieve_gives_cosines_and_nodes(store):
    found = store.retrieve([1.0, 0.0], top_k=2)
    assert [(round(score, 4), found.node_id) for score, found in found] == [(1.0, "a"), (round(0.5**0.5, 4), "c")]
    first = found[0][1]
    assert first.text_content == "text of a" and first.metadata == {"title": "A", "n": 1}
    assert first.embedding == pytest.approx([1.0, 0.0]) and first.node_type is NodeType.TEXT
    assert len(store.retrieve([1.0, 0.0], top_k=10)) == 3  # all where there are fewer
    batch = store.batch_retrieve([[1.0, 0.0], [0.0, 1.0]], top_k=1)
    assert [[found.node_id for _, found in row] for row in batch] == [["a"], ["b"]]


def test_load_delete_clear_count(store, nodes):
    assert store.count == 3
    store.load_node(node("d", [-1.0, 0.0]))
    assert store.count == 4
    assert store.delete_node("b") is True and store.delete_node("b") is False
    assert store.count == 3 and "b" not in [found.node_id for _, found in store.retrieve([0.0, 1.0], top_k=9)]
    store.load_node(node("a", [0.0, 5.0]))  # a node loaded again takes the place of the first
    assert store.count == 3 and store.retrieve([0.0, 1.0], top_k=1)[0][1].node_id == "a"
    store.clear()
    assert store.count == 0 and store.retrieve([1.0, 0.0], top_k=2) == []
    store.load_nodes([node("e", [1.0, 0.0, 0.0])])  # an empty store takes any size again
    assert store.retrieve([1.0, 0.0, 0.0], top_k=2)[0][1].node_id == "e"


def test_adding_after_a_search_is_searched(store):
    store.retrieve([1.0, 0.0])
    store.load_node(node("d", [5.0, 0.1]))
    assert [found.node_id for _, found in store.retrieve([5.0, 0.1], top_k=1)] == ["d"]


def test_persist_overwrite_and_load(tmp_path, nodes):
    store = InMemoryKnowledgeStore.from_nodes(nodes, name="flowers", cache_dir=str(tmp_path))
    store.persist()
    store.delete_node("a")
    store.persist()  # over the first
    again = InMemoryKnowledgeStore(name="flowers", cache_dir=tmp_path)
    again.load()
    assert again.count == 2 and again.retrieve([0.0, 1.0], 1)[0][1].node_id == "b"
    again.load()  # twice the same nodes are the same nodes
    assert again.count == 2
    again.load_nodes(nodes)
    assert again.retrieve([1.0, 0.0], 1)[0][1].metadata == {"title": "A", "n": 1}


def test_an_empty_store_persists_and_loads(tmp_path):
    InMemoryKnowledgeStore(cache_dir=tmp_path).persist()
    again = InMemoryKnowledgeStore(cache_dir=tmp_path)
    again.load()
    assert again.count == 0 and again.retrieve([1.0], 1) == []


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(StoreError, match="the knowledge store 'nowhere' was not found: there is no folder .*nowhere"):
        InMemoryKnowledgeStore(name="nowhere", cache_dir=tmp_path).load()
    with pytest.raises(StoreError, match="name: found '../up'"):
        InMemoryKnowledgeStore(name="../up")


def test_a_file_of_fedrag_is_read(tmp_path, nodes):
    """Its layout: one row a node, the metadata as JSON text or null."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "node_id": found.node_id,
            "embedding": found.embedding,
            "node_type": "text",
            "text_content": found.text_content,
            "image_content": None,
            "metadata": json.dumps(found.metadata) if found.metadata else None,
        }
        for found in nodes
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "default.parquet")
    store = InMemoryKnowledgeStore(cache_dir=tmp_path)
    store.load()
    assert store.count == 3 and store.retrieve([1.0, 0.0], 1)[0][1].metadata == {"title": "A", "n": 1}
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(StoreError, match=r"broken.parquet: not a parquet file"):
        InMemoryKnowledgeStore(name="broken", cache_dir=tmp_path).load()


def test_bad_nodes_add_nothing(store):
    for bad, message in [
        ([node("x", [1.0, 0.0]), node("y", None)], "the node 'y' has no embedding"),
        ([node("x", [1.0, 0.0]), node("y", [1.0])], "'y' has an embedding of size 1, the node 'x' one of size 2"),
        ([node("x", [1.0, 0.0, 0.0])], "embeddings have size 3, the store holds size 2"),
        ([node("x", [1.0, 0.0]), node("x", [0.0, 1.0])], "the id 'x' is twice"),
    ]:
        with pytest.raises(StoreError, match=message):
            store.load_nodes(bad)
    with pytest.raises(TypeError, match="expected KnowledgeNodes, found dict"):
        store.load_nodes([{"node_id": "x"}])
    assert store.count == 3


def test_nodes_take_arrays_and_say_what_they_cannot_hold():
    assert node("a", torch.tensor([1.0, 2.0])).embedding == [1.0, 2.0]
    assert node("a", np.array([[1.0, 2.0]])).embedding == [1.0, 2.0]  # a batch of one
    first, second = (KnowledgeNode(node_type="text", text_content="t") for _ in range(2))
    assert first.node_id != second.node_id and first.get_content() == {"text_content": "t", "image_content": None}
    assert KnowledgeNode(text_content="t", metadata='{"a": 1}').metadata == {"a": 1}
    assert "embedding" not in first.model_dump_without_embeddings()
    with pytest.raises(ConfigError, match="text_content, which a node of NodeType.TEXT needs"):
        KnowledgeNode(node_type=NodeType.TEXT)
    with pytest.raises(ConfigError, match="found a node of type 'image'"):
        KnowledgeNode(node_type=NodeType.IMAGE, image_content=b"x")
    with pytest.raises(ConfigError, match=r'unknown key "text" .*valid keys: .*text_content'):
        KnowledgeNode(text="t")


def test_source_nodes_answer_for_their_node():
    import copy

    source = SourceNode(0.5, node("a", [1.0], metadata={"k": 1}))
    assert source.node_id == "a" and source.metadata == {"k": 1} and source.get_content()["text_content"]
    assert copy.deepcopy(source) == source
    with pytest.raises(AttributeError, match="nothing"):
        source.nothing  # noqa: B018


def test_unknown_arguments_and_what_qdrant_does_not_need(tmp_path):
    with pytest.raises(TypeError, match="unknown argument 'cachedir' .*did you mean 'cache_dir'"):
        InMemoryKnowledgeStore(cachedir=tmp_path)
    pytest.importorskip("qdrant_client")
    with pytest.raises(TypeError, match="only Cosine is supported"):
        QdrantKnowledgeStore(collection_name="x", in_memory=True, collection_distance="Dot")
    store = QdrantKnowledgeStore(collection_name="x", in_memory=True, collection_distance="Cosine")
    for call in (store.persist, store.load):
        with pytest.raises(StoreError, match="Qdrant"):
            call()
