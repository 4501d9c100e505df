from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
import torch

from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.cache import user_cache

KG = "lima,capital of,peru\nperu,borders,chile\nbad line\n"
DOCUMENTS = {"Peru": ["peru", "lima"], "Chile": ["chile", "nowhere"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "user_cache"))


@pytest.fixture
def root(write_v1):
    return write_v1(KG, DOCUMENTS, {"Peru": "p"})


def copies(root):
    return sorted((root / "processed" / "stage2").glob("ragkit-*"))


def assert_same(one: KnowledgeGraph, two: KnowledgeGraph) -> None:
    assert one.fingerprint == two.fingerprint
    assert list(one.entities) == list(two.entities) and list(one.documents) == list(two.documents)
    assert one.texts == two.texts and torch.equal(one.edge_index, two.edge_index)
    assert (one.document_ptr == two.document_ptr).all() and (one.document_entities == two.document_entities).all()
    for name, value in one.layout.tensors().items():
        assert torch.equal(value, two.layout.tensors()[name]), name


def test_the_second_load_is_the_first_ones_copy(root, capsys):
    plain = KnowledgeGraph.load(root)
    first = KnowledgeGraph.load(root, cache=True)
    capsys.readouterr()
    second = KnowledgeGraph.load(root, cache=True)
    assert (first.report.cached, second.report.cached) == (False, True) and len(copies(root)) == 1
    assert_same(plain, first)
    assert_same(plain, second)
    assert second.report.skipped == first.report.skipped and str(second.report.skipped[0]).startswith("line 3")
    assert second.report.unknown_examples == [("Chile", "nowhere")]
    assert "1 of 3 rows not used" in capsys.readouterr().out  # a copy does not make the bad line silent
    with pytest.raises(GraphError, match="1 of 3 rows not used"):
        KnowledgeGraph.load(root, cache=True, strict=True)


def test_the_copy_survives_a_fresh_fingerprint(root):
    KnowledgeGraph.load(root, cache=True)
    second = KnowledgeGraph.load(root, cache=True)
    stored = second.fingerprint
    del second.__dict__["fingerprint"]
    assert second.fingerprint == stored


def test_another_content_or_option_is_another_copy(root):
    KnowledgeGraph.load(root, cache=True)
    assert not KnowledgeGraph.load(root, cache=True, v1_names=True).report.cached
    kg = root / "processed" / "stage1" / "kg.txt"
    kg.write_text(KG.replace("borders", "touches"))
    changed = KnowledgeGraph.load(root, cache=True)
    assert not changed.report.cached and "touches" in changed.relations and len(copies(root)) == 3
    (root / "raw" / "dataset_corpus.json").write_text('{"Peru": "q"}')
    assert KnowledgeGraph.load(root, cache=True).document_text(0) == "q"
    kg.write_text(KG)
    (root / "raw" / "dataset_corpus.json").write_text('{"Peru": "p"}')
    assert KnowledgeGraph.load(root, cache=True).report.cached


FILES = [
    "arrays.safetensors",
    "layout.safetensors",
    "entities.arrow",
    "relations.arrow",
    "documents.arrow",
    "texts.arrow",
]


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_harmed_copy_is_made_anew(root, name, harm):
    first = KnowledgeGraph.load(root, cache=True)
    path = copies(root)[0] / name
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()
    if name == "meta.json":
        if harm == "flip":
            path.write_text(content.decode().replace('"key": "', '"key": "0'))
        if harm == "remove":
            again = KnowledgeGraph.load(root, cache=True)  # without it nothing says that the copy is whole
            assert not again.report.cached
    if not (name == "meta.json" and harm == "remove"):
        with pytest.warns(UserWarning, match="cannot be used .*the files are read again"):
            again = KnowledgeGraph.load(root, cache=True)
        assert not again.report.cached
    assert_same(first, again)
    assert KnowledgeGraph.load(root, cache=True).report.cached and len(copies(root)) == 1


def test_a_copy_of_another_graph_is_not_used(root, write_v1, tmp_path):
    KnowledgeGraph.load(root, cache=True)
    mine = copies(root)[0]
    kept = tmp_path / "kept"
    shutil.copytree(mine, kept)
    KnowledgeGraph.load(write_v1("a,b,c\n"), cache=True)
    other = next(copy for copy in copies(root) if copy != mine)
    shutil.rmtree(other)
    shutil.copytree(kept, other)
    with pytest.warns(UserWarning, match="of another graph or version"):
        assert list(KnowledgeGraph.load(root, cache=True).entities) == ["a", "c"]


def test_a_checksum_that_fits_altered_ids_is_not_enough(root):
    """Ids out of range would let the kernels read beyond their arrays."""
    import zlib

    from safetensors.torch import load_file, save_file

    KnowledgeGraph.load(root, cache=True)
    path = copies(root)[0] / "arrays.safetensors"
    arrays = load_file(path)
    arrays = {name: value.clone() for name, value in arrays.items()}
    arrays["head"][0] = 99
    save_file(arrays, path)
    meta_path = path.parent / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta["files"][path.name] = [path.stat().st_size, zlib.crc32(path.read_bytes())]
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(GraphError, match="head, row 0: id 99 is out of range"):
        KnowledgeGraph.load(root, cache=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(root):
    (root / "processed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        KnowledgeGraph.load(root, cache=True)
        assert KnowledgeGraph.load(root, cache=True).report.cached
    finally:
        (root / "processed").chmod(stat.S_IRWXU)


def test_a_data_set_where_stage2_is_a_file_goes_to_the_users_cache(root):
    (root / "processed" / "stage2").write_text("in the way")
    assert not KnowledgeGraph.load(root, cache=True).report.cached
    assert KnowledgeGraph.load(root, cache=True).report.cached
    assert len(list((user_cache() / "graphs").glob("ragkit-*"))) == 1


def test_the_small_world_is_cached_outside_the_library(tmp_path):
    KnowledgeGraph.load("small_world", cache=True)
    assert KnowledgeGraph.load("small_world", cache=True).report.cached
    assert len(list((tmp_path / "user_cache" / "graphs").iterdir())) == 1


def test_no_place_to_write_is_a_warning(root, tmp_path):
    (root / "processed" / "stage2").write_text("in the way")
    (tmp_path / "user_cache").write_text("in the way too")
    with pytest.warns(UserWarning, match="the graph could not be cached .*user_cache"):
        assert KnowledgeGraph.load(root, cache=True).num_triples == 2


def test_a_graph_without_documents_and_a_bare_folder(tmp_path):
    (tmp_path / "kg.txt").write_text("a,r,b\n")
    KnowledgeGraph.load(tmp_path, cache=True)
    second = KnowledgeGraph.load(tmp_path, cache=True)
    assert second.report.cached and second.num_documents == 0 and second.texts is None


def test_names_are_memory_mapped_and_can_be_overwritten(root):
    """The copy can be replaced while a graph that was read from it is in use."""
    KnowledgeGraph.load(root, cache=True)
    second = KnowledgeGraph.load(root, cache=True)
    shutil.rmtree(copies(root)[0])
    KnowledgeGraph.load(root, cache=True)
    assert list(second.entities) == ["lima", "peru", "chile"] and second.layout.num_edges == 4
