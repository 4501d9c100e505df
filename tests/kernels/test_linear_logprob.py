"""Oracles: log_softmax of the whole logit matrix in float64, gradcheck, and the size of the largest tensor made."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.linear_logprob import token_logprobs
from torch.utils._python_dispatch import TorchDispatchMode


def naive(hidden, weight, targets, bias=None):
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def inputs(rows, dim, vocabulary, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, bias.to(dtype)


def test_worked_by_hand():
    # logits are (ln 1, ln 2, ln 5) = the bias, so the probabilities are 1/8, 2/8, 5/8
    hidden, weight = torch.zeros(3, 2), torch.ones(3, 2)
    bias = torch.tensor([1.0, 2.0, 5.0]).log()
    found = token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), bias)
    assert found.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    dim=st.integers(1, 7),
    vocabulary=st.integers(1, 11),
    chunk=st.one_of(st.none(), st.integers(1, 10)),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_float64_oracle(rows, dim, vocabulary, chunk, with_bias, seed):
    hidden, weight, targets, bias = inputs(rows, dim, vocabulary, seed)
    bias = bias if with_bias else None
    found = token_logprobs(hidden, weight, targets, bias, chunk_rows=chunk)
    assert found.dtype == torch.float32 and found.shape == (rows,)
    torch.testing.assert_close(found.double(), naive(hidden, weight, targets, bias), atol=2e-5, rtol=2e-5)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    dim=st.integers(1, 4),
    vocabulary=st.integers(2, 6),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_gradcheck(rows, dim, vocabulary, chunk, seed):
    hidden, weight, targets, bias = inputs(rows, dim, vocabulary, seed, torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, targets, b, chunk_rows=chunk), arguments)


def test_is_minus_cross_entropy_and_finite_for_huge_logits():
    hidden, weight, targets, _ = inputs(20, 16, 50, scale=1e3)
    found = token_logprobs(hidden, weight, targets, chunk_rows=6)
    assert torch.isfinite(found).all()
    wanted = -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_the_logits_alone(dtype):
    hidden, weight, targets, _ = inputs(30, 32, 4000, dtype=dtype, scale=0.3)
    found = token_logprobs(hidden, weight, targets)
    assert found.dtype == torch.float32
    # The log-sum-exp is in float32: what remains is the rounding of the head's own logits.
    rounded = torch.nn.functional.linear(hidden, weight).double().log_softmax(-1)[torch.arange(30), targets]
    torch.testing.assert_close(found.double(), rounded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), naive(hidden, weight, targets), atol=0.1, rtol=0.05)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("grad", [False, True])
def test_never_makes_more_logits_than_a_chunk(grad):
    hidden, weight, targets, _ = inputs(64, 4, 100)
    hidden.requires_grad_(grad)
    with LargestTensor() as seen:
        result = token_logprobs(hidden, weight, targets, chunk_rows=8)
        if grad:
            result.sum().backward()
    assert seen.largest <= max(8 * 100, weight.numel())


def test_training_keeps_no_logits_for_the_backward_pass():
    hidden, weight, targets, _ = inputs(64, 4, 100)
    hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, targets, chunk_rows=8)
    assert max(kept, default=0) <= weight.numel() < 8 * 100


def test_default_chunk_is_bounded_by_the_vocabulary(monkeypatch):
    from ragkit_kernels.linear_logprob import reference

    monkeypatch.setattr(reference, "CHUNK_LOGITS", 250)
    hidden, weight, targets, _ = inputs(16, 2, 100)
    with LargestTensor() as seen:
        found = token_logprobs(hidden, weight, targets)
    assert seen.largest <= 250
    torch.testing.assert_close(found.double(), naive(hidden, weight, targets), atol=2e-5, rtol=2e-5)


def test_uniform_head_gives_log_of_the_vocabulary():
    found = token_logprobs(torch.randn(3, 5), torch.zeros(7, 5), torch.tensor([0, 3, 6]))
    assert found.tolist() == pytest.approx([-math.log(7)] * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"one D; found \[3, 5\] and \[6, 4\]"),
        ({"hidden": torch.zeros(3)}, "hidden"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets \[3\], found \[2\]"),
        ({"targets": torch.tensor([0, 6, 1])}, "target 6 is outside the vocabulary 0..5"),
        ({"targets": torch.tensor([0, -100, 1])}, "target -100"),
        ({"bias": torch.zeros(5)}, r"bias \[6\], found \[5\]"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, found 0"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**good, **change})
