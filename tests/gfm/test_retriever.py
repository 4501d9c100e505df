"""The GFM as a retriever: the same as the steps by hand, in a RAG system, under RALT and LSR, and on disk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from silence import no_warning

from ragkit.config import LSRConfig, RAGConfig, RALTConfig
from ragkit.evaluation import evaluate
from ragkit.gfm import (
    RANKERS,
    EntitySearch,
    GFMRetriever,
    GFMSettings,
    GNNRetriever,
    QueryGNN,
    embed_relations,
    entity_weights,
    save_gfm,
)
from ragkit.gfm.rankers import rank
from ragkit.gfm.text_encoder import InstructedEncoder
from ragkit.graph import GraphError, KnowledgeGraph
from ragkit.graph.link import EntityLinker
from ragkit.rag import Generator, HybridRetriever, Passage, RAGSystem, Retriever, TrainableRetriever
from ragkit.rag.encoder import Encoder

TEXTS = {
    "Peru": "Lima is the capital of Peru.",
    "Chile": "Chile borders Peru.",
    "Santiago": "Santiago is the capital of Chile.",
    "Bolivia": "Sucre is the capital of Bolivia.",
}
QUESTIONS = ["What is the capital of Peru?", "Which country borders Chile?", "Is Sucre in Bolivia?", "Is Lima large?"]
ENTITIES = [["peru"], ["chile"], ["sucre", "bolivia"], ["lima"]]
SETTINGS = GFMSettings(rel_emb_dim=8, input_dim=6, hidden_dims=[6, 6])


def make_graph(texts=TEXTS):
    return KnowledgeGraph.from_triples(
        [
            ("lima", "capital of", "peru"),
            ("peru", "borders", "chile"),
            ("santiago", "capital of", "chile"),
            ("sucre", "capital of", "bolivia"),
            ("bolivia", "borders", "peru"),
        ],
        {
            "Peru": ["peru", "lima", "chile"],
            "Chile": ["chile", "peru"],
            "Santiago": ["santiago", "chile"],
            "Bolivia": ["bolivia", "sucre"],
        },
        texts,
    )


def make_model(seed=0):
    torch.manual_seed(seed)
    return GNNRetriever(SETTINGS)


@pytest.fixture
def build(letters):
    """build(**options): a retriever over the small graph with a random model."""

    def make(graph=None, **options):
        options = {"ranker": "score_weighted_idf", "cache": False, "encoder": letters(), **options}
        encoder = options.pop("encoder")
        return GFMRetriever(options.pop("model", None) or make_model(), graph or make_graph(), encoder, **options)

    return make


@pytest.fixture
def make_rag(build, tiny_lm, tokenizer):
    def make(retriever=None):
        generator = Generator(tiny_lm, tokenizer, max_new_tokens=6)
        config = RAGConfig(prompt="plain", top_k=2, device="cpu", max_new_tokens=6)
        return RAGSystem(build() if retriever is None else retriever, generator, config)

    return make


def pairs(found):
    return [[(passage.id, passage.score) for passage in row] for row in found]


def same(found, expected):
    assert [[p.id for p in row] for row in found] == [[p.id for p in row] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert [p.score for p in row] == pytest.approx([p.score for p in wanted], abs=1e-6)


@pytest.mark.parametrize("ranker", list(RANKERS))
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_steps_by_hand(build, letters, ranker, weighted):
    options = {"k": 3} if ranker in ("topk", "idf_topk") else {}
    retriever = build(ranker=ranker, ranker_options=options, init_entities_weight=weighted)
    found = retriever.retrieve(QUESTIONS, 3)

    graph, model, encoder = make_graph(), make_model().eval(), letters()
    embed_relations(graph, encoder, cache=False)
    ids = [[graph.entities.index(name) for name in names] for names in ENTITIES]
    weights = entity_weights(graph) if weighted else None
    with torch.no_grad():
        logits = model(graph, encoder.encode(QUESTIONS, "query"), ids, weights)
    scores, documents = rank(RANKERS[ranker](logits, graph, **options), 3)
    names = list(graph.documents)
    expected = [
        [(names[document], score) for document, score in zip(*row, strict=True)]
        for row in zip(documents.tolist(), scores.tolist(), strict=True)
    ]
    assert pairs(found) == expected
    assert found[0][0].text == TEXTS[found[0][0].id] and found[0][0].title == found[0][0].id


def test_it_fulfils_the_protocols(build):
    retriever = build()
    assert isinstance(retriever, Retriever) and isinstance(retriever, TrainableRetriever)
    assert "score_weighted_idf" in repr(retriever)
    with pytest.raises(TypeError, match="one string"):
        retriever.retrieve(QUESTIONS[0], 3)
    with pytest.raises(ValueError, match="top_k must be at least 1, found 0"):
        retriever.retrieve(QUESTIONS, 0)
    assert retriever.retrieve([], 3) == []
    assert [len(row) for row in retriever.retrieve(QUESTIONS, 99)] == [4, 4, 4, 4]


def test_batches_give_what_single_questions_give(build):
    singles = [build().retrieve([question], 4)[0] for question in QUESTIONS]
    for size in (1, 3, 8):
        same(build(batch_size=size).retrieve(QUESTIONS, 4), singles)


def test_given_entities_take_the_linkers_place(build):
    retriever = build()
    linked = retriever.retrieve(QUESTIONS, 4)
    names = list(retriever.graph.entities)
    ids = [torch.tensor([names.index(name) for name in row]) for row in ENTITIES]
    same(retriever.retrieve(QUESTIONS, 4, entities=ENTITIES), linked)
    same(retriever.retrieve(QUESTIONS, 4, entities=ids), linked)
    same(retriever.retrieve(QUESTIONS, 4, entities=[None, ["chile", "chile"], None, None]), linked)
    assert retriever.link(QUESTIONS[:1], [["chile", names.index("chile"), "peru"]]) == [
        [names.index("chile"), names.index("peru")]
    ]
    other = retriever.retrieve(QUESTIONS[:1], 4, entities=[["santiago"]])
    assert pairs(other) != pairs(linked[:1])
    with pytest.raises(GraphError, match="no entity 'peruu'.*did you mean 'peru'"):
        retriever.retrieve(QUESTIONS[:1], 4, entities=[["peruu"]])
    with pytest.raises(ValueError, match="id 99 is not in 0 ... 5"):
        retriever.retrieve(QUESTIONS[:1], 4, entities=[[99]])
    with pytest.raises(ValueError, match="2 lists for 1 questions"):
        retriever.retrieve(QUESTIONS[:1], 4, entities=[[0], [1]])
    with pytest.raises(TypeError, match="found the text 'peru'"):
        retriever.retrieve(QUESTIONS[:1], 4, entities=["peru"])


def test_a_question_without_an_entity(build):
    retriever = build(linker=EntityLinker(make_graph()))
    questions = [QUESTIONS[0], "how are you?", "why not?"]
    with pytest.warns(
        UserWarning, match=r"no entity of the graph is named in 2 of 3 questions, so.*'how are you\?'.*fallback="
    ) as caught:
        found = retriever.retrieve(questions, 2)
    assert len(caught) == 1 and [len(row) for row in found] == [2, 0, 0]
    fallback = build(ranker="simple")
    with no_warning():
        saved = build(linker=retriever.linker, fallback=fallback).retrieve(questions, 2)
    assert pairs(saved[:1]) == pairs(found[:1])
    assert pairs(saved[1:]) == pairs(fallback.retrieve(questions[1:], 2))  # through its own linker's embeddings
    assert saved[1]


def test_what_the_model_keeps_is_kept_between_calls(build, monkeypatch):
    from ragkit.gfm import model as module

    made = []
    compute = module.compute_tables
    monkeypatch.setattr(module, "compute_tables", lambda *given: made.append(1) or compute(*given))
    model = make_model().train()
    retriever = build(model=model, batch_size=2)
    assert not model.training
    first = retriever.retrieve(QUESTIONS, 4)
    assert len(made) == 1  # for two batches
    retriever.retrieve(QUESTIONS, 4)
    assert len(made) == 1
    with torch.no_grad():
        model.rel_mlp.weight.mul_(3.0)
    assert pairs(retriever.retrieve(QUESTIONS, 4)) != pairs(first) and len(made) == 2
    model.rel_mlp.weight.data /= 3.0  # unseen by PyTorch's count of changes
    retriever.mark_stale()
    assert retriever.stale
    retriever.refresh()
    assert not retriever.stale and not model.training
    same(retriever.retrieve(QUESTIONS, 4), first)


def test_relation_embeddings_are_made_only_if_missing(build, letters):
    graph, encoder = make_graph(), letters()
    embed_relations(graph, encoder, cache=False)
    kept = graph.rel_emb
    build(graph=graph)
    assert graph.rel_emb is kept
    graph.rel_emb = torch.ones(4, 5)
    with pytest.raises(GraphError, match="have size 5, the model wants 8"):
        build(graph=graph)


def test_texts_and_documents_that_do_not_match(build, capsys):
    passages = [
        Passage("Nowhere", "Not in the graph."),
        Passage("Bolivia", TEXTS["Bolivia"]),
        Passage("Peru", TEXTS["Peru"]),
    ]
    retriever = build(passages=passages)
    line = "2 passages can be retrieved; 2 documents of the graph have no passage; 1 passages are not in the graph"
    assert capsys.readouterr().out.strip() == line
    whole = build().retrieve(QUESTIONS, 4)
    expected = [[pair for pair in row if pair[0] in ("Peru", "Bolivia")] for row in pairs(whole)]
    assert pairs(retriever.retrieve(QUESTIONS, 4)) == expected
    assert len(retriever.store) == 3 and "Nowhere" in retriever.store and "Chile" not in retriever.store
    assert [p.id for p in retriever.store.get(["Peru", "Nowhere"])] == ["Peru", "Nowhere"]
    assert list(retriever.store.passages()) == passages
    with pytest.raises(ValueError, match="no passage has the id 'Chile'"):
        retriever.store.get(["Chile"])
    with pytest.raises(ValueError, match="none of the 1 passages is a document of the graph.*'x'.*'Peru'"):
        build(passages=[Passage("x", "y")])
    with pytest.raises(ValueError, match="give passages="):
        build(graph=make_graph(None))
    some = build(graph=make_graph({**TEXTS, "Chile": " "}))
    assert "1 documents of the graph have no passage" in str(some.store)
    assert {p.id for p in some.retrieve(QUESTIONS[:1], 9)[0]} == {"Peru", "Santiago", "Bolivia"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranker": "idf_top"}, "ranker: expected one of simple, idf, topk.*found 'idf_top'"),
        ({"ranker": "simple", "ranker_options": {"k": 3}}, "ranker_options"),
        ({"ranker": "topk", "ranker_options": {"n": 3}}, "ranker_options"),
        ({"score_ranker": "topk"}, "score_ranker: expected one of simple, idf, score_weighted_idf"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_link_predictor_is_no_retriever(build):
    with pytest.raises(TypeError, match="expected a GNNRetriever, found QueryGNN"):
        build(model=QueryGNN(SETTINGS))


def test_entity_search_finds_the_nearest_names(letters, tmp_path):
    graph, encoder = make_graph(), letters()
    search = EntitySearch(graph, encoder, cache=tmp_path)
    scores, ids = search(["chile", "bad cafe"], 2)
    names, texts = encoder.encode(list(graph.entities), "passage"), encoder.encode(["chile", "bad cafe"], "query")
    dense = torch.nn.functional.normalize(texts, dim=1) @ torch.nn.functional.normalize(names, dim=1).T
    best = dense.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :2]) and torch.allclose(scores, best.values[:, :2], atol=1e-6)
    again, other = letters(), letters(2.0)
    assert torch.equal(EntitySearch(graph, again, cache=tmp_path).embeddings, search.embeddings)
    assert again.calls == 2  # what identifies it, but not the names
    assert EntitySearch(graph, other, cache=tmp_path).embeddings is not None and other.calls == 3
    search.forget()
    assert not search.ready
    with pytest.raises(ValueError, match=r"expected \[6, F\]"):
        EntitySearch(graph, encoder, embeddings=torch.ones(2, 8))


# ---- scores with gradient ----


def test_scores_are_those_of_retrieval_and_move_the_model(build):
    retriever = build()
    found = retriever.retrieve(QUESTIONS, 4)
    ids = [[p.id for p in row[: 4 - n]] for n, row in enumerate(found)]
    scores = retriever.score(QUESTIONS, ids)
    assert scores.shape == (4, 4) and scores.requires_grad
    for row, wanted, n in zip(scores.tolist(), found, (4, 3, 2, 1), strict=True):
        assert row[:n] == pytest.approx([p.score for p in wanted[:n]], abs=1e-6)
        assert row[n:] == [-torch.inf] * (4 - n)
    scores.exp().sum().backward()
    # The bias of the head's last map moves all logits alike, but not so their sigmoids.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in retriever.model.question_mlp.parameters())
    assert retriever.score([], []).shape == (0, 0)
    with pytest.raises(ValueError, match="4 questions, but 1 lists"):
        retriever.score(QUESTIONS, [["Peru"]])
    with pytest.raises(ValueError, match="no passage has the id 'Perú'"):
        retriever.score(QUESTIONS[:1], [["Perú"]])
    with pytest.raises(ValueError, match='part must be "query" or "both"'):
        retriever.score(QUESTIONS[:1], [["Peru"]], part="passage")


def test_a_ranker_without_gradient_is_trained_through_another(build):
    by_count = build(ranker="idf_topk")
    smooth = build(ranker="simple", ranker_options={})
    ids = [["Peru", "Chile"]] * 4
    assert torch.equal(by_count.score(QUESTIONS, ids), build().score(QUESTIONS, ids))
    assert not torch.equal(smooth.score(QUESTIONS, ids), build().score(QUESTIONS, ids))
    assert torch.equal(build(score_ranker="simple").score(QUESTIONS, ids), smooth.score(QUESTIONS, ids))


def test_passages_outside_the_graph_score_as_empty_documents(build):
    passages = [Passage("Nowhere", "Not in the graph."), *(Passage(name, text) for name, text in TEXTS.items())]
    retriever = build(passages=passages)
    scores = retriever.score(["how are you?"], [["Nowhere", "Peru"]])  # without a linked entity: by its text alone
    assert scores[0, 0] == 0 and scores[0, 1] > 0


# ---- in a RAG system ----


def examples():
    from ragkit.tuning.qa_data import load_qa

    answers = ["Lima", "Peru", "yes", "yes"]
    supports = ["Peru", "Chile", "Bolivia", "Peru"]
    rows = [
        {"id": f"q{n}", "question": q, "answer": a, "supporting_facts": [s]}
        for n, (q, a, s) in enumerate(zip(QUESTIONS, answers, supports, strict=True))
    ]
    return rows, load_qa(rows)


def test_a_rag_system_answers_and_is_evaluated(make_rag, build):
    rag = make_rag()
    answer = rag.query(QUESTIONS[0])
    assert len(answer.passages) == 2 and isinstance(answer.text, str)
    strings = make_rag(build(linker=EntityLinker(make_graph())))
    with pytest.warns(UserWarning, match="named in 1 of 2 questions, so no passage is found"):
        with_one, without = strings.batch_query([QUESTIONS[0], "how are you?"])
    assert with_one.text == answer.text and without.passages == () and isinstance(without.text, str)
    result = evaluate(rag, examples()[1], ks=(1, 2))
    found = [[p.id for p in row] for row in rag.retriever.retrieve(QUESTIONS, 2)]
    support = ["Peru", "Chile", "Bolivia", "Peru"]
    assert result.values["recall@2"].tolist() == [float(s in row) for s, row in zip(support, found, strict=True)]


def test_ralt_rows_hold_its_passages(make_rag):
    from ragkit.tuning.ralt import RALTTrainer

    rag = make_rag()
    rows = RALTTrainer(rag, examples()[0], RALTConfig(top_k=2, add_gold=True)).rows()
    assert len(rows) == 8  # context="each"
    found = {row.id: set() for row in rows}
    for row in rows:
        found[row.id] |= {passage.id for passage in row.passages}
    for identity, support in zip(found, ["Peru", "Chile", "Bolivia", "Peru"], strict=True):
        assert support in found[identity]


def test_lsr_trains_the_model_and_nothing_else(make_rag, tmp_path, build):
    from ragkit.tuning.lsr import LSRTrainer

    rag = make_rag()
    before = {name: tensor.clone() for name, tensor in rag.retriever.model.state_dict().items()}
    settings = {"top_k": 3, "gamma": 0.1, "output_dir": str(tmp_path)}
    config = LSRConfig(**settings, train={"num_epochs": 8, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 1})

    def teacher(example, passages):  # the first letter of the alphabet is best
        return [-5.0 * sorted(p.id for p in passages).index(passage.id) for passage in passages]

    trainer = LSRTrainer(rag, examples()[0], config, teacher=teacher)
    result = trainer.train()
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = rag.retriever.model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not rag.retriever.stale and not rag.retriever.model.training
    fresh = build(model=rag.retriever.model)
    same(rag.retriever.retrieve(QUESTIONS, 3), fresh.retrieve(QUESTIONS, 3))  # nothing old was kept


# ---- on disk ----


def test_save_and_load_give_the_same_answers(build, letters, tmp_path):
    graph = make_graph()
    linker = EntityLinker(graph, EntitySearch(graph, letters(), cache=False), threshold=0.7, fallback=2)
    retriever = build(graph=graph, linker=linker, ranker="idf_topk", ranker_options={"k": 3}, batch_size=3)
    questions = [*QUESTIONS, "how are you?"]
    expected = retriever.retrieve(questions, 4)
    retriever.save(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="encoder was a LetterEncoder.*encoder=..."):
        GFMRetriever.load(tmp_path / "moved")
    encoder = letters()
    loaded = GFMRetriever.load(tmp_path / "moved", encoder=encoder, device="cpu", cache=False)
    assert encoder.calls == 0  # relations and names come from the folder
    assert pairs(loaded.retrieve(questions, 4)) == pairs(expected)
    assert (loaded.batch_size, loaded.ranker_options, loaded.linker.fallback) == (3, {"k": 3}, 2)
    assert list(loaded.graph.entities) == list(graph.entities) and loaded.graph.fingerprint == graph.fingerprint
    loaded.save(tmp_path / "moved")  # over itself
    again = GFMRetriever.load(tmp_path / "moved", encoder=encoder, device="cpu", cache=False)
    assert pairs(again.retrieve(questions, 4)) == pairs(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_passages_and_the_fallback_are_kept(build, letters, minilm, tmp_path):
    from ragkit.rag import DenseRetriever

    passages = [Passage("Peru", "Another text.", "A title", {"page": 3}), Passage("Extra", "Not in the graph.")]
    dense = DenseRetriever(minilm)
    dense.index(passages)
    retriever = build(passages=passages, fallback=dense, linker=EntityLinker(make_graph()))
    retriever.save(tmp_path / "r")
    loaded = GFMRetriever.load(tmp_path / "r", encoder=letters(), device="cpu", cache=False)
    assert list(loaded.store.passages()) == passages and loaded.linker.nearest is None
    questions = [QUESTIONS[0], "how are you?"]
    same(loaded.retrieve(questions, 2), retriever.retrieve(questions, 2))


def test_parts_of_other_kinds_are_asked_for(build, letters, tmp_path):
    class Nothing:
        def link(self, questions):
            return [[] for _ in questions]

    retriever = build(linker=Nothing(), fallback=build())
    expected = retriever.retrieve(QUESTIONS, 2)
    retriever.save(tmp_path / "r")
    given = {"encoder": letters(), "device": "cpu", "cache": False}
    with pytest.raises(ValueError, match="linker was a Nothing"):
        GFMRetriever.load(tmp_path / "r", **given)
    with pytest.raises(ValueError, match="fallback was a GFMRetriever"):
        GFMRetriever.load(tmp_path / "r", linker=Nothing(), **given)
    loaded = GFMRetriever.load(tmp_path / "r", linker=Nothing(), fallback=build(), **given)
    assert pairs(loaded.retrieve(QUESTIONS, 2)) == pairs(expected)


def test_every_file_that_is_cut_or_gone_is_named(build, letters, tmp_path):
    build(passages=[Passage(name, text) for name, text in TEXTS.items()]).save(tmp_path / "r")
    files = [path for path in sorted((tmp_path / "r").rglob("*")) if path.is_file()]
    assert len(files) >= 7
    for path in files:
        content = path.read_bytes()
        for new, message in ((content[: len(content) // 2], "cut short|cut off"), (None, "missing|no such file")):
            path.unlink()
            if new is not None:
                path.write_bytes(new)
            with pytest.raises(ValueError, match=f"{path.name}.*({message})"):
                GFMRetriever.load(tmp_path / "r", encoder=letters(), cache=False)
            path.write_bytes(content)
        if path.name != "retriever.json":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(ValueError, match=f"{path.name}.*changed"):
                GFMRetriever.load(tmp_path / "r", encoder=letters(), cache=False)
            path.write_bytes(content)
    GFMRetriever.load(tmp_path / "r", encoder=letters(), cache=False)
    head = json.loads((tmp_path / "r" / "retriever.json").read_text())
    (tmp_path / "r" / "retriever.json").write_text(json.dumps({**head, "version": 9}))
    with pytest.raises(ValueError, match="retriever.json: expected .*'version': 1.*found .*9"):
        GFMRetriever.load(tmp_path / "r", encoder=letters())


def test_a_failed_save_leaves_the_old_folder(build, letters, tmp_path, monkeypatch):
    retriever = build()
    expected = retriever.retrieve(QUESTIONS, 2)
    retriever.save(tmp_path / "r")
    monkeypatch.setattr(KnowledgeGraph, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        retriever.save(tmp_path / "r")
    monkeypatch.undo()
    loaded = GFMRetriever.load(tmp_path / "r", encoder=letters(), device="cpu", cache=False)
    assert pairs(loaded.retrieve(QUESTIONS, 2)) == pairs(expected)


def test_a_system_with_it_is_saved_and_loaded(make_rag, build, letters, tmp_path):
    rag = make_rag()
    expected = rag.batch_query(QUESTIONS)
    rag.save(tmp_path / "rag")
    with pytest.raises(ValueError, match="a retriever in it is not of ragkit.rag") as caught:
        RAGSystem.load(tmp_path / "rag", device="cpu")
    code = str(caught.value).split("\n", 1)[1]  # the message is the code that loads it
    assert code.endswith(f"RAGSystem.load({str(tmp_path / 'rag')!r}, "
                         f"retriever=GFMRetriever.load({str(tmp_path / 'rag' / 'retriever')!r}))")  # fmt: skip
    *imports, call = code.split("\n")
    names = {}
    exec("\n".join(imports), names)  # noqa: S102
    assert names["GFMRetriever"] is GFMRetriever and names["RAGSystem"] is RAGSystem
    retriever = GFMRetriever.load(tmp_path / "rag" / "retriever", encoder=letters(), device="cpu", cache=False)
    loaded = RAGSystem.load(tmp_path / "rag", device="cpu", retriever=retriever)
    assert loaded.batch_query(QUESTIONS) == expected

    hybrid = make_rag(HybridRetriever([build(), build(ranker="simple")], "minmax"))
    expected = hybrid.batch_query(QUESTIONS)
    hybrid.save(tmp_path / "two")
    with pytest.raises(ValueError, match="retriever=HybridRetriever.load.*0: GFMRetriever.load.*1: GFMRetriever.load"):
        RAGSystem.load(tmp_path / "two", device="cpu")
    folder = tmp_path / "two" / "retriever"
    parts = {n: GFMRetriever.load(folder / str(n), encoder=letters(), device="cpu", cache=False) for n in (0, 1)}
    loaded = RAGSystem.load(tmp_path / "two", device="cpu", retriever=HybridRetriever.load(folder, parts))
    assert loaded.batch_query(QUESTIONS) == expected
    with pytest.raises(TypeError, match="a GFMRetriever has its passages already"):
        RAGSystem.from_documents(TEXTS, retriever=build())


@pytest.mark.slow
def test_import_of_the_room_stays_light():
    code = "import sys, ragkit.gfm; print('transformers' in sys.modules, 'GFMRetriever' in dir(ragkit.gfm))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False True", done.stderr  # it comes on first use


@pytest.mark.slow
def test_from_index_puts_the_checkpoints_texts_before_questions_and_relations(minilm, tmp_path):
    model = GNNRetriever(GFMSettings(rel_emb_dim=384, input_dim=8, hidden_dims=[8]))
    encoder = InstructedEncoder(Encoder("default", "cpu"), "Find facts for: ", "Relation: ")
    save_gfm(model, tmp_path / "model", encoder.facts)
    retriever = GFMRetriever.from_index("small_world", tmp_path / "model", device="cpu", cache=False)
    expected = encoder.encode(retriever.graph.relation_texts, "passage")
    torch.testing.assert_close(retriever.graph.rel_emb, expected.float(), atol=1e-5, rtol=0)
    question = "Where do the managers of Zeiss sit?"
    found = retriever.encoder.encode([question], "query")
    torch.testing.assert_close(found, encoder.encode([question], "query"), atol=1e-5, rtol=0)
    plain = GFMRetriever.from_index("small_world", tmp_path / "model", "default", device="cpu", cache=False)
    assert (plain.encoder.encode([question], "query") - found).abs().max() > 1e-3


@pytest.mark.slow
def test_the_small_world_with_the_real_encoder(minilm, tmp_path):
    torch.manual_seed(0)
    model = GNNRetriever(GFMSettings(rel_emb_dim=384, input_dim=16, hidden_dims=[16, 16]))
    save_gfm(model, tmp_path / "model", "default")
    retriever = GFMRetriever.from_index("small_world", tmp_path / "model", device="cpu", cache=tmp_path / "cache")
    assert retriever.store.ok
    questions = ["Where do the managers of Zeiss sit?", "Where did Kahlil Gibran work?"]
    links = retriever.linker.link(questions)
    assert [[link.name for link in row] for row in links] == [["zeiss"], ["kahlil gibran"]]
    found = retriever.retrieve([*questions, "and what now"], 5)  # the last one by the nearest name
    assert [len(row) for row in found] == [5, 5, 5]
    retriever.save(tmp_path / "saved")
    loaded = GFMRetriever.load(tmp_path / "saved", device="cpu", cache=tmp_path / "cache")
    assert pairs(loaded.retrieve([*questions, "and what now"], 5)) == pairs(found)
