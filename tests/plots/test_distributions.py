"""Bars of P_R and Q_LM as they are in the rows, with the divergence that LSR makes small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragkit_kernels.lsr_loss import lm_distribution

from ragkit.lsr_config import LSRConfig
from ragkit.plots import distributions
from ragkit.plots.distributions import divergence
from ragkit.tuning.lsr_objective import teacher_values
from ragkit.tuning.lsr_table import LSRLine, LSRTable, TeacherSummary
from ragkit.tuning.teacher import LSRRow

CONFIG = LSRConfig()


def line(name="q1", p=(0.7, 0.2, 0.1), q=(0.25, 0.5, 0.25)):
    return LSRLine(name, f"What of {name}?", "Lima", ("a: x: y", "b: text", "c: text"), p, q, (-1.0, -0.5, -1.0))


def bars(axes):
    """label -> widths from top to bottom."""
    return {c.get_label(): [bar.get_width() for bar in c.patches] for c in axes.containers}


def test_bars_are_the_distributions_and_the_title_has_their_divergence():
    plot = distributions(line(), CONFIG, supporting={"q1": {"b"}})
    axes = plot.figure.axes[0]
    assert bars(axes) == {"P_R, retriever": [0.7, 0.2, 0.1], "Q_LM, teacher": [0.25, 0.5, 0.25]}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b (gold)", "c"]
    kl = 0.7 * np.log(0.7 / 0.25) + 0.2 * np.log(0.2 / 0.5) + 0.1 * np.log(0.1 / 0.25)
    assert f"KL(P_R ‖ Q_LM): {kl:.2f} nats" in axes.get_title(loc="left")
    assert "What of q1? → Lima" in axes.get_title(loc="left")
    assert f"Q_LM is largest for b (0.50); P_R, retriever, for a (0.70), KL(P_R||Q_LM) {kl:.2f} nats" in plot.alt
    hatches = [c.patches[0].get_hatch() for c in axes.containers]
    assert not hatches[0] and hatches[1]


def test_the_other_direction():
    config = LSRConfig(direction="KL(Q_LM||P_R)")
    kl = 0.25 * np.log(0.25 / 0.7) + 0.5 * np.log(0.5 / 0.2) + 0.25 * np.log(0.25 / 0.1)
    assert f"KL(Q_LM||P_R) {kl:.2f} nats" in distributions(line(), config).alt


def test_before_and_after():
    plot = distributions({"before": [line()], "after": [line(p=(0.25, 0.5, 0.25))]}, CONFIG)
    drawn = bars(plot.figure.axes[0])
    assert list(drawn) == ["P_R, before", "P_R, after", "Q_LM, teacher"]
    assert drawn["P_R, after"] == drawn["Q_LM, teacher"]
    assert "after 0 nats" in plot.figure.axes[0].get_title(loc="left")
    for other in (line("q2"), []):
        with pytest.raises(ValueError, match="same passages"):
            distributions({"before": other, "after": line()}, CONFIG)


def test_a_table_shows_its_first_questions():
    lines = [line(f"q{i}") for i in range(7)]
    plot = distributions(LSRTable(lines, TeacherSummary(7, 0.5, 0.5, 0.3), "mean_logprob"), CONFIG, n=3)
    assert sum(axes.get_visible() for axes in plot.figure.axes) == 3
    assert "(3 of 7 questions)" in plot.alt and "q2" in plot.alt and "q3" not in plot.alt
    plot.png(50)


@pytest.mark.parametrize("score", ["mean_logprob", "logprob", "token_prob", "prob"])
def test_a_row_has_the_teacher_only(score):
    config = LSRConfig(score=score, beta=0.3)
    row = LSRRow("q", "What?", ("a", "b"), (-0.5, -2.0))
    scores = torch.tensor([row.lm_scores])
    wanted = lm_distribution(teacher_values(scores, score), config.beta, torch.ones(1, 2, dtype=torch.bool))[0]
    drawn = bars(distributions([row], config).figure.axes[0])
    assert list(drawn) == ["Q_LM, teacher"]
    np.testing.assert_allclose(drawn["Q_LM, teacher"], wanted.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="give the LSRConfig"):
        distributions([row])


def test_nothing_to_draw():
    for none in ([], {}, {"before": []}):
        with pytest.raises(ValueError, match="no question"):
            distributions(none, CONFIG)


def test_an_impossible_passage_is_infinitely_far():
    assert "infinite nats" in distributions(line(q=(0.0, 0.5, 0.5)), CONFIG).alt


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=8))
def test_the_divergence_is_that_of_pytorch(pairs):
    p, q = np.array(pairs).T / np.array(pairs).sum(0)[:, None]
    wanted = float(torch.nn.functional.kl_div(torch.tensor(q).log(), torch.tensor(p), reduction="sum"))
    assert divergence(p, q) == pytest.approx(wanted, abs=1e-12) and divergence(p, p) == 0


def test_a_probability_that_is_no_number_has_no_divergence():
    plot = distributions(line(p=(np.nan, 0.5, 0.5)), CONFIG)
    assert "for none (not a number), KL(P_R||Q_LM) not a number" in plot.alt
    assert np.isnan(divergence(np.array([np.nan, 1.0]), np.array([0.5, 0.5])))


def test_of_many_passages_those_with_most_probability_are_drawn():
    p, q = np.full(100, 0.5 / 98), np.full(100, 0.4 / 98)
    p[[7, 80]], q[[7, 99]] = 0.25, 0.3
    many = LSRLine("q", "Which?", "x", tuple(f"p{i}: t" for i in range(100)), tuple(p), tuple(q), (0.0,) * 100)
    plot = distributions(many, CONFIG)
    axes = plot.figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert len(names) == 24 and {"p7", "p80", "p99"} <= set(names) and plot.size[1] < 1000
    assert bars(axes)["P_R, retriever"][names.index("p80")] == 0.25
    assert "the largest 24 of 100 passages" in axes.get_title(loc="left") and "(100 passages)" in plot.alt


def test_titles_stay_in_the_picture_and_keep_the_answer():
    question = "Which of all the things that can be asked of anybody is this? " * 2
    passages = ("a passage whose id is very long indeed 1: x",) * 3
    p, q, scores = (0.7, 0.2, 0.1), (0.2, 0.5, 0.3), (0.0,) * 3
    lines = [LSRLine(f"q{i}", question, "Lima", passages, p, q, scores) for i in range(2)]
    figure = distributions({"before": lines, "after": lines}, CONFIG).figure
    left, right = (axes._left_title.get_window_extent() for axes in figure.axes)
    assert left.x0 >= 0 and left.x1 < right.x0 and right.x1 <= figure.bbox.x1
    assert all("→ Lima\nKL" in axes.get_title(loc="left") for axes in figure.axes)
    assert all(axes.get_window_extent().width > 0.2 * figure.bbox.width for axes in figure.axes)
