from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph import v2_csv as module
from ragkit.graph.names import Names
from ragkit.graph.parts import Documents, GraphParts

NODES = "name,type,attributes\nlima,entity,{}\nPeru,document,{}\nnull,entity,{}\nisolated,entity,{}\nnan,entity,{}\n"
RELATIONS = "name,attributes\nis_mentioned_in,{}\ncapital of,{}\nunused,{}\n"
EDGES = (
    "source,relation,target,attributes\nlima,capital of,null,{}\nlima,is_mentioned_in,Peru,{}\n"
    "nan,capital of,lima,{}\nnan,is_mentioned_in,Peru,{}\n"
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(",\"\n\r '"), min_size=1)
NAMES = NAMES.filter(lambda name: name.strip())


@pytest.fixture
def write(tmp_path):
    """write(nodes=..., relations=..., edges=..., texts=...) -> the folder."""

    def run(nodes: str | bytes = NODES, relations: str = RELATIONS, edges: str = EDGES, texts: object = None):
        stage1 = tmp_path / "processed" / "stage1"
        stage1.mkdir(parents=True, exist_ok=True)
        for name, content in (("nodes", nodes), ("relations", relations), ("edges", edges)):
            (stage1 / f"{name}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        if texts is not None:
            (tmp_path / "raw").mkdir(exist_ok=True)
            (tmp_path / "raw" / "documents.json").write_text(json.dumps(texts))
        return tmp_path

    return run


def test_by_hand(write):
    graph = KnowledgeGraph.load(write(texts={"Peru": "Lima is its capital."}), strict=True)
    assert list(graph.entities) == ["lima", "null", "isolated", "nan"]
    assert list(graph.relations) == ["capital of", "unused"]  # is_mentioned_in joins documents only
    assert (graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist()) == ([0, 3], [0, 0], [1, 0])
    assert list(graph.documents) == ["Peru"] and graph.document_entities.tolist() == [0, 3]
    assert graph.document_text(0) == "Lima is its capital."


def test_uid_attributes_and_direction(write):
    nodes = "uid,name,type,attributes\ne1,Lima,entity,\"{'a': 1}\"\nd1,Lima,document,{}\ne2,Peru,entity,{}\n"
    edges = "source,relation,target,attributes\ne1,capital of,e2,{}\nd1,mentions,e2,{}\nd1,mentions,d1,{}\n"
    graph = KnowledgeGraph.load(write(nodes, "name,attributes\ncapital of,{}\nmentions,{}\n", edges))
    assert list(graph.entities) == ["Lima", "Peru"] and list(graph.documents) == ["Lima"]
    assert graph.document_entities.tolist() == [1] and list(graph.relations) == ["capital of"]
    assert graph.report.notes == ["the attributes of 1 rows of nodes.csv are not kept"]
    assert graph.report.reasons == {"edges from document to document": 1}


def test_edges_that_cannot_be_used(write, capsys):
    edges = EDGES + "lima,capital of\nlima,capital of,lost,{}\nlima,lost,null,{}\nlost,capital of,null,{}\n"
    graph = KnowledgeGraph.load(write(edges=edges))
    assert graph.num_triples == 2
    assert [str(row) for row in graph.report.skipped] == [
        "row 6: 2 values in edges.csv, expected 4: 'lima,capital of'",
        "row 7: target that is in no file: 'lima,capital of,lost'",
        "row 8: relation that is in no file: 'lima,lost,null'",
        "row 9: source that is in no file: 'lost,capital of,null'",
    ]
    assert "4 of 8 rows not used" in capsys.readouterr().out
    with pytest.raises(GraphError, match="4 of 8 rows not used"):
        KnowledgeGraph.load(write(edges=edges), strict=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"nodes": NODES + "lima,entity,{}\n"}, r"nodes\.csv: node 'lima' stands there twice \(places 0 and 5\)"),
        ({"nodes": NODES + " ,entity,{}\n"}, r"nodes\.csv: node 5 is blank"),
        ({"nodes": "name,attributes\na,{}\n"}, r"nodes\.csv: no column type; found name, attributes"),
        ({"nodes": "title,type\na,entity\n"}, r"nodes\.csv: no column uid or name"),
        ({"nodes": ""}, r"nodes\.csv is empty"),
        ({"nodes": b"name,type\na,entity\n\xe9,entity\n"}, r"nodes\.csv, line 3: not UTF-8 \(byte 0xe9\)"),
        ({"relations": "relation\nr\n"}, r"relations\.csv: no column name"),
        ({"edges": "source,target\na,b\n"}, r"edges\.csv: no column relation"),
        ({"edges": "source,relation,target\nlima,is_mentioned_in,Peru\n"}, "no edge joins two entities"),
    ],
)
def test_bad_files(write, files, message):
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph.load(write(**files))


def test_missing_relations_and_v1_names(write):
    root = write()
    with pytest.raises(GraphError, match="v1_names is for kg.txt"):
        KnowledgeGraph.load(root, v1_names=True)
    (root / "processed" / "stage1" / "relations.csv").unlink()
    with pytest.raises(GraphError, match=r"relations\.csv: no such file"):
        KnowledgeGraph.load(root)


def test_a_value_larger_than_a_block(write, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    long = "x" * 500
    graph = KnowledgeGraph.load(
        write(NODES.replace("isolated", long), edges=EDGES + f"{long},capital of,nan,{{}}\nbad\n")
    )
    assert graph.num_triples == 3 and long in graph.entities and graph.report.num_skipped == 1


def test_a_document_named_like_an_entity(tmp_path):
    graph = KnowledgeGraph.from_triples([("Peru", "r", "b")], {"Peru": ["b"], "x": ["Peru"]}, {"Peru": "t", "x": "u"})
    graph.save(tmp_path, "v2")
    with (tmp_path / "processed" / "stage1" / "nodes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["uid"], row["name"], row["type"]) for row in rows] == [
        ("Peru", "Peru", "entity"),
        ("b", "b", "entity"),
        ("document: Peru", "Peru", "document"),
        ("x", "x", "document"),
    ]
    again = KnowledgeGraph.load(tmp_path)
    assert again.fingerprint == graph.fingerprint and again.document_text(0) == "t"


def test_pandas_reads_what_we_write_as_v2_does(graph, tmp_path):
    pandas = pytest.importorskip("pandas")
    graph.save(tmp_path, "v2")
    stage1 = tmp_path / "processed" / "stage1"
    nodes = pandas.read_csv(stage1 / "nodes.csv", keep_default_na=False)
    assert list(nodes.columns) == ["name", "type", "attributes"] and set(nodes["attributes"]) == {"{}"}
    edges = pandas.read_csv(stage1 / "edges.csv")
    assert set(edges["source"]) | set(edges["target"]) <= set(nodes["name"]) and len(edges) == 5 + 5
    assert list(pandas.read_csv(stage1 / "relations.csv")["name"]) == [*graph.relations, "is_mentioned_in"]


@given(st.data())
def test_any_graph_keeps_its_ids(tmp_path_factory, data):
    names = data.draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    documents = data.draw(st.lists(NAMES.filter(lambda n: n not in names), max_size=3, unique=True))
    place = st.integers(0, len(names) - 1)
    rows = data.draw(st.lists(st.tuples(place, place, place), min_size=1, max_size=6))
    lists = [data.draw(st.lists(place, max_size=4, unique=True)) for _ in documents]
    head, relation, tail = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    ptr = np.cumsum([0, *map(len, lists)])
    inside = np.array([e for entry in lists for e in entry], np.int32)
    texts = pa.array([f"text {d}" for d in documents], pa.large_string()) if documents else None
    parts = Documents(Names(documents, "document"), ptr, inside, texts)
    graph = KnowledgeGraph(GraphParts(Names(names), Names(names), head, relation, tail, parts))
    folder = tmp_path_factory.mktemp("v2", numbered=True)
    graph.save(folder, "v2")
    again = KnowledgeGraph.load(folder, strict=True)
    assert again.fingerprint == graph.fingerprint and list(again.entities) == names
    assert again.texts == graph.texts
