"""The whole system: questions to answers, saved and loaded with the same answers, and what it says to bad input."""

from __future__ import annotations

import json

import pytest
import torch

from ragkit.config import RAGConfig
from ragkit.rag import Answer, CorpusError, DenseRetriever, Generator, RAGSystem, RetrievedPassage, StoreError
from ragkit.rag.corpus import Passage, load_corpus
from ragkit.rag.qdrant import QdrantStore
from ragkit.rag.store import MemoryStore
from ragkit.rag.system import index_corpus
from ragkit.settings import ConfigError

CORPUS = {
    "Lima": "Lima is the capital and largest city of Peru.",
    "Paris": "Paris is the capital of France, on the Seine.",
    "Nile": "The Nile is a river in Africa that flows north through Egypt to the Mediterranean.",
}
QUESTIONS = ["What is the capital of Peru?", "Which river flows through Egypt?", "Capital of France?"]


@pytest.fixture
def system(minilm, generator):
    return RAGSystem.from_documents(
        CORPUS, retriever=DenseRetriever(minilm), generator=generator, prompt="plain", top_k=2, device="cpu"
    )


def same(found, expected):
    """Equal answers and passages; scores but for the last digits, which depend on how a batch lies in memory."""
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    for answer, wanted in zip(found, expected, strict=True):
        assert [p.id for p in answer.passages] == [p.id for p in wanted.passages]
        assert [p.score for p in answer.passages] == pytest.approx([p.score for p in wanted.passages], abs=1e-5)


def test_retrieve_gives_id_title_text_and_score(system):
    first = system.retrieve(QUESTIONS[0])[0]
    assert (first.id, first.title, first.text) == ("Lima", "Lima", CORPUS["Lima"]) and 0.3 < first.score <= 1
    assert [len(row) for row in system.batch_retrieve(QUESTIONS)] == [2, 2, 2]
    assert [row[0].id for row in system.batch_retrieve(QUESTIONS)] == ["Lima", "Nile", "Paris"]
    assert len(system.retrieve(QUESTIONS[0], top_k=99)) == 3  # more than there are gives all


def test_batches_give_what_single_calls_give(system):
    answers = system.batch_query(QUESTIONS)
    same(answers, [system.query(question) for question in QUESTIONS])
    assert system.batch_generate(QUESTIONS, system.batch_retrieve(QUESTIONS)) == [answer.text for answer in answers]
    assert system.generate(QUESTIONS[0], [CORPUS["Lima"], CORPUS["Paris"]]) == answers[0].text  # texts do as well
    assert system.batch_query([]) == []


def test_the_configured_prompt_is_the_one_used(system, generator):
    prompts = []
    generator.generate_ids = lambda ids: prompts.extend(ids) or [""] * len(ids)
    system.generate("Where?", ["Here."])
    assert generator.tokenizer.decode(prompts[0]) == "Passage: Here.\nQuestion: Where?\nAnswer:"


def test_passages_that_are_too_long_are_cut(system):
    assert isinstance(system.generate("Where?", ["The Nile flows through Egypt. " * 100] * 3), str)


def test_answer_shows_itself():
    passage = RetrievedPassage("<id>", "a <b>bold</b> & long text " * 20, "<script>", score=0.5)
    answer = Answer("Is 1 < 2?", "yes & no", (passage,))
    assert "Question: Is 1 < 2?\nAnswer:   yes & no\n  [1] 0.500  <script>: a <b>bold</b>" in repr(answer)
    page = answer._repr_html_()
    assert "Is 1 &lt; 2?" in page and "yes &amp; no" in page and "&lt;script&gt;" in page and "<script>" not in page
    assert "<b>bold" not in page


def test_save_and_load_give_the_same_answers(system, tmp_path):
    system.save(tmp_path / "rag")
    loaded = RAGSystem.load(tmp_path / "rag")
    same(loaded.batch_query(QUESTIONS), system.batch_query(QUESTIONS))
    assert loaded.config == system.config and loaded.config.top_k == 2
    loaded.save(tmp_path / "rag")  # over itself
    (tmp_path / "rag").rename(tmp_path / "moved")
    same(RAGSystem.load(tmp_path / "moved", device="cpu").batch_query(QUESTIONS), system.batch_query(QUESTIONS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]


def test_a_failed_save_leaves_the_old_system(system, tmp_path, monkeypatch):
    system.save(tmp_path / "rag")
    before = system.batch_query(QUESTIONS)
    monkeypatch.setattr(Generator, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        system.save(tmp_path / "rag")
    same(RAGSystem.load(tmp_path / "rag").batch_query(QUESTIONS), before)
    assert [path.name for path in tmp_path.iterdir()] == ["rag"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("system.json", None, "system.json: not a saved system"),
        ("system.json", '{"format": 9}', "system.json: expected format 1"),
        ("config.yaml", None, "config.yaml: missing"),
        ("config.yaml", "top_k: 0", "top_k: found 0"),
        ("retriever/retriever.json", None, "retriever.json: not a saved retriever"),
        ("retriever/store/embeddings.safetensors", "x", "embeddings.safetensors: missing or corrupt"),
        ("retriever/store/passages.jsonl", "", "passages.jsonl: holds 0 passages, store.json says 3"),
        ("generator/generator.json", "", "generator.json: not a saved generator"),
        ("generator/model/model.safetensors", "x", "no language model could be loaded from .*model"),
    ],
)
def test_a_damaged_folder_is_named(system, tmp_path, file, content, message):
    system.save(tmp_path / "rag")
    if content is None:
        (tmp_path / "rag" / file).unlink()
    else:
        (tmp_path / "rag" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        RAGSystem.load(tmp_path / "rag", device="cpu")


def test_no_system_there(tmp_path):
    with pytest.raises(ValueError, match="no saved system at .*nothing"):
        RAGSystem.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("corpus", "options", "error", "message"),
    [
        ([], {}, CorpusError, "is empty"),
        ({"a": ""}, {}, CorpusError, "has no text"),
        (CORPUS, {"top_q": 3}, ConfigError, "top_k"),
        (CORPUS, {"top_k": 0}, ConfigError, "top_k"),
        (CORPUS, {"prompt": "plane"}, ValueError, "did you mean 'plain'"),
    ],
)
def test_bad_input_is_an_error_before_any_model_is_loaded(corpus, options, error, message, monkeypatch):
    monkeypatch.setattr("ragkit.rag.system.make_retriever", lambda config: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=message):
        RAGSystem.from_documents(corpus, **options)


def test_lists_that_do_not_match(system):
    with pytest.raises(ValueError, match="3 questions, but passages for 1"):
        system.batch_generate(QUESTIONS, [["x"]])
    with pytest.raises(TypeError, match="use retrieve for one"):
        system.batch_retrieve("one string")


def test_settings_reach_the_parts(tiny_lm, tokenizer, tmp_path):
    tiny_lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    config = RAGConfig(generator=str(tmp_path / "lm"), device="cpu", max_new_tokens=5, top_k=1)
    system = RAGSystem.from_documents(
        CORPUS, config, query_prompt="q: ", max_passage_tokens=32, encode_batch_size=2, max_prompt_tokens=50
    )
    assert (system.generator.max_new_tokens, system.generator.max_prompt_tokens) == (5, 50)
    retriever = system.retriever
    assert (retriever.query_prompt, retriever.batch_size, retriever.query_encoder.model.max_seq_length) == (
        "q: ",
        2,
        32,
    )
    assert system.config.top_k == 1 and config.query_prompt == ""  # the given settings stay as they were
    assert len(system.retrieve(QUESTIONS[0])) == 1


def test_qdrant_is_reused_only_where_nothing_is_lost(minilm, generator, tmp_path):
    options = {"store": "qdrant", "qdrant_path": str(tmp_path / "q"), "device": "cpu", "prompt": "plain"}
    system = RAGSystem.from_documents(CORPUS, generator=generator, **options)
    system.retriever.store.close()

    again = RAGSystem.from_documents(CORPUS, generator=generator, **options)  # the same cell, run twice
    assert len(again.retriever.store) == 3
    again.retriever.store.close()
    with pytest.raises(StoreError, match="holds other passages already, for example 'Lima'"):
        RAGSystem.from_documents({"Rome": "Rome is in Italy."}, generator=generator, **options)


def test_indexing_a_corpus_never_empties_a_collection_of_another(minilm, tmp_path):
    store = QdrantStore(path=tmp_path / "q")
    retriever = DenseRetriever(minilm, store=store)
    first = load_corpus(["Lima is in Peru.", "Paris is in France."])  # a list of texts: the ids are row numbers
    index_corpus(retriever, first)
    index_corpus(retriever, first)
    for other, which in ((["Rome is in Italy."] * 2, "'0' with another text;"), (CORPUS, "'0';")):
        with pytest.raises(StoreError, match=f"holds other passages already, for example {which}"):
            index_corpus(retriever, load_corpus(other))
        assert list(store.passages()) == first
    index_corpus(retriever, [*first, Passage("nile", "The Nile.")])  # nothing is lost where it only grows
    assert len(store) == 3
    store.close()


def test_a_qdrant_system_loads_with_its_collection_or_without(minilm, generator, tmp_path):
    options = {"store": "qdrant", "qdrant_path": str(tmp_path / "q"), "device": "cpu", "prompt": "plain"}
    system = RAGSystem.from_documents(CORPUS, generator=generator, **options)
    expected = system.batch_query(QUESTIONS)
    system.save(tmp_path / "rag")
    system.retriever.store.close()

    loaded = RAGSystem.load(tmp_path / "rag")  # the collection is there
    same(loaded.batch_query(QUESTIONS), expected)
    loaded.retriever.store.delete(["Nile"])
    loaded.retriever.store.close()
    with pytest.raises(StoreError, match="no longer holds the passages of the saved system: its ids are others"):
        RAGSystem.load(tmp_path / "rag")
    store = MemoryStore.load(tmp_path / "rag" / "retriever" / "store")
    same(RAGSystem.load(tmp_path / "rag", store=store).batch_query(QUESTIONS), expected)
    (tmp_path / "q").rename(tmp_path / "away")
    loaded = RAGSystem.load(tmp_path / "rag")  # the collection is gone: filled from the folder
    same(loaded.batch_query(QUESTIONS), expected)
    loaded.retriever.store.close()


def test_a_collection_with_other_texts_or_vectors_is_refused(minilm, generator, tmp_path):
    options = {"store": "qdrant", "qdrant_path": str(tmp_path / "q"), "device": "cpu", "prompt": "plain"}
    system = RAGSystem.from_documents(CORPUS, generator=generator, **options)
    system.save(tmp_path / "rag")
    store, passage = system.retriever.store, Passage("Nile", CORPUS["Nile"], "Nile")
    vector = store.embeddings(["Nile"])

    def changed(passage, vector):
        store = QdrantStore(path=tmp_path / "q")
        store.update([passage], vector)
        store.close()

    store.close()
    changed(Passage("Nile", "The Nile is long.", "Nile"), vector)
    with pytest.raises(StoreError, match="of the saved system: the passage 'Nile' has another text"):
        RAGSystem.load(tmp_path / "rag")
    changed(passage, vector + 0.01 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(
        StoreError, match="the vector of the passage 'Nile' is another"
    ):  # as training "both" leaves it
        RAGSystem.load(tmp_path / "rag")
    changed(passage, vector)
    RAGSystem.load(tmp_path / "rag").retriever.store.close()


def test_the_saved_settings_are_readable(system, tmp_path):
    system.save(tmp_path / "rag")
    assert "top_k: 2" in (tmp_path / "rag" / "config.yaml").read_text()
    assert json.loads((tmp_path / "rag" / "system.json").read_text()) == {"format": 1}
