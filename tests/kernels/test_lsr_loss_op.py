"""The registered ops of the LSR loss: equal to the reference in value and gradient, opcheck, compile, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragkit_kernels.lsr_loss import DIRECTIONS, lsr_loss, lsr_loss_from_embeddings, torch_backend
from torch.library import opcheck

GAMMA, BETA = 0.1, 0.5
KINDS = ("scores", "own passages", "shared passages")
REDUCTIONS = ("mean", "sum", "none")


def draw(kind, B, K, D=5, dtype=torch.float64, seed=0, mask=True, strided=False):
    """(leaves, lm_scores, mask): scores, or embeddings of the queries and of their own or shared passages."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        *first, rows, columns = shape
        if strided:
            wide = torch.randn(*first, columns, rows + 2, generator=g, dtype=torch.float64)
            return wide.to(dtype)[..., 1:-1].transpose(-1, -2).requires_grad_()
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    lm_scores = torch.randn(B, K, generator=g, dtype=torch.float64).to(dtype) * 2
    kept = torch.rand(B, K, generator=g) < 0.7 if mask else None
    shapes = {"scores": [(B, K)], "own passages": [(B, D), (B, K, D)], "shared passages": [(B, D), (K, D)]}[kind]
    return [leaf(*shape) for shape in shapes], lm_scores, kept


def function_of(kind):
    return lsr_loss if kind == "scores" else lsr_loss_from_embeddings


def run(kind, leaves, lm_scores, mask, direction, reduction, backend, gamma=GAMMA, beta=BETA):
    """The loss and the gradients of its sum with weights 1, 2, ..."""
    loss = function_of(kind)(*leaves, lm_scores, gamma, beta, direction, mask, reduction, backend)
    weights = torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, leaves, weights)]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(0, 4),
    K=st.sampled_from([1, 2, 3, 7, 10, 64, 65, 1500]),
    seed=st.integers(0, 2**16),
    mask=st.booleans(),
    strided=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_equals_the_reference(kind, B, K, seed, mask, strided, direction, reduction):
    leaves, lm_scores, kept = draw(kind, B, K, seed=seed, mask=mask, strided=strided)
    ours, wanted = (
        run(kind, leaves, lm_scores, kept, direction, reduction, backend) for backend in ("kernel", "reference")
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask", [False, True])
def test_rows_are_handled_in_blocks(monkeypatch, direction, mask):
    leaves, lm_scores, kept = draw("scores", 11, 10, mask=mask)
    whole = run("scores", leaves, lm_scores, kept, direction, "none", "kernel")
    monkeypatch.setattr(torch_backend, "BLOCK", 40)
    for a, b in zip(run("scores", leaves, lm_scores, kept, direction, "none", "kernel"), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    direction=st.sampled_from(DIRECTIONS),
    shift=st.sampled_from([-1e3, -1.0, 2.5, 1e3]),
)
def test_properties_of_a_divergence(K, seed, direction, shift):
    """It ignores constants, is never negative, and 0 exactly where the distributions agree."""
    (scores,), lm_scores, mask = draw("scores", 3, K, seed=seed)
    loss, ds = run("scores", [scores], lm_scores, mask, direction, "none", "kernel")
    for a, b in ((shift, 0.0), (0.0, shift)):
        moved = run("scores", [scores + a], lm_scores + b, mask, direction, "none", "kernel")
        torch.testing.assert_close(moved[0], loss, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(moved[1], ds, rtol=1e-8, atol=1e-9)
    assert (loss >= -1e-14).all()
    torch.testing.assert_close(ds.sum(1), torch.zeros(3).double(), rtol=0, atol=1e-9)  # for that reason
    agree = (scores * BETA / GAMMA + 3).detach()
    equal, dequal = run("scores", [scores], agree, mask, direction, "none", "kernel")
    assert equal.abs().max() < 1e-13 and dequal.abs().max() < 1e-11
    several = mask.sum(1) > 1
    assert (loss[several] > 1e-6).all(), "random distributions differ"
    assert (loss[~several].abs() < 1e-14).all()


def test_a_sharp_distribution_has_an_exact_gradient():
    """P = (1 − ε, ε) and a KL of 3000 nats: ε is lost beside 3000 in float32, the gradient is not."""
    scores, lm_scores = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1500.0, -1.0]])
    errors = {}
    for backend in ("kernel", "reference"):
        leaf = scores.clone().requires_grad_()
        (found,) = torch.autograd.grad(lsr_loss(leaf, lm_scores, 0.05, 0.5, backend=backend), leaf)
        wide = scores.double().requires_grad_()
        wanted = lsr_loss(wide, lm_scores.double(), 0.05, 0.5, backend="reference")
        (exact,) = torch.autograd.grad(wanted, wide)
        errors[backend] = float((found.double() - exact).norm() / exact.norm())
    assert errors["kernel"] < 1e-6 < errors["reference"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(kind, direction):
    leaves, lm_scores, mask = draw(kind, 3, 4, D=3)

    def loss(*leaves):
        return function_of(kind)(*leaves, lm_scores, 0.5, 0.5, direction, mask, "none", "kernel")

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_stands_behind_the_mask_does_not_matter(kind, direction):
    leaves, lm_scores, mask = draw(kind, 3, 4)
    mask[0], mask[1], mask[:, 2] = True, False, False
    wanted = run(kind, leaves, lm_scores, mask, direction, "none", "kernel")
    assert wanted[0][1] == 0 and not wanted[1][1].any()
    for backend, filler in itertools.product(("kernel", "reference"), (float("nan"), float("inf"), float("-inf"))):
        dirty = [t.detach().clone() for t in leaves]
        if kind == "scores":
            dirty[0].masked_fill_(~mask, filler)
        else:
            dirty[0][1] = filler  # a question without any passage
            used = mask if kind == "own passages" else mask.any(0)
            dirty[1].masked_fill_(~used.unsqueeze(-1), filler)
        found = run(
            kind, [t.requires_grad_() for t in dirty], lm_scores.masked_fill(~mask, filler), mask, direction, "none",
            backend,
        )  # fmt: skip
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_probabilities_of_exactly_zero(backend):
    """A response that the LM rules out: no part in KL(Q‖P), infinite in KL(P‖Q) unless P rules it out too."""
    seek, cover = DIRECTIONS
    lm_scores = torch.tensor([[0.0, float("-inf"), 0.0]])
    scores = torch.tensor([[3.0, 1.0, 3.0]], requires_grad=True)
    loss = lsr_loss(scores, lm_scores, 1.0, 1.0, cover, backend=backend)
    (ds,) = torch.autograd.grad(loss, scores)
    p = scores.detach().softmax(-1)
    torch.testing.assert_close(loss, -(2 * p[0, 0]).log())
    torch.testing.assert_close(ds, p - torch.tensor([[0.5, 0.0, 0.5]]))
    assert lsr_loss(scores, lm_scores, 1.0, 1.0, seek, backend=backend) == float("inf")
    assert lsr_loss(scores, lm_scores.roll(1), 1.0, 1.0, seek, backend=backend) == float("inf")
    both = torch.tensor([[3.0, float("-inf"), 3.0]], requires_grad=True)
    loss = lsr_loss(both, lm_scores, 1.0, 1.0, seek, backend=backend)
    assert abs(loss.item()) < 1e-6
    # A NaN that is not masked is not hidden.
    assert lsr_loss(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, 2), 1.0, 1.0, backend=backend).isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_float32(kind, dtype):
    leaves, lm_scores, mask = draw(kind, 4, 10, D=16, dtype=dtype)
    for direction in DIRECTIONS:
        ours = run(kind, leaves, lm_scores, mask, direction, "none", "kernel")
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = run(kind, wide, lm_scores.double(), mask, direction, "none", "reference")
        assert ours[0].dtype == torch.float32 and all(g.dtype == dtype for g in ours[1:])
        for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
            limit = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 2e-6) if k else 1e-6
            assert (a.double() - b).norm() / b.norm() < limit, (direction, k)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_narrow_the_loss(kind):
    leaves, lm_scores, mask = draw(kind, 4, 10, D=16, dtype=torch.float32)
    narrow = [t.detach() if kind == "scores" else t.detach().bfloat16() for t in leaves]
    wanted = run(kind, [t.double().requires_grad_() for t in narrow], lm_scores.double(), mask, *END, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(kind, leaves, lm_scores, mask, *END, "kernel")  # with the backward pass, which must not matter
        plain = function_of(kind)(*leaves, lm_scores, GAMMA, BETA, DIRECTIONS[0], mask, "none", "kernel")
    assert ours[0].dtype == torch.float32 and torch.equal(ours[0], plain)
    for k, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() / b.norm() < (8e-3 if k and kind != "scores" else 2e-6)


END = (DIRECTIONS[0], "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(kind, strided):
    leaves, lm_scores, mask = draw(kind, 3, 4, strided=strided)
    op = torch.ops.ragkit.lsr_loss if kind == "scores" else torch.ops.ragkit.lsr_loss_from_embeddings
    for kept in (mask, None):
        opcheck(op.default, (*leaves, lm_scores, kept, GAMMA, BETA, DIRECTIONS[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    leaves, lm_scores, mask = draw(kind, 3, 4)

    def model(*leaves):
        return function_of(kind)(*leaves, lm_scores, GAMMA, BETA, DIRECTIONS[1], mask).square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), model(*leaves))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(model(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_say_so(kind):
    leaves, lm_scores, mask = draw(kind, 3, 4)
    loss = function_of(kind)(*(t.tanh() for t in leaves), lm_scores, GAMMA, BETA, mask=mask)
    (first,) = torch.autograd.grad(loss.square(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_only_one_encoder_is_trained(kind):
    leaves, lm_scores, mask = draw(kind, 3, 4)
    both = run(kind, leaves, lm_scores, mask, *END, "kernel")[1:]
    for k in range(2):
        parts = [t if j == k else t.detach() for j, t in enumerate(leaves)]
        loss = lsr_loss_from_embeddings(*parts, lm_scores, GAMMA, BETA, END[0], mask, "none")
        (found,) = torch.autograd.grad(loss, parts[k], torch.arange(1.0, 4).double())
        assert torch.equal(found, both[k])


def test_the_same_bits_in_every_run():
    leaves, lm_scores, mask = draw("shared passages", 6, 300, dtype=torch.float32)
    first = run("shared passages", leaves, lm_scores, mask, *END, "kernel")
    for _ in range(5):
        again = run("shared passages", leaves, lm_scores, mask, *END, "kernel")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


EMBEDDINGS = {"queries": torch.zeros(2, 3), "passages": torch.zeros(2, 4, 3), "lm_scores": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passages": torch.zeros(2, 4, 5)}, r"passages must be \[2, K, 3\] or \[C, 3\].*found \[2, 4, 5\]"),
        ({"passages": torch.zeros(3, 4, 3)}, r"found \[3, 4, 3\]"),
        ({"passages": torch.zeros(4)}, r"queries must be \[B, D\] and passages"),
        ({"passages": torch.zeros(2, 4, 3).half()}, "passages are torch.float16, queries torch.float32"),
        ({"lm_scores": torch.zeros(2, 5)}, r"lm_scores must be \[2, 4\].*found \[2, 5\]"),
        ({"lm_scores": torch.zeros(2, 4).long()}, "lm_scores must hold floating-point numbers, found torch.int64"),
        ({"lm_scores": torch.zeros(2, 4, device="meta")}, "lm_scores is on meta, queries on cpu"),
        ({"mask": torch.ones(2, 4)}, r"mask must be bool \[2, 4\]"),
        ({"gamma": 0.0}, "gamma must be greater than 0"),
        ({"backend": "cuda"}, "backend must be one of auto, kernel, reference; found 'cuda'"),
    ],
)
def test_wrong_embeddings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lsr_loss_from_embeddings(**{**EMBEDDINGS, "gamma": 0.1, "beta": 1.0, **change})
