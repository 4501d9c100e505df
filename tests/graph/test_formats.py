from __future__ import annotations

import json
import os

import pytest
from silence import no_warning

from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.formats import find_layout

KG = "lima,capital of,peru\nperu,borders,chile\n"


def test_v1_by_hand(write_v1, capsys):
    root = write_v1(KG, {"Peru": ["peru", "lima", "peru"], "Chile": []}, {"Chile": "c", "Peru": "p", "New": "n"})
    graph = KnowledgeGraph.load(root, strict=True)
    assert list(graph.entities) == ["lima", "peru", "chile"] and list(graph.relations) == ["capital of", "borders"]
    assert list(graph.documents) == ["Peru", "Chile", "New"]  # v1's ids: the keys of document2entities.json
    assert graph.document_ptr.tolist() == [0, 2, 2, 2] and graph.document_entities.tolist() == [1, 0]
    assert [graph.document_text(i) for i in range(3)] == ["p", "c", "n"]
    report = graph.report
    assert (report.repeated_entities, report.documents_without_entities, report.documents_without_text) == (1, 2, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("inside", [".", "processed/stage1", "processed/stage1/kg.txt"])
def test_any_way_to_name_the_folder(write_v1, inside):
    root = write_v1(KG, {"Peru": ["peru"]}, {"Peru": "text"})
    graph = KnowledgeGraph.load(root / inside)
    assert graph.num_documents == 1 and graph.document_text(0) == "text"


def test_the_small_world():
    graph = KnowledgeGraph.load("small_world", strict=True)
    assert graph.num_triples > 100 and graph.num_documents > 100 and graph.document_text(0)
    assert KnowledgeGraph.load("small_world", v1_names=True, strict=True).fingerprint == graph.fingerprint


def test_a_folder_with_nothing_but_kg(tmp_path):
    (tmp_path / "kg.txt").write_text(KG)
    graph = KnowledgeGraph.load(tmp_path)
    assert graph.num_triples == 2 and graph.num_documents == 0 and graph.texts is None


def test_entities_of_documents_that_are_not_in_the_graph(write_v1, capsys):
    root = write_v1(KG, {"Peru": ["peru", "andes"], "Chile": ["santiago"]})
    graph = KnowledgeGraph.load(root)
    assert graph.report.unknown_entities == 2
    assert graph.report.unknown_examples == [("Peru", "andes"), ("Chile", "santiago")]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "2 entities of documents are not in the graph (first: 'andes' of document 'Peru')" in printed
    with pytest.raises(GraphError, match="2 entities of documents are not in the graph"):
        KnowledgeGraph.load(root, strict=True)


def test_skipped_rows_are_printed_and_strict_raises(write_v1, capsys):
    root = write_v1(KG + "a,b\n,r,x\nx,,y\nx,r, \n")
    graph = KnowledgeGraph.load(root)
    assert graph.num_triples == 2 and list(graph.entities) == ["lima", "peru", "chile"]
    assert graph.report.reasons == {
        "2 values, expected 3": 1,
        "empty head": 1,
        "empty relation": 1,
        "empty tail": 1,
    }
    assert [row.number for row in graph.report.skipped] == [3, 4, 5, 6]
    assert "4 of 6 rows not used" in capsys.readouterr().out
    with pytest.raises(GraphError, match=r"kg\.txt: 4 of 6 rows not used .*first: line 3: 2 values"):
        KnowledgeGraph.load(root, strict=True)


def test_v1_names(write_v1):
    root = write_v1("São Paulo,In,Brazil!\n北京,in,x\nBRAZIL,is. in,s o paulo\n", {"D": ["SÃO PAULO", "brazil"]})
    graph = KnowledgeGraph.load(root, v1_names=True)
    assert list(graph.entities) == ["s o paulo", "brazil"] and list(graph.relations) == ["in", "is  in"]
    assert graph.head.tolist() == [0, 1] and graph.tail.tolist() == [1, 0] and graph.relation.tolist() == [0, 1]
    assert graph.document_entities.tolist() == [0, 1]
    assert str(graph.report.skipped[0]) == "line 2: empty head once normalised: '北京,in,x'"
    assert list(KnowledgeGraph.load(root).entities)[:3] == ["São Paulo", "Brazil!", "北京"]


def test_names_in_quotes_are_noted(write_v1):
    graph = KnowledgeGraph.load(write_v1('"a",r,"b"\n'))
    assert graph.entities[0] == '"a"' and "2 entity names stand in quotes" in graph.report.notes[0]


@pytest.mark.parametrize(
    ("kg", "message"),
    [
        ("", r"kg\.txt is empty"),
        ("\n\n", r"kg\.txt: no usable line head,relation,tail"),
        (
            "a;r;b\nc;r;d\n",
            r"no usable line .*by semicolons\? .*2 of 2 rows not used \(1 values, expected 3; first: line 1: ",
        ),
        ("a\tr\tb\n", r"no usable line head,relation,tail \(values separated by tabs\? expected commas\)"),
        (b"a,r,\xe9\n", r"kg\.txt, line 1: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_a_kg_without_a_triple(write_v1, kg, message):
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph.load(write_v1(kg))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"document2entities\.json: expected a JSON object, found list"),
        ('{"a": ["peru"],\n "a": []}', "the key 'a' stands there twice"),
        ('{"a": ["peru"],\n oops}', r"document2entities\.json, line 2: not JSON"),
        ('{"a": "peru"}', "document 'a': expected a list of entity names, found str"),
        ('{"a": ["peru", null]}', "document 'a': expected entity names, found None"),
        ('{"a": [3]}', "document 'a': expected entity names, found 3"),
        ('{" ": []}', "document 0 is blank"),
        (b'{"a":\n ["\xff"]}', r"document2entities\.json, line 2: not UTF-8"),
    ],
)
def test_bad_document_lists(write_v1, content, message):
    root = write_v1(KG, {})
    path = root / "processed" / "stage1" / "document2entities.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph.load(root)


def test_a_text_that_is_none(write_v1):
    with pytest.raises(GraphError, match="the text of document 'a': expected a string, found int"):
        KnowledgeGraph.load(write_v1(KG, {}, {"a": 3}))


def test_nothing_there(tmp_path):
    with pytest.raises(GraphError, match="no graph at .*nowhere: expected a folder"):
        KnowledgeGraph.load(tmp_path / "nowhere")
    with pytest.raises(GraphError, match=r"holds no graph: expected kg\.txt"):
        KnowledgeGraph.load(tmp_path)
    with pytest.raises(GraphError, match="format is 'v3'"):
        KnowledgeGraph.load(tmp_path, format="v3")


def test_save_keeps_other_files_and_v1s_form(graph, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.json").write_text("[]")
    with no_warning():
        graph.save(tmp_path)
    stage1 = tmp_path / "processed" / "stage1"
    assert (stage1 / "kg.txt").read_text().splitlines()[:2] == ["lima,capital of,peru", "peru,borders,chile"]
    assert json.loads((stage1 / "document2entities.json").read_text())["Peru"] == ["peru", "lima", "chile"]
    assert json.loads((tmp_path / "raw" / "dataset_corpus.json").read_text())["Atlantis"] == "It sank."
    assert (tmp_path / "raw" / "train.json").read_text() == "[]"
    assert not [name for _, _, files in os.walk(tmp_path) for name in files if name.endswith(".tmp")]
    again = KnowledgeGraph.load(tmp_path, strict=True)
    assert again.fingerprint == graph.fingerprint and again.texts.equals(graph.texts)


def test_save_says_what_v1_cannot_hold(tmp_path):
    graph = KnowledgeGraph.from_triples([("a,b", "r", "c")])
    with pytest.warns(UserWarning, match="GFM-RAG v1 cannot read the lines with quotes"):
        graph.save(tmp_path)
    assert list(KnowledgeGraph.load(tmp_path).entities) == ["a,b", "c"]


def test_both_formats_in_one_folder(graph, tmp_path):
    graph.save(tmp_path)
    with pytest.raises(GraphError, match="holds a graph in format v1 already"):
        graph.save(tmp_path, "v2")
    with pytest.raises(GraphError, match="format is 'csv'"):
        graph.save(tmp_path, "csv")
    graph.save(tmp_path / "other", "v2")
    for name in ("nodes.csv", "relations.csv", "edges.csv"):
        (tmp_path / "processed" / "stage1" / name).write_bytes(
            (tmp_path / "other" / "processed" / "stage1" / name).read_bytes()
        )
    with pytest.raises(GraphError, match="holds a graph in both formats"):
        KnowledgeGraph.load(tmp_path)
    assert KnowledgeGraph.load(tmp_path, format="v2").fingerprint == graph.fingerprint
    assert find_layout(tmp_path, "v1").format == "v1"


def test_a_failed_save_leaves_the_old_file(graph, tmp_path, monkeypatch):
    graph.save(tmp_path)
    path = tmp_path / "processed" / "stage1" / "kg.txt"
    before = path.read_bytes()
    monkeypatch.setattr(graph, "tail", graph.tail + 100)  # ids out of range: Arrow's take fails half way
    with pytest.raises(IndexError):
        graph.save(tmp_path)
    assert path.read_bytes() == before and list(path.parent.glob(".*")) == []
