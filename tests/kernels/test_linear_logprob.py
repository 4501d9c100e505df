"""Oracles: log_softmax of the whole logit matrix in float64, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_oracle import FULL, PLAIN, inputs, naive
from ragkit_kernels.linear_logprob import sequence_logprob, token_logprobs, token_logprobs_reference
from ragkit_kernels.linear_logprob.chunked import block_shape
from torch.library import opcheck


def test_worked_by_hand():
    # logits are (ln 1, ln 2, ln 5) = the bias, so the probabilities are 1/8, 2/8, 5/8
    hidden, weight = torch.zeros(3, 2), torch.ones(3, 2)
    bias = torch.tensor([1.0, 2.0, 5.0]).log()
    targets = torch.tensor([0, 1, 2])
    found = token_logprobs(hidden, weight, targets, bias=bias)
    assert found.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-6)
    # twice the logits square the odds: 1, 4, 25; half of that by temperature is where we came from
    found = token_logprobs(hidden, weight, targets, bias=bias, logit_scale=2)
    assert found.exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30], rel=1e-6)
    found = token_logprobs(hidden, weight, targets, bias=bias, logit_scale=2, temperature=2)
    assert found.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-6)
    # a cap of 1: the logits are tanh of themselves
    capped = [math.exp(math.tanh(math.log(n))) for n in (1, 2, 5)]
    found = token_logprobs(hidden, weight, targets, bias=bias, softcap=1)
    assert found.exp().tolist() == pytest.approx([c / sum(capped) for c in capped], rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    dim=st.integers(1, 7),
    vocabulary=st.integers(1, 700),
    chunk=st.one_of(st.none(), st.integers(1, 10)),
    with_bias=st.booleans(),
    options=st.sampled_from([PLAIN, FULL, {**PLAIN, "softcap": 2.0}, {**PLAIN, "logit_scale": -3.0}]),
    backend=st.sampled_from(["auto", "chunked", "reference"]),
    layout=st.sampled_from(["contiguous", "columns", "transposed", "positions"]),
    ignore=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_float64_oracle(
    rows, dim, vocabulary, chunk, with_bias, options, backend, layout, ignore, seed
):  # fmt: skip
    hidden, weight, targets, bias = inputs(rows, dim, vocabulary, seed, torch.float64)
    bias = bias if with_bias else None
    if ignore and rows:
        targets[seed % rows] = -100
    g = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    wanted = naive(hidden, weight, targets, bias, **options)
    gradients = torch.autograd.grad(wanted, leaves, g)

    ours = [t.detach().float() for t in leaves]
    if layout == "columns":
        ours[0] = torch.cat([ours[0], ours[0]], 1)[:, :dim]
        ours[1] = ours[1].repeat_interleave(2, 1)[:, ::2]
    elif layout == "transposed":
        ours[:2] = [t.T.contiguous().T for t in ours[:2]]
    ours = [t.requires_grad_() for t in ours]
    call = {"bias": ours[2] if with_bias else None, "chunk_rows": chunk, "backend": backend, **options}
    if layout == "positions":  # backwards, between rows that nothing predicts
        place = torch.arange(rows).flip(0) * 2 + 1
        wide = torch.full((2 * rows + 1, dim), math.nan).index_copy(0, place, ours[0])
        found = token_logprobs(wide, ours[1], targets, place, **call)
    else:
        found = token_logprobs(ours[0], ours[1], targets, **call)
    assert found.dtype == torch.float32 and found.shape == (rows,)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)
    for mine, theirs in zip(torch.autograd.grad(found, ours, g.float()), gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 5),
    dim=st.integers(1, 4),
    vocabulary=st.integers(2, 6),
    chunk=st.integers(1, 6),
    options=st.sampled_from([PLAIN, FULL]),
    seed=st.integers(0, 99),
)
def test_gradcheck(rows, dim, vocabulary, chunk, options, seed):
    hidden, weight, targets, bias = inputs(rows, dim, vocabulary, seed, torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets[0] = -100

    def function(h, w, b):
        return token_logprobs(h, w, targets, bias=b, chunk_rows=chunk, **options)

    assert torch.autograd.gradcheck(function, arguments)
    lengths = [1, 0, rows - 1]
    assert torch.autograd.gradcheck(
        lambda h: sequence_logprob(h, weight, targets, lengths, bias=bias, reduction="mean"), hidden
    )


@pytest.mark.parametrize("options", [PLAIN, FULL])
def test_more_rows_and_columns_than_a_block(options):
    """Several blocks each way at the default size, every gradient alone and together."""
    hidden, weight, targets, bias = inputs(1100, 3, 5000)
    assert block_shape(1100, 5000, 3, 0, hidden.device, False) == (512, 2048)
    targets[::7] = -100
    g = torch.randn(1100, generator=torch.Generator().manual_seed(1))
    wide = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    wanted = naive(*wide[:2], targets, wide[2], **options)
    gradients = torch.autograd.grad(wanted, wide, g.double())
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    found = token_logprobs(hidden, weight, targets, bias=bias, **options)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)
    ours = torch.autograd.grad(found, leaves, g)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-4, rtol=1e-4)
    for k in range(3):
        alone = [t.detach().requires_grad_(n == k) for n, t in enumerate(leaves)]
        again = token_logprobs(*alone[:2], targets, bias=alone[2], **options)
        assert torch.equal(again, found) and torch.equal(torch.autograd.grad(again, alone[k], g)[0], ours[k])


def test_a_constant_on_all_logits_changes_nothing():
    hidden, weight, targets, bias = inputs(20, 8, 300)
    found = token_logprobs(hidden, weight, targets, bias=bias)
    shifted = token_logprobs(hidden, weight, targets, bias=bias + 3.25)
    torch.testing.assert_close(found, shifted, atol=5e-6, rtol=0)


def test_a_permuted_vocabulary_changes_nothing():
    hidden, weight, targets, bias = inputs(20, 8, 3000)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    place = torch.empty_like(order)
    place[order] = torch.arange(3000)
    found = token_logprobs(hidden, weight, targets, bias=bias, **FULL)
    permuted = token_logprobs(hidden, weight[order], place[targets], bias=bias[order], **FULL)
    torch.testing.assert_close(found, permuted, atol=5e-6, rtol=0)


def test_forbidden_tokens_have_probability_0():
    hidden, weight, targets, bias = inputs(6, 4, 2500, scale=20.0)
    bias[torch.arange(2500) % 5 != 0] = -math.inf  # a whole block may be left without a token
    bias[:2048] = -math.inf
    targets = 2050 + 5 * torch.arange(6)
    weight.requires_grad_()
    found = token_logprobs(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(found.double(), naive(hidden, weight, targets, bias), atol=1e-4, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert torch.isfinite(gradient).all() and not gradient[:2050].any()
    assert (token_logprobs(hidden, weight, targets - 1, bias=bias) == -math.inf).all()


def test_is_minus_cross_entropy_and_finite_for_huge_logits():
    hidden, weight, targets, _ = inputs(20, 16, 50, scale=1e3)
    targets[3] = 7
    found = token_logprobs(hidden, weight, targets, chunk_rows=6, ignore_index=7)
    assert torch.isfinite(found).all() and found[3] == 0
    wanted = -torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=7)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-2)


def test_nan_logits_give_nan_in_their_rows_alone():
    hidden, weight, targets, _ = inputs(5, 4, 9)
    hidden[1], hidden[3] = math.nan, math.inf
    found = token_logprobs(hidden, weight, targets, chunk_rows=1)
    assert found.isnan().tolist() == [False, True, False, True, False]
    targets[1] = targets[3] = -100
    weight.requires_grad_()
    found = token_logprobs(hidden, weight, targets)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(weight.grad).all()  # ignored rows take no part at all
    with torch.no_grad():
        weight[2, 0] = math.nan
    assert token_logprobs(hidden, weight, targets).isnan().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype):
    """Against float64 of the same rounded inputs; logits in bfloat16 would cost twenty times the error, or more."""
    hidden, weight, targets, _ = inputs(64 * 8, 256, 4000, dtype=dtype, scale=0.25)
    exact = naive(hidden, weight, targets)
    found = token_logprobs(hidden, weight, targets)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2e-3
    lengths = [64] * 8
    sums, wanted = sequence_logprob(hidden, weight, targets, lengths), exact.view(8, 64).sum(1)
    assert (sums - wanted).abs().max() <= 2e-2
    rounded = (hidden @ weight.T).float().log_softmax(-1)[torch.arange(512), targets].view(8, 64).sum(1)
    assert (sums - wanted).abs().mean() <= (rounded - wanted).abs().mean() / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype):
    hidden, weight, targets, bias = (
        t.requires_grad_() if t.is_floating_point() else t for t in inputs(600, 16, 700, dtype=dtype, scale=0.3)
    )
    ours = torch.autograd.grad(token_logprobs(hidden, weight, targets, bias=bias).sum(), [hidden, weight, bias])
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    exact = torch.autograd.grad(naive(*wide[:2], targets, wide[2]).sum(), wide)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        # no error but that of rounding the result
        assert (mine.double() - theirs).norm() <= 1.05 * (theirs.to(dtype).double() - theirs).norm()


def test_uniform_head_gives_log_of_the_vocabulary():
    found = token_logprobs(torch.randn(3, 5), torch.zeros(7, 5), torch.tensor([0, 3, 6]))
    assert found.tolist() == pytest.approx([-math.log(7)] * 3)


def test_opcheck():
    hidden, weight, targets, bias = inputs(6, 4, 9, dtype=torch.float64)
    targets[2] = -100
    wide = torch.randn(6, 9, dtype=torch.float64)[:, 1:5]
    for states, inner, budget in ((hidden, None, 0), (wide, 0.3, 20)):
        leaves = [t.detach().requires_grad_() for t in (states, weight, bias)]
        arguments = (leaves[0], leaves[1], targets, leaves[2], inner, 1.5, -100, budget, "auto")
        opcheck(torch.ops.ragkit.linear_logprob.default, arguments)
        opcheck(torch.ops.ragkit.linear_logprob.default, (*arguments[:3], None, *arguments[4:]))
        lse = torch.ops.ragkit.linear_logprob(*arguments)[1].detach()
        for needs in ([True, True, True], [False, True, False]):
            opcheck(
                torch.ops.ragkit.linear_logprob_backward.default,
                (
                    lse.cos(),
                    lse,
                    *(t.detach() for t in leaves[:2]),
                    targets,
                    bias,
                    *arguments[4:8],
                    needs,
                ),
            )


@pytest.mark.parametrize("dynamic", [None, True])  # True: numbers are symbols too, the options among them
def test_compiles_into_one_graph(dynamic):
    hidden, weight, targets, bias = inputs(12, 4, 30)
    positions = torch.arange(12).flip(0)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def model(hidden, weight, bias):
        options = {"bias": bias, "reduction": "mean", **FULL}
        return sequence_logprob(hidden.tanh(), weight, targets, [5, 0, 7], positions, **options).sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(*leaves), model(*leaves))
    both = [torch.autograd.grad(function(*leaves), leaves) for function in (compiled, model)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_narrows_the_operands_and_not_the_logits():
    hidden, weight, targets, bias = inputs(64, 64, 500, scale=0.5)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, targets, bias=bias)
        (again,) = token_logprobs(hidden[:1], weight.bfloat16(), targets[:1], bias=bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(again, found[0], atol=1e-5, rtol=1e-6)  # the sums of one row may have another order
    exact = naive(hidden.bfloat16(), weight.bfloat16(), targets, bias)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(found.sum(), leaves)
    wanted = torch.autograd.grad(naive(hidden, weight, targets, bias).sum(), leaves)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


def test_autocast_leaves_float64_alone():
    hidden, weight, targets, _ = inputs(4, 8, 50, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(found, naive(hidden, weight, targets))


def test_second_derivatives_say_so():
    hidden, weight, targets, _ = inputs(4, 3, 5)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(token_logprobs(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()
    plain = token_logprobs(hidden, weight, targets, backend="reference").sum()
    (gradient,) = torch.autograd.grad(plain, hidden, create_graph=True)
    gradient.sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_the_reference_says_what_a_gpu_does_with_a_wrong_target():
    found = token_logprobs_reference(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([4, -100, -1]))
    assert found.isnan().tolist() == [True, False, True]


def test_there_is_no_fused_kernel_on_a_cpu():
    with pytest.raises(RuntimeError, match=r"found torch.float32 on cpu; use backend='chunked'"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1).long(), backend="kernel")


WRONG = [
    ({"hidden": torch.zeros(3, 5)}, r"one D; found \[3, 5\] and \[6, 4\]"),
    ({"hidden": torch.zeros(3)}, "hidden"),
    ({"weight": torch.zeros(0, 4)}, "a vocabulary of 0 tokens"),
    ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets \[3\], found \[2\]"),
    ({"targets": torch.zeros(3, dtype=torch.int32)}, "int64 targets, found torch.int32"),
    ({"targets": torch.tensor([0, 6, 1])}, "target 6 is outside the vocabulary 0..5"),
    ({"targets": torch.tensor([0, -1, 1])}, "target -1"),
    ({"targets": torch.tensor([0, -100, 1]), "ignore_index": -1}, "target -100"),
    ({"positions": torch.tensor([0, 3, 1])}, "position 3 is outside the rows 0..2 of hidden"),
    ({"positions": torch.tensor([0, 1])}, r"targets \[2\], found \[3\]"),
    ({"bias": torch.zeros(5)}, r"bias \[6\], found \[5\]"),
    ({"weight": torch.zeros(6, 4).double()}, "weight is torch.float64, hidden is torch.float32"),
    ({"hidden": torch.zeros(3, 4).long()}, "hidden must hold floating-point numbers"),
    ({"bias": torch.zeros(6, device="meta")}, "bias is on meta, hidden is on cpu"),
    ({"chunk_rows": 0}, "chunk_rows must be at least 1, found 0"),
    ({"temperature": 0.0}, "temperature must be greater than 0, found 0.0"),
    ({"softcap": -1.0}, "softcap must be greater than 0, found -1.0"),
    ({"logit_scale": math.nan}, "logit_scale must be a finite number, found nan"),
    ({"backend": "cuda"}, "backend must be one of auto, kernel, chunked, reference; found 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_inputs_are_named(change, message):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**good, **change})
