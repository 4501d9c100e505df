from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ragkit.graph import GraphError, KnowledgeGraph


def plain(**more):
    """A graph with the attributes of a PyG `Data`, for what needs no PyG: two relations, four nodes."""
    values = {"edge_index": torch.tensor([[0, 2, 1], [1, 0, 2]]), "edge_type": torch.tensor([0, 1, 0]), "num_nodes": 4}
    return SimpleNamespace(**{**values, **more})


def doubled(**more):
    index, kind = plain().edge_index, plain().edge_type
    return plain(edge_index=torch.cat([index, index.flip(0)], 1), edge_type=torch.cat([kind, kind + 2]), **more)


def triples(graph):
    return list(zip(graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist(), strict=True))


EXPECTED = [(0, 0, 1), (2, 1, 0), (1, 0, 2)]


def test_plain_edges_with_and_without_types():
    graph = KnowledgeGraph.from_pyg(plain())
    assert triples(graph) == EXPECTED and graph.num_entities == 4 and graph.num_relations == 2
    assert list(graph.entities) == ["entity 0", "entity 1", "entity 2", "entity 3"]
    assert list(graph.relations) == ["relation 0", "relation 1"]
    graph = KnowledgeGraph.from_pyg(plain(edge_type=None, num_nodes=None))
    assert graph.num_relations == 1 and graph.num_entities == 3 and graph.relation.tolist() == [0, 0, 0]
    assert KnowledgeGraph.from_pyg(plain(edge_type=torch.tensor([[0], [1], [0]]))).relation.tolist() == [0, 1, 0]
    assert KnowledgeGraph.from_pyg(plain(num_relations=7)).num_relations == 7


@pytest.mark.parametrize("given", [{}, {"num_relations": 4}, {"num_relations": torch.tensor(4)}])
def test_a_doubled_list_is_seen_as_such(given):
    graph = KnowledgeGraph.from_pyg(doubled(**given))
    assert triples(graph) == EXPECTED and graph.num_relations == 2
    assert torch.equal(graph.edge_index, doubled().edge_index) and torch.equal(graph.edge_type, doubled().edge_type)


def test_a_list_that_only_looks_doubled_stays():
    one = KnowledgeGraph.from_pyg(plain(edge_index=torch.tensor([[0, 1], [1, 0]]), edge_type=torch.tensor([0, 0])))
    assert triples(one) == [(0, 0, 1), (1, 0, 0)]
    seven = KnowledgeGraph.from_pyg(doubled(num_relations=7))
    assert seven.num_triples == 6 and seven.num_relations == 7


def test_target_edges_are_taken_where_they_are_given():
    data = doubled(num_relations=6, target_edge_index=plain().edge_index, target_edge_type=plain().edge_type)
    graph = KnowledgeGraph.from_pyg(data)
    assert triples(graph) == EXPECTED and graph.num_relations == 3
    data.num_relations = 5
    with pytest.raises(GraphError, match=r"even num_relations \(2R\), found 5"):
        KnowledgeGraph.from_pyg(data)


def test_names():
    graph = KnowledgeGraph.from_pyg(plain(), entities=["a", "b", "c", "d"], relations=["r", "s"])
    assert list(graph.entities) == ["a", "b", "c", "d"] and graph.relation_texts[2] == "inverse_r"
    with pytest.raises(GraphError, match="3 entity names for 4 nodes"):
        KnowledgeGraph.from_pyg(plain(), entities=["a", "b", "c"])
    with pytest.raises(GraphError, match="1 relation names for 2 relations"):
        KnowledgeGraph.from_pyg(plain(), relations=["r"])
    with pytest.raises(GraphError, match="entity 'a' stands there twice"):
        KnowledgeGraph.from_pyg(plain(), entities=["a", "a", "c", "d"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            plain(edge_index=torch.tensor([[0, 9, 1], [1, 0, 2]])),
            "head, row 1: id 9 is out of range, expected 0 ... 3",
        ),
        (plain(edge_index=torch.tensor([[0, 1, 1], [1, -1, 2]])), "tail, row 1: id -1 is out of range"),
        (plain(edge_type=torch.tensor([0, -1, 0])), "relation, row 1: id -1 is out of range"),
        (plain(edge_type=torch.tensor([0, 5, 0]), num_relations=3), "holds the id 5, but num_relations is 3"),
        (plain(edge_type=torch.tensor([0, 1])), r"edge_type: expected \[3\] integer ids, one an edge, found .* \[2\]"),
        (plain(edge_type=torch.rand(3)), "edge_type: expected .* found torch.float32"),
        (plain(edge_index=torch.zeros(3, 2, dtype=torch.long)), r"edge_index: expected \[2, E\] integer ids"),
        (SimpleNamespace(x=1), "expected a graph with edge_index, found SimpleNamespace"),
        ([plain()], "expected a graph with edge_index, found list"),
        (plain(rel_emb=torch.zeros(3, 2)), r"rel_emb has shape \[3, 2\], expected \[4, F\]"),
    ],
)
def test_graphs_that_cannot_be_used(data, message):
    with pytest.raises(GraphError, match=message):
        KnowledgeGraph.from_pyg(data)


def test_round_trip(graph):
    pytest.importorskip("torch_geometric")
    graph.rel_emb = torch.randn(6, 5)
    data = graph.to_pyg()
    assert data.num_nodes == 4 and data.num_edges == 10 and data.num_relations == 6
    assert torch.equal(data.target_edge_index, data.edge_index[:, :5])
    assert torch.equal(data.edge_type[5:], data.target_edge_type + 3)
    again = KnowledgeGraph.from_pyg(data.clone())
    assert again.entities == graph.entities and again.relations == graph.relations and triples(again) == triples(graph)
    assert torch.equal(again.rel_emb, graph.rel_emb)
    bare = graph.to_pyg(names=False)
    assert "entity_names" not in bare and KnowledgeGraph.from_pyg(bare).entities[0] == "entity 0"


def test_a_pyg_data_set_and_a_heterogeneous_graph():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import HeteroData
    from torch_geometric.datasets import KarateClub

    graph = KnowledgeGraph.from_pyg(KarateClub()[0])
    assert graph.num_entities == 34 and graph.num_relations == 1 and graph.num_triples == 156
    assert KnowledgeGraph.from_pyg(KarateClub()).fingerprint == graph.fingerprint
    with pytest.raises(GraphError, match=r"a data set of 2 graphs: give one of them, such as dataset\[0\]"):
        KnowledgeGraph.from_pyg(KarateClub()[[0, 0]])
    data = HeteroData()
    data["author"].num_nodes, data["paper"].num_nodes = 2, 3
    data["author", "writes", "paper"].edge_index = torch.tensor([[0, 1], [2, 0]])
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0], [1]])
    graph = KnowledgeGraph.from_pyg(data)
    named = [(graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in triples(graph)]
    assert named == [
        ("author 0", "writes", "paper 2"),
        ("author 1", "writes", "paper 0"),
        ("paper 0", "cites", "paper 1"),
    ]
