"""The contract of a knowledge store, the same for both stores; a real embedded Qdrant."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ragkit.rag import topk
from ragkit.rag.corpus import Passage
from ragkit.rag.qdrant import QdrantStore
from ragkit.rag.store import KnowledgeStore, MemoryStore, StoreError


@pytest.fixture(params=["memory", "qdrant"])
def store(request, tmp_path):
    if request.param == "memory":
        yield MemoryStore()
        return
    store = QdrantStore(path=tmp_path / "qdrant")
    yield store
    store.close()


def passages(n, start=0):
    return [Passage(f"p{i}", f"text {i}", f"title {i}", {"i": i}) for i in range(start, start + n)]


def vectors(n, dim=8, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def ids(results):
    return [[passage.id for passage in row] for row in results]


def test_both_stores_fulfil_the_protocol(store):
    assert isinstance(store, KnowledgeStore)


def test_search_is_by_cosine(store):
    rows, queries = vectors(50), vectors(7, seed=1)
    store.add(passages(50), rows)
    cosine = normalize(queries, dim=1) @ normalize(rows, dim=1).T
    scores, index = cosine.topk(5, dim=1)
    results = store.search(queries, 5)
    assert ids(results) == [[f"p{i}" for i in row] for row in index.tolist()]
    assert torch.allclose(torch.tensor([[p.score for p in row] for row in results]), scores, atol=1e-5)
    first = results[0][0]
    assert (first.text, first.title) == (f"text {index[0, 0]}", f"title {index[0, 0]}")
    assert first.metadata == {"i": int(index[0, 0])}


def test_a_batch_gives_what_single_queries_give(store):
    store.add(passages(30), vectors(30))
    queries = vectors(4, seed=2)
    assert store.search(queries, 3) == [store.search(query.unsqueeze(0), 3)[0] for query in queries]


def test_top_k_above_the_size_gives_everything(store):
    store.add(passages(3), vectors(3))
    assert sorted(ids(store.search(vectors(1, seed=3), 10))[0]) == ["p0", "p1", "p2"]


def test_equal_scores_come_in_the_order_of_adding(store):
    store.add([Passage(name, name) for name in "zmax"], torch.ones(4, 8))
    store.add(passages(1), -torch.ones(1, 8))
    store.add([Passage("b", "b")], torch.ones(1, 8))
    assert ids(store.search(torch.ones(1, 8), 6))[0] == ["z", "m", "a", "x", "b", "p0"]
    assert ids(store.search(torch.ones(1, 8), 3))[0] == ["z", "m", "a"]


def test_an_empty_store(store):
    assert len(store) == 0 and store.dim is None
    assert store.search(vectors(2), 3) == [[], []]
    assert list(store.passages()) == []
    assert store.delete(["p0"]) == 0 and "p0" not in store
    store.add([], torch.empty(0, 8))
    assert len(store) == 0


def test_append_after_a_search(store):
    store.add(passages(2), vectors(2))
    store.search(vectors(1), 1)
    store.add(passages(2, start=2), vectors(4)[2:])
    assert len(store) == 4 and [passage.id for passage in store.passages()] == ["p0", "p1", "p2", "p3"]
    assert ids(store.search(vectors(4)[3:], 1)) == [["p3"]]


def test_embeddings_come_back_normalised_in_the_order_asked_for(store):
    rows = vectors(4)
    store.add(passages(4), rows)
    assert torch.allclose(store.embeddings(["p2", "p0", "p2"]), normalize(rows[[2, 0, 2]], dim=1), atol=1e-6)
    assert store.get(["p3", "p1"]) == [passages(4)[3], passages(4)[1]]
    assert store.embeddings(["p0"]).dtype == torch.float32 and "p0" in store and "p9" not in store


def test_update_replaces_in_place(store):
    store.add(passages(3), vectors(3))
    store.update([Passage("p1", "new text")], vectors(1, seed=5))
    assert [passage.text for passage in store.passages()] == ["text 0", "new text", "text 2"]
    assert ids(store.search(vectors(1, seed=5), 1)) == [["p1"]] and len(store) == 3


def test_delete_keeps_the_order_of_the_others(store):
    rows = vectors(5)
    store.add(passages(5), rows)
    assert store.delete(["p1", "p3", "unknown", "p1"]) == 2
    assert [passage.id for passage in store.passages()] == ["p0", "p2", "p4"]
    assert ids(store.search(rows[3:4], 9))[0].count("p3") == 0
    assert torch.allclose(store.embeddings(["p4"]), normalize(rows[4:], dim=1), atol=1e-6)
    store.add(passages(1, start=3), rows[3:4])
    assert ids(store.search(rows[3:4], 1)) == [["p3"]]


def test_delete_everything_then_add(store):
    store.add(passages(2), vectors(2))
    assert store.delete(["p0", "p1"]) == 2 and len(store) == 0
    assert store.search(vectors(1), 1) == [[]]
    store.add(passages(2), vectors(2))
    assert len(store) == 2


def test_retrieve_after_clear(store):
    store.add(passages(3), vectors(3))
    store.clear()
    assert len(store) == 0 and store.dim is None
    assert store.search(vectors(1), 2) == [[]]
    store.add(passages(2), vectors(2, dim=5))  # as new: another size is fine
    assert store.dim == 5 and len(store.search(vectors(1, dim=5), 2)[0]) == 2


@pytest.mark.parametrize("full", [False, True])
def test_save_and_load_in_either_store(store, tmp_path, full):
    if full:
        store.add(passages(20), vectors(20))
        store.delete(["p7"])
    store.save(tmp_path / "saved")
    for other in (MemoryStore.load(tmp_path / "saved"), QdrantStore.load(tmp_path / "saved", path=":memory:")):
        assert list(other.passages()) == list(store.passages()) and other.dim == store.dim
        if full:
            query = vectors(3, seed=9)
            assert ids(other.search(query, 5)) == ids(store.search(query, 5))
    store.save(tmp_path / "saved")  # over the old one
    assert len(MemoryStore.load(tmp_path / "saved")) == len(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.add(passages(1, start=9), vectors(1, dim=7)), "have size 7, the store holds size 8"),
        (lambda s: s.add(passages(2, start=9), vectors(1)), r"expected embeddings \[2, D\].*found \[1, 8\]"),
        (lambda s: s.add(passages(1, start=9), vectors(1)[0]), r"found \[8\]"),
        (lambda s: s.add(passages(2, start=1), vectors(2)), "the id 'p1' is in the store already; use update"),
        (lambda s: s.add([Passage("n", "x")] * 2, vectors(2)), "the id 'n' is twice among the new passages"),
        (lambda s: s.add(passages(1, start=9), vectors(1) / 0), "embedding of the passage 'p9' is not finite"),
        (lambda s: s.update(passages(2, start=1), vectors(2)), r"no passage has the id 'p2' \(the store holds 2\)"),
        (lambda s: s.get(["p0", "nope"]), "no passage has the id 'nope'"),
        (lambda s: s.embeddings(["nope"]), "no passage has the id 'nope'"),
        (lambda s: s.search(vectors(1, dim=7), 1), r"expected queries \[B, 8\], found \[1, 7\]"),
        (lambda s: s.search(vectors(1), 0), "top_k must be at least 1"),
    ],
)
def test_errors_change_nothing(store, change, message):
    store.add(passages(2), vectors(2))
    with pytest.raises(StoreError, match=message):
        change(store)
    assert list(store.passages()) == passages(2)
    assert torch.allclose(store.embeddings(["p0", "p1"]), normalize(vectors(2), dim=1), atol=1e-6)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "store.json").unlink(), "not a saved store, or it was cut off while written: no store.json"),
        (lambda d: (d / "passages.jsonl").unlink(), "passages.jsonl: missing or corrupt"),
        (lambda d: (d / "embeddings.safetensors").unlink(), "embeddings.safetensors: missing or corrupt"),
        (lambda d: _cut(d / "embeddings.safetensors"), "embeddings.safetensors: missing or corrupt"),
        (lambda d: _cut(d / "passages.jsonl"), "passages.jsonl, line 3: not a passage"),
        (lambda d: _cut(d / "store.json"), "store.json: corrupt"),
        (lambda d: (d / "store.json").write_text('{"format": 99}'), "store.json: expected format 1"),
        (
            lambda d: (d / "store.json").write_text('{"format": 1, "passages": 2, "dim": 8}'),
            "passages.jsonl: holds 3 passages, store.json says 2",
        ),
        (
            lambda d: (d / "store.json").write_text('{"format": 1, "passages": 3, "dim": 9}'),
            "embeddings of size 8, store.json says 9",
        ),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, damage, message):
    store = MemoryStore()
    store.add(passages(3), vectors(3))
    store.save(tmp_path / "s")
    damage(tmp_path / "s")
    for load in (MemoryStore.load, QdrantStore.load):
        with pytest.raises(StoreError, match=message) as caught:
            load(tmp_path / "s")
        assert str(tmp_path / "s") in str(caught.value)


def test_a_failed_save_leaves_the_old_one(tmp_path):
    store = MemoryStore()
    store.add(passages(2), vectors(2))
    store.save(tmp_path / "s")
    store.add([Passage("bad", "x", metadata={"set": {1}})], vectors(1))  # JSON cannot hold a set
    with pytest.raises(TypeError):
        store.save(tmp_path / "s")
    assert len(MemoryStore.load(tmp_path / "s")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_memory_appends_in_a_doubling_buffer():
    store, copies = MemoryStore(), 0
    pointer = None
    for i in range(300):
        store.add(passages(1, start=i), vectors(1, seed=i))
        copies += store._matrix.data_ptr() != pointer
        pointer = store._matrix.data_ptr()
    assert copies <= 10  # 1, 2, 4, ... 512


def test_the_declared_size_is_checked_from_the_first_passage_on():
    for store in (MemoryStore(dim=8), QdrantStore(path=":memory:", dim=8)):
        assert store.dim == 8
        with pytest.raises(StoreError, match="have size 7, the store holds size 8"):
            store.add(passages(1), vectors(1, dim=7))
        store.add(passages(1), vectors(1))


def test_qdrant_on_disk_is_found_again_and_locked_meanwhile(tmp_path):
    first = QdrantStore(path=tmp_path / "q")
    first.add([Passage("any / id — ünïcode", "text")], vectors(1))
    with pytest.raises(StoreError, match="cannot be opened"):
        QdrantStore(path=tmp_path / "q")
    first.close()
    second = QdrantStore(path=tmp_path / "q")
    second.add([Passage("later", "text")], vectors(1))
    assert [passage.id for passage in second.passages()] == ["any / id — ünïcode", "later"] and second.dim == 8
    second.close()


def test_qdrant_refuses_a_foreign_collection_and_a_filled_one(tmp_path):
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(tmp_path / "q"))
    client.create_collection("ragkit", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT))
    client.close()
    with pytest.raises(StoreError, match="was not made by ragkit"):
        QdrantStore(path=tmp_path / "q")
    store = QdrantStore(path=tmp_path / "q", collection="mine")
    store.add(passages(1), vectors(1))
    store.save(tmp_path / "s")
    store.close()
    with pytest.raises(StoreError, match="holds passages already"):
        QdrantStore.load(tmp_path / "s", path=tmp_path / "q", collection="mine")
    with pytest.raises(StoreError, match="not both"):
        QdrantStore(path="a", url="http://localhost")


@settings(deadline=None, max_examples=60)
@given(
    b=st.integers(1, 9),
    n=st.integers(1, 300),
    k=st.integers(1, 20),
    few=st.booleans(),
    sizes=st.sampled_from([(3, 7, 2), (4, 64, 4), (2, 1000, 8), (100, 100, 64)]),
    seed=st.integers(0, 999),
)
def test_top_k_rows_is_a_stable_sort(b, n, k, few, sizes, seed):
    """Against a stable sort of all scores; small whole numbers make the scores exact and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if few else 50
    queries = torch.randint(-high, high, (b, 3), generator=generator).float()
    rows = torch.randint(-high, high, (n, 3), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("QUERY_CHUNK", "ROW_CHUNK", "BLOCK"), sizes, strict=True):
            patch.setattr(topk, name, size)
        scores, index = topk.top_k_rows(queries, rows, k)
    expected, order = (queries @ rows.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, order[:, :k]) and torch.equal(scores, expected[:, :k])


def test_store_json_is_small_and_readable(tmp_path):
    store = MemoryStore()
    store.add(passages(3), vectors(3))
    store.save(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "store.json").read_text()) == {"format": 1, "passages": 3, "dim": 8}
