"""Blocks of logits: their sizes, the dtypes in which GPUs multiply them, and what is never made or kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logprob_oracle import FULL, PLAIN, inputs, naive
from ragkit_kernels.linear_logprob import chunked, op, token_logprobs, torch_rows
from ragkit_kernels.linear_logprob.chunked import block_shape
from torch.utils._python_dispatch import TorchDispatchMode


class AsOnA100(chunked.Dtypes):
    """16-bit operands, float32 results, which a CPU's `mm` does not offer."""

    @classmethod
    def of(cls, x):
        return cls(x.dtype, torch.float32)

    def product(self, a, b, out):
        assert a.dtype == b.dtype == self.operands and out.dtype in (self.operands, self.logits)
        return out.copy_(a.float() @ b.float())

    def add_product(self, a, b, out):
        assert a.dtype == b.dtype == self.operands and out.dtype == self.logits
        out += a.float() @ b.float()


class AsOnT4(chunked.Dtypes):
    """16-bit operands and results."""

    @classmethod
    def of(cls, x):
        return cls(x.dtype, x.dtype)


@pytest.mark.parametrize("options", [PLAIN, FULL])
@pytest.mark.parametrize("rows", [60, 20])  # in one block, and in three
@pytest.mark.parametrize(
    ("gpu", "dtype", "error"),
    [(AsOnA100, torch.bfloat16, 1e-5), (AsOnA100, torch.float16, 1e-5), (AsOnT4, torch.float16, 5e-3)],
)
def test_blocks_as_gpus_multiply_them(monkeypatch, gpu, dtype, error, rows, options):
    monkeypatch.setattr(chunked, "Dtypes", gpu)
    monkeypatch.setattr(chunked, "CPU_LOGITS", rows * 256)
    monkeypatch.setattr(chunked, "MOST_ROWS", {"cpu": rows})
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(60, 16, 700, dtype=dtype, scale=0.3)]
    hidden, weight, targets, bias = leaves
    targets[::7] = -100
    found = token_logprobs(hidden, weight, targets, bias=bias, **options)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = naive(*wide[:2], targets, wide[2], **options)
    assert (found - wanted).abs().max() < error
    ours = torch.autograd.grad(found.sum(), [hidden, weight, bias])
    exact = torch.autograd.grad(wanted.sum(), wide)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype and (mine - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest storage behind any tensor that an operation returns.

    The operations inside our own ops are hidden from such a mode, so it runs these ops' functions itself.
    """

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ragkit":
            inside = {"linear_logprob": op._logprob, "linear_logprob_backward": op._gradients}[function._opname]
            with self:
                return inside._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("options", [PLAIN, FULL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("chunk", [8, None])
def test_never_makes_more_logits_than_a_block(monkeypatch, grad, dtype, options, chunk):
    monkeypatch.setattr(chunked, "CPU_LOGITS", 800)
    hidden, weight, targets, bias = inputs(64, 4, 100, dtype=dtype)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_(grad)
    with LargestTensor() as seen:
        result = token_logprobs(hidden, weight, targets, bias=bias, chunk_rows=chunk, **options)
        if grad:
            result.sum().backward()
    assert 8 * 64 < seen.largest <= 8 * 100  # of 64 x 100; the weight has 400 elements
    with LargestTensor() as seen, torch.no_grad():
        token_logprobs(hidden, weight, targets, bias=bias, backend="reference", **options)
    assert seen.largest >= 64 * 100  # as it would be seen


@given(
    rows=st.integers(0, 10**6), vocabulary=st.integers(1, 10**6), dim=st.integers(1, 10**4),
    budget=st.one_of(st.just(0), st.integers(1, 2**28)), narrow=st.booleans(), device=st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
def test_blocks_keep_their_budget(rows, vocabulary, dim, budget, narrow, device):
    R, C = block_shape(rows, vocabulary, dim, budget, torch.device(device), narrow)
    assert R >= 1 and 1 <= C <= vocabulary and R <= max(rows, 1)
    assert R * C <= (budget or (2**20 if device == "cpu" else 2**28 // 6))


def test_narrow_weights_are_widened_by_blocks_on_an_early_gpu_too():
    """A T4 has no bfloat16: the piece of a head that is converted at once is bounded like the logits."""
    for rows in (1, 64, 5000):
        _, C = block_shape(rows, 128_256, 4096, 0, torch.device("cuda"), True)
        assert C * 4096 * 4 <= chunked.GPU_BYTES


def test_training_keeps_no_logits_for_the_backward_pass():
    hidden, weight, targets, _ = inputs(64, 4, 100)
    hidden.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, weight, targets, chunk_rows=8)
    assert kept and max(kept) <= weight.numel() < 8 * 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ignored_rows_take_no_part_where_they_are_not_dropped(value):
    """As on a GPU, which is not waited for: whatever their hidden states are, they reach no gradient."""
    hidden, weight, targets, bias = inputs(6, 4, 9, dtype=torch.float64)
    targets[1] = targets[4] = -100
    leaves = [t.requires_grad_() for t in (hidden.clone(), weight, bias)]
    wanted = naive(leaves[0], weight, targets, bias)
    gradients = torch.autograd.grad(wanted.sum(), leaves)
    hidden[1] = hidden[4] = value
    options = chunked.Options(None, 1.0, -100, 2 * 9)
    tail = (hidden, weight.detach(), targets, bias.detach(), options)
    found, lse = chunked.forward(*tail, torch_rows)
    ours = chunked.backward(torch.ones(6, dtype=torch.float64), lse, *tail, [True] * 3, torch_rows)
    leaves = [hidden.requires_grad_(), weight, bias]
    reference = token_logprobs(hidden, weight, targets, bias=bias, backend="reference")
    for values, grads in ((found, ours), (reference, torch.autograd.grad(reference.sum(), leaves))):
        torch.testing.assert_close(values, wanted)
        for mine, theirs in zip(grads, gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_every_number_that_is_returned_was_written():
    """New memory is NaN here."""
    hidden, weight, targets, bias = inputs(70, 5, 130)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    targets[::9] = -100
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        for chunk in (1, 3, None):
            found = token_logprobs(hidden, weight, targets, bias=bias, chunk_rows=chunk, **FULL)
            gradients = torch.autograd.grad(found.sum(), leaves)
            assert all(torch.isfinite(t).all() for t in (found, *gradients))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_wrong_targets_are_named_before_anything_is_computed():
    hidden, weight, targets, _ = inputs(3, 4, 6)
    targets[1] = 6
    for backend in ("auto", "chunked", "reference"):
        with LargestTensor() as seen, pytest.raises(ValueError, match="target 6 is outside"):
            token_logprobs(hidden, weight, targets, backend=backend)
        assert seen.largest <= 3
