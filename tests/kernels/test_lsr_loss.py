"""Oracles: a hand-worked example, sums written out in float64, gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.lsr_loss import DIRECTIONS, lm_distribution, lsr_loss, retrieval_distribution


def oracle(scores, lm_scores, gamma, beta, direction, mask):
    """The formula, entry by entry, in Python floats."""
    losses = []
    for row, lm_row, keep in zip(scores.tolist(), lm_scores.tolist(), mask.tolist(), strict=True):
        s = [value / gamma for value, k in zip(row, keep, strict=True) if k]
        t = [value / beta for value, k in zip(lm_row, keep, strict=True) if k]
        if not s:
            losses.append(0.0)
            continue
        s_norm = max(s) + math.log(sum(math.exp(v - max(s)) for v in s))
        t_norm = max(t) + math.log(sum(math.exp(v - max(t)) for v in t))
        pairs = [(a - s_norm, b - t_norm) for a, b in zip(s, t, strict=True)]
        if direction == "KL(P_R||Q_LM)":
            losses.append(sum(math.exp(p) * (p - q) for p, q in pairs))
        else:
            losses.append(sum(math.exp(q) * (q - p) for p, q in pairs))
    return torch.tensor(losses, dtype=torch.float64)


def draw(rows, columns, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1
    lm_scores = -torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 8
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    return scores.to(dtype), lm_scores.to(dtype), mask


SHAPES = {"rows": st.integers(0, 5), "columns": st.integers(1, 6), "seed": st.integers(0, 2**16)}
KNOBS = {
    "gamma": st.sampled_from([0.05, 0.1, 1.0]),
    "beta": st.sampled_from([0.01, 0.1, 1.0]),
    "direction": st.sampled_from(DIRECTIONS),
}


def test_worked_by_hand():
    # P = softmax(ln 3, ln 1) = (3/4, 1/4), Q = softmax(ln 1, ln 1) = (1/2, 1/2)
    scores, lm_scores = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # 0.1308
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # 0.1438
    assert lsr_loss(scores, lm_scores, 1.0, 1.0, "KL(P_R||Q_LM)").item() == pytest.approx(forward, rel=1e-6)
    assert lsr_loss(scores, lm_scores, 1.0, 1.0, "KL(Q_LM||P_R)").item() == pytest.approx(backward, rel=1e-6)
    assert forward < 0.135 < backward  # the two names cannot be exchanged unnoticed
    # gamma and beta divide: the same distributions from scores scaled by the temperatures
    scaled = lsr_loss(scores * 0.1, lm_scores, 0.1, 0.2, "KL(P_R||Q_LM)")
    assert scaled.item() == pytest.approx(forward, rel=1e-5)


def test_direction_matches_torch_kl_div():
    scores, lm_scores, _ = draw(4, 5, seed=1)
    log_p, log_q = (scores / 0.1).log_softmax(-1), (lm_scores / 0.5).log_softmax(-1)
    # kl_div(input, target) is KL(target || input): the trap behind a loss that computes the other direction
    p_q = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    q_p = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(lsr_loss(scores, lm_scores, 0.1, 0.5, "KL(P_R||Q_LM)"), p_q)
    torch.testing.assert_close(lsr_loss(scores, lm_scores, 0.1, 0.5, "KL(Q_LM||P_R)"), q_p)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, **KNOBS)
def test_equals_float64_oracle(rows, columns, seed, gamma, beta, direction):
    scores, lm_scores, mask = draw(rows, columns, seed)
    wanted = oracle(scores, lm_scores, gamma, beta, direction, mask)
    found = lsr_loss(scores.float(), lm_scores.float(), gamma, beta, direction, mask, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    exact = lsr_loss(scores, lm_scores, gamma, beta, direction, mask, reduction="none")
    torch.testing.assert_close(exact, wanted, atol=1e-10, rtol=1e-10)
    total = lsr_loss(scores, lm_scores, gamma, beta, direction, mask, reduction="sum")
    torch.testing.assert_close(total, wanted.sum())
    mean = lsr_loss(scores, lm_scores, gamma, beta, direction, mask)
    torch.testing.assert_close(mean, wanted.mean() if rows else torch.zeros((), dtype=torch.float64))
    assert (found > -1e-5).all()  # a divergence is never negative


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 5), seed=st.integers(0, 999), **KNOBS)
def test_gradcheck(rows, columns, seed, gamma, beta, direction):
    scores, lm_scores, mask = draw(rows, columns, seed)
    scores.requires_grad_()
    beta = max(beta, 0.1)  # differences of 1e-6 drown in a loss of hundreds of nats
    assert torch.autograd.gradcheck(lambda s: lsr_loss(s, lm_scores, gamma, beta, direction, mask), [scores])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_stands_behind_the_mask_does_not_matter(direction):
    scores, lm_scores, _ = draw(3, 4, seed=5, dtype=torch.float32)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True], [False] * 4])
    results = []
    for filler in (0.0, float("nan"), float("-inf"), float("inf")):
        dirty = scores.masked_fill(~mask, filler).requires_grad_()
        loss = lsr_loss(dirty, lm_scores.masked_fill(~mask, filler), 0.05, 0.1, direction, mask, "none")
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(dirty.grad).all()
        assert (dirty.grad[~mask] == 0).all() and loss[2] == 0
        results.append((loss.detach(), dirty.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    # and equals the loss of the row cut to its passages
    short = lsr_loss(scores[:1, :2], lm_scores[:1, :2], 0.05, 0.1, direction, reduction="none")
    torch.testing.assert_close(results[0][0][:1], short)


def test_distributions():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    scores = torch.tensor([[0.0, 0.0, 9.0], [1.0, 2.0, 3.0]], requires_grad=True)
    p = retrieval_distribution(scores, 0.1, mask)
    assert p.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]] and p.requires_grad
    q = lm_distribution(scores, 0.1, mask)
    assert torch.equal(q, p.detach()) and not q.requires_grad
    torch.testing.assert_close(
        lm_distribution(torch.tensor([[3.0, 1.0]]).log() * 0.3, 0.3), torch.tensor([[0.75, 0.25]])
    )


def test_teacher_gets_no_gradient_and_perfect_agreement_none():
    scores, _, _ = draw(2, 4, seed=2)
    scores.requires_grad_()
    teacher = scores.detach().clone().requires_grad_()
    loss = lsr_loss(scores, teacher, 0.5, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and teacher.grad is None
    assert scores.grad.abs().max() < 1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_stays_finite_where_probabilities_underflow(direction):
    # 500 tokens at -3 nats: exp(-1500) is 0 in float32, its logarithm is not
    scores = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)
    lm_scores = torch.tensor([[-1500.0, -1.0, -900.0]])
    loss = lsr_loss(scores, lm_scores, 0.01, 0.1, direction)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()


def test_half_inputs_are_computed_in_float32():
    scores, lm_scores, _ = draw(3, 4, seed=8, dtype=torch.bfloat16)
    found = lsr_loss(scores, lm_scores, 0.05, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), lsr_loss(scores.double(), lm_scores.double(), 0.05, 1.0), rtol=1e-5, atol=1e-6
    )


def test_descent_moves_probability_to_the_helpful_passage():
    scores = torch.zeros(1, 4, requires_grad=True)
    lm_scores = torch.tensor([[-5.0, -0.2, -5.0, -5.0]])
    before = retrieval_distribution(scores, 0.1)[0, 1].item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(lsr_loss(scores, lm_scores, 0.1, 1.0), scores)
        scores = (scores - 0.01 * gradient).detach().requires_grad_()
    assert retrieval_distribution(scores, 0.1)[0, 1].item() > max(0.9, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "gamma must be greater than 0, found 0.0"),
        ({"beta": -1.0}, "beta must be greater than 0"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"direction": "KL(P||Q)"}, r"direction must be one of KL\(P_R\|\|Q_LM\)"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none; found 'avg'"),
        ({"lm_scores": torch.zeros(2, 4)}, r"scores \[2, 3\], lm_scores \[2, 4\]"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    good = {"scores": torch.zeros(2, 3), "lm_scores": torch.zeros(2, 3), "gamma": 0.1, "beta": 1.0}
    with pytest.raises(ValueError, match=message):
        lsr_loss(**{**good, **change})
