"""Facts near to a question, and the entities that they add to it."""

from __future__ import annotations

import json

import pytest
import torch

from ragkit.gfm import EntitySearch, FactLinker, FactSearch, QuestionSet, make_linker, relinked
from ragkit.gfm.datasets import load_finetune_data
from ragkit.gfm.retriever_folder import _linker_settings, _make_linker
from ragkit.gfm_config import GFMDatasets
from ragkit.graph import KnowledgeGraph
from ragkit.graph.link import EntityLinker

TRIPLES = [
    ("jaws", "directed by", "spielberg"),
    ("spielberg", "born in", "cincinnati"),
    ("jaws", "equivalent", "jaws 2"),
    ("jaws", "directed by", "spielberg"),  # twice
    ("cincinnati", "lies in", "ohio"),
]
DOCUMENTS = {
    "Jaws": ["jaws", "spielberg"],
    "Spielberg": ["spielberg", "cincinnati"],
    "Cincinnati": ["cincinnati", "ohio"],
}


class Words:
    """An encoder: one number for each word of the graph, so that a cosine counts common words."""

    vocabulary = sorted({word for triple in TRIPLES for text in triple for word in text.split()})

    def __init__(self):
        self.encoded = 0

    def encode(self, texts, side):
        self.encoded += len(texts)
        rows = [[float(word in text.lower().replace("?", "").split()) for word in self.vocabulary] for text in texts]
        return torch.tensor(rows) + 1e-3


@pytest.fixture
def graph():
    return KnowledgeGraph.from_triples(TRIPLES, DOCUMENTS)


def named(graph, search):
    return [(graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in search.facts.tolist()]


def test_each_fact_once_and_no_names_that_look_alike(graph):
    search = FactSearch(graph, Words(), cache=False)
    assert sorted(named(graph, search)) == [TRIPLES[4], TRIPLES[0], TRIPLES[1]]
    assert search.embeddings.shape == (3, len(Words.vocabulary))


def test_the_nearest_fact_is_that_of_a_full_comparison(graph):
    encoder = Words()
    search = FactSearch(graph, encoder, cache=False)
    questions = ["Who was born in Ohio?", "What was jaws directed by?"]
    cosines, places = search(questions, 2)
    texts = [" ".join(fact) for fact in named(graph, search)]
    full = torch.cosine_similarity(
        encoder.encode(questions, "query")[:, None], encoder.encode(texts, "passage")[None], dim=-1
    )
    torch.testing.assert_close(cosines, full.topk(2).values)
    assert named(graph, search)[int(places[1, 0])] == TRIPLES[0]


def test_entities_of_facts_come_after_the_named_ones_each_once(graph):
    linker = FactLinker(EntityLinker(graph), FactSearch(graph, Words(), cache=False), top_facts=1)
    jaws, nothing = linker.link(["What was Jaws directed by?", ""])
    assert [(link.name, link.how) for link in jaws] == [("jaws", "string"), ("spielberg", "fact")]
    assert jaws[1].score == pytest.approx(1, abs=0.3) and nothing == []
    with pytest.raises(ValueError, match="top_facts"):
        FactLinker(EntityLinker(graph), linker.facts, top_facts=0)


def test_a_graph_without_facts_adds_nothing():
    graph = KnowledgeGraph.from_triples([("jaws", "equivalent", "jaws 2")])
    linker = FactLinker(EntityLinker(graph), FactSearch(graph, Words(), cache=False))
    assert [link.name for link in linker.link(["Is Jaws good?"])[0]] == ["jaws"]


def test_embeddings_are_kept_under_names_and_facts(graph, tmp_path):
    first, again = Words(), Words()
    kept = FactSearch(graph, first, tmp_path).embeddings
    other = FactSearch(graph, again, tmp_path)
    torch.testing.assert_close(other.embeddings, kept, rtol=0, atol=0)
    assert again.encoded < first.encoded  # only what tells the encoders apart
    more = KnowledgeGraph.from_triples([*TRIPLES, ("ohio", "lies in", "jaws")], DOCUMENTS)
    assert len(FactSearch(more, again, tmp_path).embeddings) == 4


def test_questions_take_the_linkers_entities_and_keep_their_own_where_it_finds_none(graph, tmp_path):
    folder = tmp_path / "films"
    graph.save(folder)
    rows = [
        {"id": "a", "question": "What was Jaws directed by?", "question_entities": ["ohio"]},
        {"id": "b", "question": "Why?", "question_entities": ["ohio"]},
    ]
    support = {"supporting_entities": ["jaws"], "supporting_facts": ["Jaws"]}
    stage = next(folder.rglob("kg.txt")).parent
    for split in ("train", "test"):
        (stage / f"{split}.json").write_text(json.dumps([{**row, **support} for row in rows]))
    encoder = Words()
    questions = QuestionSet.load(rows := [{**row, **support} for row in rows], graph, encoder, cache=False)
    found = relinked(questions, make_linker("names", graph, encoder, cache=False))
    assert [graph.entities[int(e)] for e in found.question_entities[0]] == ["jaws"]
    assert found.ids == questions.ids and len(found.supporting_entities) == len(rows)
    settings = GFMDatasets(train_names=[str(folder)], valid_share=0, link="facts", top_facts=1, cache=False)
    part = load_finetune_data(settings, encoder, 0).train["films"]
    assert {part.graph.entities[int(e)] for e in part.questions.question_entities[0]} == {"jaws", "spielberg"}


def test_a_linker_of_facts_is_made_again_from_its_settings(graph):
    encoder = Words()
    names = EntityLinker(graph, EntitySearch(graph, encoder, False), threshold=0.7)
    settings = _linker_settings(FactLinker(names, FactSearch(graph, encoder, False), 2))
    made = _make_linker(json.loads(json.dumps(settings)), graph, encoder, False, None)
    assert isinstance(made, FactLinker) and made.top_facts == 2 and made.linker.threshold == 0.7
    question = ["What was Jaws directed by?"]
    assert made.link(question) == FactLinker(names, FactSearch(graph, encoder, False), 2).link(question)
