from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.evaluation import (
    EvaluationResult,
    all_at_k,
    bootstrap_interval,
    compare,
    evaluate,
    exact_match,
    f1,
    filtered_hits_at_k,
    filtered_mrr,
    filtered_ranks,
    mrr,
    ndcg_at_k,
    normalize_answer,
    recall_at_k,
    retrieval_values,
)

# ---- retrieval metrics ----

RETRIEVED = [["a", "b", "c"], ["x", "y", "z"], ["g", "h"], ["a"]]
RELEVANT = [{"a", "c"}, {"q"}, {"h"}, set()]


def test_hand_worked_values():
    np.testing.assert_allclose(recall_at_k(RETRIEVED, RELEVANT, 1), [0.5, 0, 0, np.nan])
    np.testing.assert_allclose(recall_at_k(RETRIEVED, RELEVANT, 3), [1, 0, 1, np.nan])
    np.testing.assert_allclose(all_at_k(RETRIEVED, RELEVANT, 2), [0, 0, 1, np.nan])
    np.testing.assert_allclose(mrr(RETRIEVED, RELEVANT), [1, 0, 0.5, np.nan])
    np.testing.assert_allclose(mrr(RETRIEVED, RELEVANT, 1), [1, 0, 0, np.nan])
    # DCG = 1/log2(2) + 1/log2(4) = 1.5; ideal = 1/log2(2) + 1/log2(3) = 1.6309
    expected = [1.5 / (1 + 1 / math.log2(3)), 0, 1 / math.log2(3), np.nan]
    np.testing.assert_allclose(ndcg_at_k(RETRIEVED, RELEVANT, 3), expected)
    np.testing.assert_allclose(ndcg_at_k(RETRIEVED, RELEVANT, 1), [1, 0, 0, np.nan])


def test_a_passage_listed_twice_counts_once():
    assert recall_at_k([["a", "a", "b"]], [{"a", "b"}], 2)[0] == 0.5
    assert ndcg_at_k([["a", "a"]], [{"a"}], 2)[0] == 1.0


def test_nothing_retrieved_and_no_questions():
    assert recall_at_k([[]], [{"a"}], 5).tolist() == [0.0]
    assert mrr([[]], [{"a"}]).tolist() == [0.0] and ndcg_at_k([[]], [{"a"}], 5).tolist() == [0.0]
    assert recall_at_k([], [], 5).shape == (0,)
    with pytest.raises(ValueError, match="k: found 0, expected 1 or more"):
        recall_at_k([["a"]], [{"a"}], 0)
    with pytest.raises(ValueError, match="retrieved has 1 questions, relevant has 2"):
        recall_at_k([["a"]], [{"a"}, {"b"}], 1)


def naive(retrieved, relevant, k):
    """recall, all, ndcg and mrr of one question, written as in a textbook."""
    if not relevant:
        return (math.nan,) * 4
    top = retrieved[:k]
    recall = len(relevant & set(top)) / len(relevant)
    dcg = sum(1 / math.log2(rank + 1) for rank, p in enumerate(top, 1) if p in relevant)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))
    reciprocal = next((1 / rank for rank, p in enumerate(top, 1) if p in relevant), 0.0)
    return recall, float(relevant <= set(top)), dcg / ideal, reciprocal


passages = st.lists(st.sampled_from("abcdefghij"), unique=True)


@given(
    st.lists(st.tuples(passages, st.sets(st.sampled_from("abcdefghij"), max_size=4)), max_size=6), st.integers(1, 12)
)
def test_metrics_equal_the_textbook(rows, k):
    retrieved, relevant = [row for row, _ in rows], [wanted for _, wanted in rows]
    expected = np.array([naive(row, wanted, k) for row, wanted in rows]).reshape(-1, 4)
    found = [metric(retrieved, relevant, k) for metric in (recall_at_k, all_at_k, ndcg_at_k, mrr)]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, atol=1e-12)


# ---- filtered ranks ----


def test_filtered_hits_are_no_recall():
    """Gold at places 1 and 3: the one at 3 has one item before it that is not gold."""
    scores = [9.0, 8.0, 7.0, 6.0]
    assert recall_at_k([["0", "1", "2", "3"]], [{"0", "2"}], 2).tolist() == [0.5]
    ranks = filtered_ranks(scores, [0, 2])
    assert ranks.tolist() == [1, 2] and filtered_ranks(scores, [2, 0, 2]).tolist() == [2, 1]
    assert filtered_hits_at_k([ranks], 2).tolist() == [1.0] and filtered_hits_at_k([ranks], 1).tolist() == [0.5]
    assert filtered_mrr([ranks]).tolist() == [0.75]


def test_equal_items_that_are_not_gold_count_half():
    scores = np.array([1, 5, 1, 1, 5, 1], dtype=np.float32)
    assert filtered_ranks(scores, [1]).tolist() == [1.5]
    assert filtered_ranks(scores, [1, 4]).tolist() == [1, 1]  # gold items do not tie with each other
    assert filtered_ranks(scores, [0, 5]).tolist() == [4, 4]  # two are higher, and two others equal
    assert filtered_hits_at_k([np.array([1.5, 4.0])], 1).tolist() == [0]
    assert filtered_hits_at_k([np.array([1.5, 4.0])], 2).tolist() == [0.5]


def test_filtered_edges():
    assert filtered_ranks([1.0, 2.0], [0, 1]).tolist() == [1, 1]  # everything is gold
    assert filtered_ranks([1.0], []).shape == (0,)
    hits = filtered_hits_at_k([np.array([1.0]), np.array([])], 3)
    np.testing.assert_array_equal(hits, [1, np.nan])
    np.testing.assert_array_equal(filtered_mrr([np.array([]), np.array([4.0])]), [np.nan, 0.25])
    assert filtered_mrr([]).shape == (0,) and filtered_hits_at_k([], 1).shape == (0,)
    for gold in ([2], [-1]):
        with pytest.raises(ValueError, match=rf"gold: place {gold[0]} is not in 0 ... 1"):
            filtered_ranks([1.0, 2.0], gold)
    with pytest.raises(ValueError, match="place 1 is NaN"):
        filtered_ranks([1.0, math.nan], [0])
    with pytest.raises(ValueError, match="expected one row"):
        filtered_ranks(np.zeros((2, 2)), [0])
    with pytest.raises(ValueError, match="k: found 0, expected 1 or more"):
        filtered_hits_at_k([np.array([1.0])], 0)


some_scores = st.lists(st.integers(-2, 2), min_size=1, max_size=6)


@given(some_scores, st.data())
def test_filtered_ranks_are_v1s_on_average_over_all_ways_to_break_ties(scores, data):
    """v1: the place in one sorted order - the place among the gold items in it + 1."""
    gold = data.draw(st.lists(st.integers(0, len(scores) - 1), unique=True, min_size=1))
    drawn = []
    for shuffle in itertools.permutations(range(len(scores))):
        order = sorted(shuffle, key=lambda place: -scores[place])  # stable: ties as shuffled
        of_gold = [place for place in order if place in gold]
        drawn.append([order.index(place) - of_gold.index(place) + 1 for place in gold])
    np.testing.assert_allclose(filtered_ranks(scores, gold), np.mean(drawn, axis=0), atol=1e-9)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30, unique=True), st.data(), st.integers(1, 9))
def test_filtered_hits_are_never_below_recall(scores, data, k):
    gold = data.draw(st.lists(st.integers(0, len(scores) - 1), unique=True, min_size=1))
    order = np.argsort(-np.array(scores)).tolist()
    ranks = filtered_ranks(scores, gold)
    assert filtered_hits_at_k([ranks], k)[0] >= recall_at_k([order], [set(gold)], k)[0]
    assert ranks.min() == order.index(min(gold, key=order.index)) + 1  # the first gold item has its true rank
    assert filtered_mrr([ranks])[0] <= mrr([order], [set(gold)])[0] + 1e-12


# ---- answers ----


def test_squad_normalisation():
    assert normalize_answer("  The  Eiffel-Tower, (in) an A. ") == "eiffeltower in"
    assert normalize_answer("Theatre") == "theatre"


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "score"),
    [
        ("Paris.", ("paris",), 1, 1),
        ("the Paris", ("London", "Paris"), 1, 1),
        ("in Paris", ("Paris",), 0, 2 / 3),
        ("Paris Paris", ("Paris",), 0, 2 / 3),
        ("red blue green", ("blue red yellow",), 0, 2 / 3),
        ("London", ("Paris",), 0, 0),
        ("", ("Paris",), 0, 0),
        ("the", ("an",), 1, 1),
        ("Paris", (), 0, 0),
        ("Paris", "Paris", 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, golds, em, score):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(score)


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_and_one_for_equal_answers(left, right):
    assert f1(left, [right]) == pytest.approx(f1(right, [left]))
    assert 0 <= f1(left, [right]) <= 1
    if exact_match(left, [right]):
        assert f1(left, [right]) == 1


# ---- intervals ----


def result(scores, **more):
    return EvaluationResult([f"q{i}" for i in range(len(scores))], {"em": np.array(scores, dtype=float)}, **more)


@pytest.mark.parametrize(
    ("scores", "mean"), [([0, 0, 0, 0, 1], 0.2), ([0, 1, 0, 0], 0.25), ([0, 0], 0.0), ([1, 0], 0.5)]
)
def test_means_with_zeros(scores, mean):
    """FedRAG's running mean took a 0 for "not set yet": these came out as 1.0 and 0.5."""
    assert result(scores)["em"] == pytest.approx(mean)


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_questions():
    values = np.random.default_rng(1).random(2000) < 0.3
    low, high = bootstrap_interval(values.astype(float), n=4000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.002)
    assert high == pytest.approx(values.mean() + half, abs=0.002)


def test_bootstrap_interval_edges():
    assert bootstrap_interval([1, 1, 1]) == (1.0, 1.0)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert all(map(math.isnan, bootstrap_interval([])))
    assert bootstrap_interval([0, np.nan, 1], seed=3) == bootstrap_interval([0, 1], seed=3)
    assert bootstrap_interval([0, 1, 1], seed=3) != bootstrap_interval(np.random.default_rng(0).random(9), seed=4)
    low, high = bootstrap_interval(np.arange(10.0), level=0.5)
    assert low > bootstrap_interval(np.arange(10.0))[0] and high < bootstrap_interval(np.arange(10.0))[1]


# ---- evaluate ----


@dataclass
class Example:
    id: str
    question: str
    answers: tuple[str, ...] = ()
    supporting: tuple[str, ...] = ()


@dataclass
class Oracle:
    """A system whose answers can be worked out by hand: the question names its passages, the answer is the last."""

    seen: list[tuple[int, int]] = field(default_factory=list)
    config: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(top_k=2))

    def batch_retrieve(self, questions, top_k):
        return [[SimpleNamespace(id=name) for name in question.split()[:top_k]] for question in questions]

    def batch_generate(self, questions, passages):
        self.seen = [(len(question.split()), len(row)) for question, row in zip(questions, passages, strict=True)]
        return [f"The {row[-1].id}." for row in passages]


EXAMPLES = [
    Example("1", "p1 p2 p3", ("p2",), ("p1", "p3")),
    Example("2", "p4 p5 p6", ("wrong", "p6"), ("p5",)),
    Example("3", "p7 p8", ("p8",), ()),
    Example("4", "p9 p0", (), ("p9",)),
]


def test_evaluate_by_hand():
    system = Oracle()
    scores = evaluate(system, EXAMPLES, ks=(1, 3))
    np.testing.assert_allclose(scores.values["recall@1"], [0.5, 0, np.nan, 1])
    np.testing.assert_allclose(scores.values["recall@3"], [1, 1, np.nan, 1])
    np.testing.assert_allclose(scores.values["mrr"], [1, 0.5, np.nan, 1])
    np.testing.assert_allclose(scores.values["em"], [1, 0, 1, np.nan])
    assert scores["recall@1"] == 0.5 and scores.metrics["em"].n == 3
    assert scores.predictions == ["The p2.", "The p5.", "The p8.", "The p0."]
    assert scores.retrieved == [["p1", "p2", "p3"], ["p4", "p5", "p6"], ["p7", "p8"], ["p9", "p0"]]
    assert [n for _, n in system.seen] == [2, 2, 2, 2]  # the generator sees its own top_k, not max(ks)
    assert "4 questions, of them 1 without a supporting passage (no retrieval scores) and 1 without an answer" in str(
        scores
    )


def test_evaluate_parts():
    assert set(evaluate(Oracle(), EXAMPLES, ks=(2,), generate=False).values) == {"recall@2", "all@2", "ndcg@2", "mrr"}
    only_answers = evaluate(Oracle(), EXAMPLES, retrieve=False, top_k=1)
    assert set(only_answers.values) == {"em", "f1"} and only_answers.retrieved is None
    assert only_answers.predictions[0] == "The p1."
    with pytest.raises(ValueError, match="no questions"):
        evaluate(Oracle(), [])
    with pytest.raises(ValueError, match="more than once, for example '1'"):
        evaluate(Oracle(), [EXAMPLES[0], EXAMPLES[0]])
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(Oracle(), EXAMPLES, generate=False, retrieve=False)


def test_no_question_with_support_gives_a_dash_not_a_crash():
    scores = evaluate(Oracle(), [EXAMPLES[2]], ks=(1,))
    assert math.isnan(scores["recall@1"]) and scores.metrics["recall@1"].n == 0
    assert "-" in str(scores)
    assert EvaluationResult.from_dict(json.loads(json.dumps(scores.to_dict()))).metrics["recall@1"].n == 0


def test_result_round_trip_through_json():
    scores = evaluate(Oracle(), EXAMPLES, ks=(1, 3), bootstrap=300, seed=5)
    text = json.dumps(scores.to_dict(), allow_nan=False)
    again = EvaluationResult.from_dict(json.loads(text))
    assert again.metrics == scores.metrics and again.predictions == scores.predictions
    for name, column in scores.values.items():
        np.testing.assert_array_equal(again.values[name], column)
    with pytest.raises(ValueError, match="ids and values missing"):
        EvaluationResult.from_dict({"scores": 1})


def test_subset_by_mask_and_by_ids():
    scores = evaluate(Oracle(), EXAMPLES, ks=(1,))
    by_ids = scores.subset(["4", "1"])
    assert by_ids.ids == ["4", "1"] and by_ids.predictions == ["The p0.", "The p2."]
    by_mask = scores.subset(np.array([True, False, False, True]))
    assert by_mask.ids == ["1", "4"] and by_mask["recall@1"] == 0.75
    with pytest.raises(ValueError, match="not in this result, for example '9'"):
        scores.subset(["1", "9"])
    with pytest.raises(ValueError, match="mask has 1 entries"):
        scores.subset([True])


def test_values_and_ids_must_fit():
    with pytest.raises(ValueError, match="em: found 1 values, expected 2"):
        EvaluationResult(["a", "b"], {"em": np.zeros(1)})


# ---- compare ----


def test_the_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    gain = rng.normal(0.03, 0.02, 200)  # small beside the spread of the scores themselves
    change = compare(result(base), result(base + gain))
    assert change.difference["em"].mean == pytest.approx(gain.mean())
    found = change.difference["em"].low, change.difference["em"].high
    assert found == pytest.approx(bootstrap_interval(gain), abs=1e-12)
    assert change.significant("em")
    low, high = bootstrap_interval(base)
    assert low < base.mean() + gain.mean() < high  # unpaired intervals would not have seen it
    noise = compare(result(base), result(base + rng.normal(0, 1, 200)))
    assert not noise.significant("em")
    worse = compare(result(base), result(base - 1))
    assert worse.significant("em") and worse.difference["em"].high == pytest.approx(-1)


def test_compare_aligns_by_question_and_refuses_other_questions():
    before = EvaluationResult(["a", "b"], {"em": np.array([0.0, 1.0])})
    after = EvaluationResult(["b", "a"], {"em": np.array([1.0, 0.0]), "f1": np.zeros(2)})
    assert compare(before, after).difference["em"].mean == 0
    assert compare(before, after).differences["after"]["em"].low == 0
    with pytest.raises(ValueError, match="different questions: 2 are in one of them only"):
        compare(before, EvaluationResult(["a", "c"], {"em": np.zeros(2)}))
    with pytest.raises(ValueError, match="no metric in common"):
        compare(before, EvaluationResult(["a", "b"], {"mrr": np.zeros(2)}))
    with pytest.raises(ValueError, match="expected 2 different names"):
        compare(before, after, labels=["one"])


def test_questions_without_a_value_in_either_are_left_out_of_the_difference():
    change = compare(result([0, np.nan, 1, 0]), result([1, 1, np.nan, 1]))
    assert change.difference["em"].n == 2 and change.difference["em"].mean == 1


def test_table_in_text_and_html():
    before, after, control = result([0, 0, 1, 0]), result([1, 1, 1, 1]), result([0, 0, 1, 0])
    text = str(compare(before, after))
    assert text.splitlines()[0].split() == ["metric", "before", "after", "difference", "[95", "%", "interval]", "n"]
    assert "0.250" in text and "+0.750" in text and text.splitlines()[2].split()[-1] == "4"
    three = compare(before, after, control, labels=["base", "<b>tuned</b>", "control"])
    assert "control - base" in str(three) and three.differences["control"]["em"].mean == 0
    assert not three.significant("em", "control")
    page = three._repr_html_()
    assert "&lt;b&gt;tuned&lt;/b&gt;" in page and "<b>tuned" not in page
    assert page.count("<tr>") == 2 and before._repr_html_().startswith("<table>")
    assert json.loads(json.dumps(three.to_dict()))["differences"]["control"]["em"]["mean"] == 0


def test_retrieval_values_has_every_metric_at_every_k():
    values = retrieval_values(RETRIEVED, RELEVANT, (5, 2, 2))
    assert list(values) == ["recall@2", "recall@5", "all@2", "all@5", "ndcg@2", "ndcg@5", "mrr"]
