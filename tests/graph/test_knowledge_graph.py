from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.names import Names
from ragkit.graph.parts import Documents, GraphParts

NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(',"\n\r \t'), min_size=1)
NAMES = NAMES.filter(lambda name: name.strip())


def v1_tensors(path):
    """GFM-RAG v1's reading of kg.txt, as its kg_dataset.py says it: -> entity ids, relation ids, index, type."""
    entities, relations, edges = {}, {}, []
    with open(path, encoding="utf-8") as file:
        for line in file:
            parts = line.strip().split(",")
            if len(parts) != 3:
                continue
            u, r, v = parts
            edges.append(
                (
                    entities.setdefault(u, len(entities)),
                    entities.setdefault(v, len(entities)),
                    relations.setdefault(r, len(relations)),
                )
            )
    target = torch.tensor([[u, v] for u, v, _ in edges]).t()
    kind = torch.tensor([r for _, _, r in edges])
    return entities, relations, torch.cat([target, target.flip(0)], 1), torch.cat([kind, kind + len(relations)])


def test_by_hand(graph):
    assert list(graph.entities) == ["lima", "peru", "chile", "pacific"]
    assert list(graph.relations) == ["capital of", "borders", "on"]
    assert graph.head.tolist() == [0, 1, 0, 0, 2] and graph.tail.tolist() == [1, 2, 3, 1, 1]
    assert graph.relation.tolist() == [0, 1, 2, 0, 1] and graph.head.dtype == np.int32
    assert (graph.num_entities, graph.num_relations, graph.num_triples, graph.num_documents) == (4, 3, 5, 3)
    assert graph.edge_index.tolist() == [[0, 1, 0, 0, 2, 1, 2, 3, 1, 1], [1, 2, 3, 1, 1, 0, 1, 0, 0, 2]]
    assert graph.edge_type.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 3, 4] and graph.edge_type.dtype == torch.int64
    assert graph.relation_texts[3:] == ["inverse_capital of", "inverse_borders", "inverse_on"]
    assert graph.document_ptr.tolist() == [0, 3, 5, 5] and graph.entities_of(1).tolist() == [2, 1]
    assert graph.document_frequency.tolist() == [1, 2, 2, 0]
    ptr, documents = graph.entity_documents()
    assert ptr.tolist() == [0, 1, 3, 5, 5] and documents.tolist() == [0, 0, 1, 0, 1]
    assert graph.document_text(2) == "It sank."


def test_messages_go_to_heads(graph):
    """out[head] += x[tail]: the direction that v1's checkpoints were trained with."""
    layout = graph.layout
    assert layout is graph.layout and (layout.num_nodes, layout.num_relations, layout.num_edges) == (4, 6, 10)
    rows = torch.repeat_interleave(torch.arange(4), layout.by_dst.ptr.long().diff()).tolist()
    source, kind = layout.by_dst.edges[0].tolist(), layout.by_dst.edges[1].tolist()
    given = zip(graph.edge_index[0].tolist(), graph.edge_index[1].tolist(), graph.edge_type.tolist(), strict=True)
    assert sorted(zip(rows, source, kind, strict=True)) == sorted(given)
    assert (0, 3, 2) in zip(rows, source, kind, strict=True)  # lima --on--> pacific: lima hears of pacific


@pytest.mark.parametrize("shape", ["tuples", "lists", "arrow", "batch", "pandas", "dictionary"])
def test_any_table_of_triples(shape, graph):
    rows = [("lima", "capital of", "peru"), ("peru", "borders", "chile"), ("nan", "null", "NA")]
    columns = {
        name: list(column) for name, column in zip(("head", "relation", "tail"), zip(*rows, strict=True), strict=True)
    }
    if shape == "pandas":
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame({"tail": columns["tail"], "head": columns["head"], "relation": columns["relation"]})
    else:
        table = {
            "tuples": rows,
            "lists": [list(row) for row in rows],
            "arrow": pa.table(columns),
            "batch": pa.record_batch(columns),
            "dictionary": pa.table({k: pa.array(v).dictionary_encode() for k, v in columns.items()}),
        }[shape]
    found = KnowledgeGraph.from_triples(table)
    assert list(found.entities) == ["lima", "peru", "chile", "nan", "NA"] and found.relations[2] == "null"


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        ([], "no triples: the list is empty"),
        ([("a", "r", "b"), ("a", "r")], r"row 2: expected \(head, relation, tail\), found \"\('a', 'r'\)\""),
        (["arb"], r"row 1: expected \(head, relation, tail\), found 'arb'"),
        ([("a", "r", 1.5)], r"tail 0: expected text, found float \(1.5\)"),
        ([("", "r", "b"), ("a", None, "b")], "no usable triple; .*2 of 2 rows not used"),
        (pa.table({"head": ["a"], "rel": ["r"]}), "expected the columns head, relation and tail, found: head, rel"),
        ([("a", "r", "\udfff")], "tail 0: .* half a surrogate pair"),
    ],
)
def test_triples_that_cannot_be_used(triples, message):
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph.from_triples(triples)


def test_rows_with_missing_names_are_reported(capsys):
    graph = KnowledgeGraph.from_triples([("a", "r", "b"), (None, "r", "c"), ("a", "s", "  ")])
    assert list(graph.entities) == ["a", "b"] and list(graph.relations) == ["r"]
    assert [str(row) for row in graph.report.skipped] == ["row 2: empty head: ',r,c'", "row 3: empty tail: 'a,s,  '"]
    assert "the triples: 2 of 3 rows not used" in capsys.readouterr().out
    with pytest.raises(GraphError, match="2 of 3 rows"):
        KnowledgeGraph.from_triples([("a", "r", "b"), (None, "r", "c"), ("a", "s", "  ")], strict=True)


def test_a_graph_of_documents_given_as_sets_and_strings():
    graph = KnowledgeGraph.from_triples([("a", "r", "b")], {"d": ("b", "a")}, v1_names=True)
    assert graph.document_entities.tolist() == [1, 0]
    with pytest.raises(GraphError, match="document 'd': expected a list of entity names, found str"):
        KnowledgeGraph.from_triples([("a", "r", "b")], {"d": "ab"})


def parts(**change):
    values = {
        "entities": Names(["a", "b"], "entity"),
        "relations": Names(["r"], "relation"),
        "head": np.array([0, 1]),
        "relation": np.array([0, 0]),
        "tail": np.array([1, 0]),
    }
    return GraphParts(**{**values, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.array([0, 2])}, "head, row 1: id 2 is out of range, expected 0 ... 1"),
        ({"tail": np.array([-1, 0])}, "tail, row 0: id -1 is out of range"),
        ({"relation": np.array([0, 1])}, "relation, row 1: id 1 is out of range, expected 0 ... 0"),
        ({"head": np.array([0])}, "1 heads, 2 relations and 2 tails"),
        ({"head": np.array([0.0, 1.0])}, "head: expected one column of integer ids, found float64"),
        (
            {"documents": Documents(Names(["d"]), np.array([0, 3]), np.array([0, 1]))},
            "document_ptr does not cut 2 entries into 1 documents",
        ),
        ({"documents": Documents(Names(["d"]), np.array([0, 1]), np.array([5]))}, "document_entities, row 0: id 5"),
    ],
)
def test_ids_out_of_range(change, message):
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph(parts(**change))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(3, 4), r"rel_emb has shape \[3, 4\], expected \[6, F\]: a row for each of the 3 relations"),
        (torch.zeros(6), r"rel_emb has shape \[6\]"),
        (torch.zeros(6, 4, dtype=torch.long), "rel_emb is torch.int64, expected a float type"),
        (torch.full((6, 4), float("nan")), "6 of 6 rows hold NaN or infinity .*row 0, 'capital of'"),
        (torch.tensor([[0.0]] * 4 + [[float("inf")], [0.0]]), "1 of 6 rows .*row 4, 'inverse_borders'"),
    ],
)
def test_a_relation_table_that_does_not_fit(graph, table, message):
    with pytest.raises(GraphError, match=message):
        graph.rel_emb = table
    assert graph.rel_emb is None
    graph.rel_emb = torch.ones(6, 4, dtype=torch.bfloat16)
    assert graph.rel_emb.shape == (6, 4)
    graph.rel_emb = None


def test_the_fingerprint_sees_names_triples_and_incidence_and_nothing_else(graph, ingredients):
    all_triples, all_documents, all_texts = ingredients

    def fingerprint(triples=all_triples, documents=all_documents, texts=all_texts):
        return KnowledgeGraph.from_triples(triples, documents, texts).fingerprint

    assert fingerprint() == graph.fingerprint == "dfa8a44564a40b5bc238216b3b22ad19"
    assert fingerprint(texts={**all_texts, "Peru": "other"}) == graph.fingerprint
    others = [
        fingerprint(all_triples[::-1]),
        fingerprint(all_triples[:-1]),
        fingerprint([(h.replace("lima", "Lima"), r, t) for h, r, t in all_triples], {}),
        fingerprint(documents={**all_documents, "Chile": ["chile"]}),
        fingerprint(documents={**all_documents, "Chile": ["peru", "chile"]}),
    ]
    assert len({graph.fingerprint, *others}) == 6


@given(st.data())
def test_a_graph_with_some_triples_is_the_one_made_of_them(data):
    ids = st.integers(0, 4)
    triples = data.draw(st.lists(st.tuples(ids, st.integers(0, 2), ids), max_size=12))
    keep = data.draw(st.lists(st.booleans(), min_size=len(triples), max_size=len(triples)))

    def made_of(rows):
        head, relation, tail = np.array(rows, np.int64).reshape(-1, 3).T
        texts = pa.array(["x", None], pa.large_string())
        documents = Documents(Names(["d", "e"]), np.array([0, 2, 3]), np.array([4, 0, 1]), texts)
        names = Names(list("abcde"), "entity"), Names(["r", "s", "t"], "relation")
        return KnowledgeGraph(GraphParts(*names, head, relation, tail, documents))

    whole, wanted = made_of(triples), made_of([row for row, kept in zip(triples, keep, strict=True) if kept])
    whole.rel_emb = torch.ones(6, 4)
    before = whole.fingerprint, whole.layout
    mask = np.array(keep, bool)
    for form in (mask, torch.from_numpy(mask)):
        found = whole.with_triples(form)
        assert found.fingerprint == wanted.fingerprint and (found.fingerprint == before[0]) == all(keep)
        assert torch.equal(found.edge_index, wanted.edge_index) and torch.equal(found.edge_type, wanted.edge_type)
        layouts = found.layout.tensors(), wanted.layout.tensors()
        assert all(torch.equal(layouts[0][name], layouts[1][name]) for name in layouts[1])
        assert found.rel_emb is whole.rel_emb and found.texts is whole.texts and found.report is whole.report
        assert found.entities is whole.entities and found.relations is whole.relations
        assert found.documents is whole.documents and found.document_entities is whole.document_entities
    assert (whole.fingerprint, whole.layout) == before and whole.num_triples == len(triples)


def test_a_choice_of_triples_that_does_not_fit(graph):
    for keep in (np.ones(4, bool), np.ones((5, 1), bool), np.arange(5), torch.ones(5)):
        with pytest.raises(GraphError, match=r"keep: expected bool \[5\], one for each triple, found "):
            graph.with_triples(keep)


@given(st.data())
def test_any_graph_survives_save_and_load(tmp_path_factory, data):
    names = data.draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    name = st.sampled_from(names)
    triples = data.draw(st.lists(st.tuples(name, name, name), min_size=1, max_size=6))
    used = list(dict.fromkeys(end for h, _, t in triples for end in (h, t)))
    lists = st.lists(st.sampled_from(used), max_size=3, unique=True)
    documents = data.draw(st.dictionaries(NAMES, lists, max_size=3))
    texts = {name: f"text of {name}" for name in documents} or None
    graph = KnowledgeGraph.from_triples(triples, documents, texts, strict=True)
    folder = tmp_path_factory.mktemp("graph", numbered=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that v1 cannot read names with commas
        graph.save(folder)
    again = KnowledgeGraph.load(folder, strict=True)
    assert again.fingerprint == graph.fingerprint and list(again.entities) == list(graph.entities) == used
    assert {d: [again.entities[e] for e in again.entities_of(i)] for i, d in enumerate(again.documents)} == documents
    assert [again.document_text(i) for i in range(len(documents))] == list((texts or {}).values())


def test_real_counts(real_set):
    graph = KnowledgeGraph.load(real_set, strict=True)
    stats = json.loads((real_set / "stats.json").read_text())
    found = (graph.num_entities, graph.num_relations, graph.num_triples, graph.num_documents)
    assert found == (stats["entities"], stats["relations"], stats["triples"], stats.get("docs", 0))
    assert graph.report.documents_without_entities == stats.get("docs_without_entities", 0)
    assert graph.report.documents_without_text == 0
    assert KnowledgeGraph.load(real_set, strict=True, v1_names=True).fingerprint == graph.fingerprint


def test_real_tensors_are_v1s(wiki2):
    graph = KnowledgeGraph.load(wiki2)
    entities, relations, index, kind = v1_tensors(wiki2 / "processed" / "stage1" / "kg.txt")
    assert list(graph.entities) == list(entities) and list(graph.relations) == list(relations)
    assert torch.equal(graph.edge_index, index) and torch.equal(graph.edge_type, kind)
    lists = json.loads((wiki2 / "processed" / "stage1" / "document2entities.json").read_text())
    assert list(graph.documents) == list(lists)
    expected = [sorted({entities[name] for name in names if name in entities}) for names in lists.values()]
    assert [sorted(graph.entities_of(i).tolist()) for i in range(graph.num_documents)] == expected
    assert graph.layout.num_edges == 2 * graph.num_triples
