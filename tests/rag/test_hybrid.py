"""Fusion of retrievers: hand-worked numbers, a slow reference, ties, and the folder."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.rag import DenseRetriever, HybridRetriever, Passage, RAGSystem, RetrievedPassage
from ragkit.rag.hybrid import fuse_scores, reciprocal_ranks


class Lists:
    """A retriever with one fixed ranking: {id: score}, best first; keeps the depths it was asked for."""

    def __init__(self, ranking, text="text of {}"):
        self.ranking, self.text, self.depths = ranking, text, []

    def retrieve(self, questions, top_k):
        self.depths.append(top_k)
        ordered = sorted(self.ranking.items(), key=lambda pair: -pair[1])[:top_k]
        return [[RetrievedPassage(i, self.text.format(i), score=s) for i, s in ordered] for _ in questions]


def fused(retrievers, top_k=9, **options):
    return {p.id: p.score for p in HybridRetriever(retrievers, **options).retrieve(["q"], top_k)[0]}


A = Lists({"x": 9.0, "y": 5.0, "z": 1.0})
B = Lists({"z": 0.9, "w": 0.8})


def test_reciprocal_ranks_by_hand():
    found = fused([A, B])
    expected = {"z": 1 / 63 + 1 / 61, "x": 1 / 61, "w": 1 / 62, "y": 1 / 62}
    assert found == pytest.approx(expected, rel=1e-15)
    assert list(found) == ["z", "x", "y", "w"]  # y and w tie: y is of the first retriever
    assert list(fused([B, A])) == ["z", "x", "w", "y"]
    assert fused([A, B], k=1, weights=[2, 1]) == pytest.approx({"x": 1.0, "z": 1.0, "y": 2 / 3, "w": 1 / 3})


def test_scores_by_hand():
    # A: x 1, y 1/2, z 0; B: z 1, w 0; what one did not find counts as its lowest
    assert fused([A, B], method="minmax") == pytest.approx({"x": 1.0, "z": 1.0, "y": 0.5, "w": 0.0})
    assert list(fused([A, B], method="minmax")) == ["x", "z", "y", "w"]
    assert fused([A, B], method="minmax", weights=[1, 3]) == pytest.approx({"z": 3.0, "x": 1.0, "y": 0.5, "w": 0.0})
    r = math.sqrt(1.5)  # A: mean 5, deviation sqrt(32 / 3); B: mean 0.85, deviation 0.05
    assert fused([A, B], method="zscore") == pytest.approx({"x": r - 1, "y": -1, "z": -r + 1, "w": -r - 1})
    assert fused([A, B], method="zscore", missing="zero") == pytest.approx({"x": r, "y": 0, "z": -r + 1, "w": -1})


def test_one_candidate_and_equal_scores():
    one, equal, none = Lists({"a": 3.0}), Lists({"b": 2.0, "a": 2.0}), Lists({})
    assert fused([one, equal], method="minmax") == {"a": 2.0, "b": 1.0}
    assert fused([one, equal], method="zscore") == {"a": 0.0, "b": 0.0}
    for method in ("rrf", "minmax", "zscore"):
        assert fused([none, none], method=method) == {}
        assert list(fused([none, equal], method=method)) == ["b", "a"]
    assert fused([none, A], method="zscore") == fused([A, none], method="zscore")


def test_depth_and_top_k():
    deep = Lists({str(n): -n for n in range(50)})
    hybrid = HybridRetriever([deep, B], depth=10)
    assert len(hybrid.retrieve(["q"], 3)[0]) == 3 and deep.depths == [10]
    assert len(hybrid.retrieve(["q"], 30)[0]) == 30 and deep.depths == [10, 30]
    assert hybrid.retrieve([], 3) == [] and len(deep.depths) == 2
    with pytest.raises(TypeError, match="one string"):
        hybrid.retrieve("q", 3)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        hybrid.retrieve(["q"], 0)


def test_one_id_with_two_texts_is_an_error():
    with pytest.raises(ValueError, match="'z' has another text in Lists .retriever 1."):
        fused([A, Lists({"z": 1.0}, text="other {}")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrievers": [A]}, "expected two or more, found 1"),
        ({"weights": [1.0]}, "found 1 for 2 retrievers"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"weights": [-1, 2]}, "numbers from 0"),
        ({"weights": [math.nan, 2]}, "numbers from 0"),
        ({"logs": [True]}, "logs: found 1 for 2 retrievers"),
        ({"method": "rff"}, "expected one of rrf, minmax, zscore, loglinear, found 'rff'"),
        ({"missing": "mean"}, '"lowest" or "zero"'),
        ({"depth": 0}, "depth from 1"),
        ({"k": -1}, "k from 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        HybridRetriever(**{"retrievers": [A, B], **options})


RANKINGS = st.lists(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(-3, 3).map(float), max_size=8), min_size=2, max_size=4
)


@given(RANKINGS, st.data())
def test_rrf_is_exact_and_does_not_depend_on_the_order(rankings, data):
    weights = data.draw(st.lists(st.integers(1, 4), min_size=len(rankings), max_size=len(rankings)))
    found = fused([Lists(r) for r in rankings], weights=weights)
    exact: dict[str, Fraction] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, (identity, _) in enumerate(sorted(ranking.items(), key=lambda pair: -pair[1]), start=1):
            exact[identity] = exact.get(identity, Fraction(0)) + Fraction(weight, 60 + rank)
    assert found == pytest.approx({identity: float(value) for identity, value in exact.items()}, rel=1e-15)
    ordered = [exact[identity] for identity in found]
    assert all(a >= b - Fraction(1, 10**15) for a, b in zip(ordered, ordered[1:], strict=False))
    backwards = fused([Lists(r) for r in rankings[::-1]], weights=weights[::-1])
    assert backwards == found  # to the bit


@given(RANKINGS, st.sampled_from(["minmax", "zscore"]), st.sampled_from(["lowest", "zero"]), st.data())
def test_fused_scores_against_a_slow_reference(rankings, method, missing, data):
    weights = data.draw(st.lists(st.integers(1, 4), min_size=len(rankings), max_size=len(rankings)))
    ids = sorted({identity for ranking in rankings for identity in ranking})
    expected = dict.fromkeys(ids, 0.0)
    for ranking, weight in zip(rankings, weights, strict=True):
        values = list(ranking.values())
        if not values:
            continue
        if method == "minmax":
            low, span = min(values), max(values) - min(values)
            scaled = {i: (s - low) / span if span else 1.0 for i, s in ranking.items()}
            least = 0.0
        else:
            mean, std = statistics.fmean(values), statistics.pstdev(values)
            scaled = {i: (s - mean) / std if std else 0.0 for i, s in ranking.items()}
            least = min(scaled.values())
        for identity in ids:
            expected[identity] += weight * scaled.get(identity, least if missing == "lowest" else 0.0)
    found = fused([Lists(r) for r in rankings], method=method, missing=missing, weights=weights)
    assert found == pytest.approx(expected, abs=1e-12)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_log_linear_fusion_by_hand():
    graph, dense = Lists({"x": 3.0, "y": 1.0, "z": 0.0}), Lists({"y": 0.9, "w": 0.5})
    found = fused([graph, dense], method="loglinear", weights=[1, 8])
    expected = {
        "x": math.log(0.75 + 1e-4) + 8 * 0.5,  # not found by the second: its lowest
        "y": math.log(0.25 + 1e-4) + 8 * 0.9,
        "z": math.log(1e-4) + 8 * 0.5,
        "w": math.log(1e-4) + 8 * 0.5,
    }
    assert found == pytest.approx(expected) and list(found) == ["y", "x", "z", "w"]
    both = fused([graph, graph], method="loglinear", logs=[True, True])
    assert both["x"] == pytest.approx(2 * math.log(0.75 + 1e-4))
    assert fused([Lists({}), dense], method="loglinear")["y"] == pytest.approx(math.log(1e-4) + 0.9)
    with pytest.raises(ValueError, match="-1 has no logarithm"):
        fused([Lists({"x": -1.0}), dense], method="loglinear")


def test_fuse_scores_on_matrices():
    inf = torch.inf
    scores = torch.tensor([[[1.0, 3, -inf, -inf], [0, 0, 2, -inf]], [[-inf, 5, 7, -inf], [-inf, -inf, -inf, -inf]]])
    found = fuse_scores(scores, [1, 2])
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.0, 1.0, 2.0, -inf], [0.0, 0.0, 1.0, -inf]]
    assert fuse_scores(torch.zeros(2, 3, 0), [1, 1]).shape == (3, 0)
    large = torch.tensor([[[1e8 + 0.1, 1e8 + 0.1, 1e8 + 0.1]]], dtype=torch.float64)  # rounding makes no deviation
    assert fuse_scores(large, [1], "zscore").tolist() == [[0, 0, 0]]
    for wrong, message in (
        ((scores, [1]), r"expected \[1, B, C\]"),
        ((scores * math.nan, [1, 1]), "NaN or infinity"),
        ((-scores, [1, 1]), "NaN or infinity"),
        ((scores, [1, 1], "max"), "found 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_scores(*wrong)
    assert reciprocal_ranks([None, 1], [1.0, 1.0], k=0) == 1.0


# ---- with dense retrievers, on disk ----

CORPUS = [Passage("Lima", "Lima is the capital of Peru."), Passage("Paris", "Paris is the capital of France.")]


@pytest.fixture
def hybrid(minilm):
    one, two = DenseRetriever(minilm), DenseRetriever(minilm, query_prompt="query: ")
    one.index(CORPUS)
    two.index([*CORPUS, Passage("Nile", "The Nile is a river.")])
    return HybridRetriever([one, two], "zscore", weights=[1, 2], depth=7)


def test_a_system_with_a_hybrid_is_saved_and_loaded(hybrid, generator, tmp_path):
    rag = RAGSystem(hybrid, generator)
    expected = rag.batch_query(["Capital of Peru?", "Which river?"], top_k=2)
    assert [answer.passages[0].id for answer in expected] == ["Lima", "Nile"]
    assert rag.retriever.store is hybrid.retrievers[0].store
    rag.save(tmp_path / "rag")
    loaded = RAGSystem.load(tmp_path / "rag", device="cpu")
    found = loaded.batch_query(["Capital of Peru?", "Which river?"], top_k=2)
    assert [a.text for a in found] == [a.text for a in expected]
    for answer, wanted in zip(found, expected, strict=True):
        assert [p.id for p in answer.passages] == [p.id for p in wanted.passages]
        assert [p.score for p in answer.passages] == pytest.approx([p.score for p in wanted.passages], abs=1e-4)
    assert (loaded.retriever.method, loaded.retriever.weights, loaded.retriever.depth) == ("zscore", [1.0, 2.0], 7)
    with pytest.raises(ValueError, match="store: the saved retriever"):
        RAGSystem.load(tmp_path / "rag", device="cpu", store=hybrid.store)
    head = tmp_path / "rag" / "retriever" / "hybrid.json"
    for content in (head.read_text()[:30], '{"format": 9, "retrievers": [], "settings": {}}', "[]"):
        head.write_text(content)
        with pytest.raises(ValueError, match="hybrid.json: not a saved HybridRetriever"):
            RAGSystem.load(tmp_path / "rag", device="cpu")


def test_what_cannot_be_saved_is_said_before_anything_is_written(hybrid, generator, tmp_path):
    with pytest.raises(TypeError, match="retriever 1, a Lists, has no save"):
        HybridRetriever([hybrid, A]).save(tmp_path / "h")
    with pytest.raises(TypeError, match="Lists has none"):
        RAGSystem(A, generator).save(tmp_path / "h")
    assert not list(tmp_path.iterdir())
    with pytest.raises(AttributeError, match="has a store"):
        HybridRetriever([A, B]).store  # noqa: B018


def test_a_class_that_a_folder_names_is_not_imported(hybrid, tmp_path):
    hybrid.save(tmp_path / "h")
    head = tmp_path / "h" / "hybrid.json"
    head.write_text(head.read_text().replace("ragkit.rag.retriever.DenseRetriever", "antigravity.Retriever", 1))
    with pytest.raises(ValueError, match=r"from antigravity import Retriever\n.*retrievers=\{0: Retriever.load"):
        HybridRetriever.load(tmp_path / "h", device="cpu")
    loaded = HybridRetriever.load(tmp_path / "h", {0: hybrid.retrievers[0]}, device="cpu")
    assert loaded.retrieve(["Capital of Peru?"], 1)[0][0].id == "Lima"
