"""Sums and means of sequences against a loop over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.linear_logprob import sequence, sequence_logprob, token_logprobs


def draw(rows, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype) for n in (rows, 8))
    return hidden, weight, torch.randint(8, (rows,), generator=g)


def test_worked_by_hand():
    # every token has probability 1/8: sums are -n ln 8, means -ln 8, and nothing at all is 0
    hidden, weight, targets = torch.zeros(6, 3), torch.zeros(8, 3), torch.arange(6)
    sums = sequence_logprob(hidden, weight, targets, [2, 0, 4]) / torch.tensor(8.0).log()
    assert sums.tolist() == pytest.approx([-2, 0, -4])
    targets[3:] = -100
    means = sequence_logprob(hidden, weight, targets, torch.tensor([2, 0, 4]), reduction="mean")
    assert (means / torch.tensor(8.0).log()).tolist() == pytest.approx([-1, 0, -1])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    reduction=st.sampled_from(["sum", "mean"]),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_equals_a_loop(lengths, reduction, ignored, seed):
    hidden, weight, targets = draw(sum(lengths), seed)
    if ignored:
        targets[::ignored] = -100
    hidden.requires_grad_()
    logprobs = token_logprobs(hidden, weight, targets)
    wanted = []
    for part, of_part in zip(logprobs.split(lengths), targets.split(lengths), strict=True):
        count = int((of_part != -100).sum())
        wanted.append(part.sum() / (max(count, 1) if reduction == "mean" else 1))
    wanted = torch.stack(wanted) if wanted else logprobs[:0]
    (gradient,) = torch.autograd.grad(wanted.square().sum(), hidden, retain_graph=True)
    for given_ in (lengths, torch.tensor(lengths, dtype=torch.long)):
        found = sequence_logprob(hidden, weight, targets, given_, reduction=reduction)
        assert found.shape == (len(lengths),) and found.dtype == torch.float64
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), hidden)[0], gradient)
    # what happens where lengths are on a GPU, which is not waited for
    values = logprobs.detach()
    for step in (2**24, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequence, "MEMBERS", step)
            by_table = sequence._by_membership(values, torch.tensor(lengths, dtype=torch.long))
        torch.testing.assert_close(by_table, sequence_logprob(hidden, weight, targets, lengths).detach())


def test_one_nan_stays_in_its_sequence():
    hidden, weight, targets = draw(6)
    hidden[2] = float("nan")
    assert sequence_logprob(hidden, weight, targets, [2, 2, 2]).isnan().tolist() == [False, True, False]
    values = token_logprobs(hidden, weight, targets)
    assert sequence._by_membership(values, torch.tensor([2, 2, 2])).isnan().tolist() == [False, True, False]
    assert sequence._by_membership(values, torch.tensor([2, 2, 1])).isnan().all()


def test_positions_pick_rows():
    hidden, weight, targets = draw(6)
    positions = torch.tensor([5, 0, 0])
    found = sequence_logprob(hidden, weight, targets[:3], [1, 2], positions, temperature=0.5)
    wanted = token_logprobs(hidden[positions], weight, targets[:3], temperature=0.5)
    torch.testing.assert_close(found, torch.stack([wanted[0], wanted[1:].sum()]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2, 3]}, r"sum up to the 6 targets; found \[2, 3\] with the sum 5"),
        ({"lengths": torch.tensor([7, -1])}, r"at least 0 .* found \[7, -1\]"),
        ({"lengths": [1] * 20}, "found 20 numbers with the sum 20"),
        ({"reduction": "none"}, "reduction must be one of sum, mean; found 'none'"),
        ({"softcap": 0.0}, "softcap must be greater than 0"),
        ({"targets": torch.full((6,), 8)}, "target 8 is outside the vocabulary 0..7"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    hidden, weight, targets = draw(6)
    good = {"hidden": hidden, "weight": weight, "targets": targets, "lengths": [6]}
    with pytest.raises(ValueError, match=message):
        sequence_logprob(**{**good, **change})
