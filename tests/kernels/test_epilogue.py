"""The fused step, the norm and the head against plain PyTorch: values, every gradient, opcheck, compile, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from ragkit_kernels.relational_conv import (
    build_layout,
    norm_relu_residual,
    relational_conv,
    relational_step,
    relu_dot,
)
from relconv_graphs import GRAPHS, random_edges
from torch.library import opcheck

N, R, B, D = 30, 5, 3, 7
CASE = random_edges(N, 400, R, seed=3, hub=150)
LAYOUT = CASE.layout()
NARROW = build_layout(CASE.dst.clamp(max=19), CASE.src, CASE.rel, N, R, num_dst=20)


def draw(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def mask(rows=N, dtype=torch.float64):
    return (torch.rand(rows, B, generator=torch.Generator().manual_seed(5)) < 0.3).to(dtype)


def same(run, inputs, rtol=1e-10):
    """The kernel and the reference give equal values and gradients."""
    out, wanted = run("kernel"), run("reference")
    torch.testing.assert_close(out, wanted, rtol=rtol, atol=rtol)
    g = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(wanted.dtype)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("residual", "norm"), list(itertools.product([True, False], [True, False])))
@pytest.mark.parametrize("rows", [0, 1, 30, 600])
def test_norm_relu_residual(rows, residual, norm):
    h = draw(rows, B, D)
    x = draw(rows, B, 2 * D, seed=1)[..., 3 : D + 3] if residual else None  # a strided view
    weight, bias = (draw(D), draw(D, seed=1)) if norm else (None, None)
    inputs = [t for t in (h, x, weight, bias) if t is not None]
    same(lambda k: norm_relu_residual(h, x, weight, bias, backend=k), inputs)


def test_norm_by_hand():
    """h = (1, 3): mean 2, deviation 1, so (-1, 1) · 2 + 1 = (-1, 3), relu (0, 3), plus x."""
    h, x = torch.tensor([[[1.0, 3.0]]]).double(), torch.tensor([[[10.0, 20.0]]]).double()
    out = norm_relu_residual(h, x, torch.full((2,), 2.0).double(), torch.ones(2).double(), eps=0.0)
    assert out.flatten().tolist() == [10.0, 23.0]


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
@pytest.mark.parametrize("message", ["distmult", "transe"])
def test_step_ends_a_layer_and_begins_the_next(message, aggregate):
    h, x, w, b, r, q = draw(N, B, D), draw(N, B, D, seed=1), draw(D), draw(D, seed=2), draw(R, D), draw(B, D)
    options = {"boundary": (mask(), q), "message": message, "aggregate": aggregate}
    same(lambda k: relational_step(h, x, w, b, r, LAYOUT, **options, backend=k), [h, x, w, b, r, q])
    same(lambda k: relational_step(None, x, None, None, r, LAYOUT, **options, backend=k), [x, r, q])
    same(lambda k: relational_step(h, None, w, b, r, LAYOUT, **options, backend=k), [h, w, b, r, q])
    z = relational_step(h, x, w, b, r, LAYOUT, **options)
    state = norm_relu_residual(h, x, w, b)
    torch.testing.assert_close(z[..., :D], state)
    torch.testing.assert_close(z[..., D:], relational_conv(state, r, LAYOUT, **options))


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
def test_step_on_a_rectangular_layout(aggregate):
    """Only the first 20 nodes hear messages, all 30 send them."""
    x, r, dense = draw(N, B, D), draw(R, D), draw(20, B, D, seed=4)
    for boundary, more in (((mask(20), draw(B, D)), []), (dense, [dense])):
        more = more or [boundary[1]]
        run = {"boundary": boundary, "aggregate": aggregate}
        same(lambda k, run=run: relational_step(None, x, None, None, r, NARROW, **run, backend=k), [x, r, *more])


def test_step_with_weights_and_mask():
    h, x, r, weight = draw(N, B, D), draw(N, B, D, seed=1), draw(R, D), draw(len(CASE))
    keep = torch.arange(len(CASE)) % 4 > 0
    options = {"edge_weight": weight, "edge_mask": keep}
    for aggregate in ("sum", "mean", "max"):
        run = {**options, "aggregate": aggregate}
        same(lambda k, run=run: relational_step(h, x, None, None, r, LAYOUT, **run, backend=k), [h, x, r, weight])


@pytest.mark.parametrize("name", GRAPHS)
def test_step_on_awkward_graphs(name):
    case = GRAPHS[name]
    h, x, w, b = draw(case.nodes, 1, 131), draw(case.nodes, 1, 131, seed=1), draw(131), draw(131, seed=2)
    r = draw(case.relations, 131)
    same(lambda k: relational_step(h, x, w, b, r, case.layout(), backend=k), [h, x, w, b, r], rtol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_relu_dot(shared, rows):
    h, c, w = draw(rows, 1 if shared else B, 11), draw(B, 11), draw(11)
    same(lambda k: relu_dot(h, c, w, backend=k), [h, c, w])


def test_relu_dot_is_the_head_on_concatenated_vectors():
    x, q = draw(N, B, D), draw(B, D)
    first, second = torch.nn.Linear(2 * D, 2 * D).double(), torch.nn.Linear(2 * D, 1).double()
    whole = second(first(torch.cat([x, q.expand_as(x)], -1)).relu()).squeeze(-1)
    h = x @ first.weight[:, :D].T
    c = q @ first.weight[:, D:].T + first.bias
    torch.testing.assert_close(relu_dot(h, c, second.weight[0]) + second.bias, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    h, x, w, b, r, q = draw(N, B, 64), draw(N, B, 64, seed=1), draw(64), draw(64, seed=2), draw(R, 64), draw(B, 64)
    wide = [t.detach().to(dtype).double() for t in (h, x, r, q)]
    narrow = [t.to(dtype) for t in wide]
    for run in (
        lambda h, x, r, q, w, b: relational_step(h, x, w, b, r, LAYOUT, boundary=(mask(dtype=h.dtype), q)),
        lambda h, x, r, q, w, b: norm_relu_residual(h, x, w, b),
    ):
        ours = run(*narrow, w.detach().float(), b.detach().float())
        theirs = run(*wide, w.detach().float().double(), b.detach().float().double())
        assert ours.dtype == dtype
        error = (ours.double() - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt()
        assert error < tolerance


def test_the_same_bits_on_one_thread_and_on_two():
    h, x, w, b, r = (t.float() for t in (draw(N, B, D), draw(N, B, D, seed=1), draw(D), draw(D, seed=2), draw(R, D)))
    H, c, v = draw(900, B, D).float(), draw(B, D).float(), draw(D).float()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (h, x, w, b, r, H, c, v)]
            out = relational_step(*leaves[:5], LAYOUT)
            score = relu_dot(*leaves[5:])
            results.append([out, score, *torch.autograd.grad(out.sum() + score.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    h, x, w, b, r, q = draw(N, B, D), draw(N, B, D, seed=1), draw(D), draw(D, seed=2), draw(R, D), draw(B, D)
    flat, m = LAYOUT.flat(), mask()
    opcheck(torch.ops.ragkit.norm_relu_residual.default, (h, x, w, b, 1e-5))
    opcheck(torch.ops.ragkit.norm_relu_residual.default, (h, None, None, None, 1e-5))
    opcheck(torch.ops.ragkit.relu_dot.default, (draw(N, B, 11), draw(B, 11), draw(11)))
    opcheck(torch.ops.ragkit.relu_dot.default, (draw(N, 1, 11), draw(B, 11), draw(11)))
    for aggregate in ("sum", "max"):
        for first, norm in ((h, (w, b)), (None, (None, None))):
            arguments = (first, x, *norm, 1e-5, r, None, m, q, None, None, flat, "distmult", aggregate)
            opcheck(torch.ops.ragkit.relational_step.default, arguments)


def test_a_whole_layer_compiles_into_one_graph():
    x, w, b, r, q = draw(N, B, D), draw(D), draw(D, seed=2), draw(R, D), draw(B, D)
    linear = torch.nn.Linear(2 * D, D).double()
    head, seeds = draw(D), mask()

    def model(x, r, q):
        z = relational_step(None, x, None, None, r, LAYOUT, boundary=(seeds, q))
        z = relational_step(linear(z), z[..., :D], w, b, r, LAYOUT, boundary=(seeds, q))
        return relu_dot(norm_relu_residual(linear(z), z[..., :D], w, b), q, head).sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(model(x, r, q), [x, r, q])
    for ours, theirs in zip(torch.autograd.grad(compiled(x, r, q), [x, r, q]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    x, r, q = (draw(*s, dtype=torch.float32) for s in ((N, B, D), (R, D), (B, D)))
    with torch.autocast("cpu", torch.bfloat16):
        z = relational_step(None, x, None, None, r, LAYOUT, boundary=(mask(dtype=torch.float32), q))
    assert z.dtype == torch.bfloat16
    assert torch.autograd.grad(z.float().sum(), x)[0].dtype == torch.float32


def test_bad_input_is_named():
    h, x, r = torch.zeros(N, B, D), torch.zeros(N, B, D), torch.zeros(R, D)
    for message, call in {
        "needs h, x or both": lambda: relational_step(None, None, None, None, r, LAYOUT),
        "has no 'pna'; use relational_conv": lambda: relational_step(h, x, None, None, r, LAYOUT, aggregate="pna"),
        "a rectangular layout takes x alone": lambda: relational_step(h, x, None, None, r, NARROW),
        "h and x must both be": lambda: relational_step(h, x[:, :1], None, None, r, LAYOUT),
        "relation must be [5, 7]": lambda: relational_step(h, x, None, None, r[:2], LAYOUT),
        "weight and bias of the LayerNorm come together": lambda: norm_relu_residual(h, x, torch.ones(D)),
        "h and x must both be [N, B, D], found [30, 3, 7], [30, 1, 7]": lambda: norm_relu_residual(h, x[:, :1]),
        "h must be [N, B or 1, H]": lambda: relu_dot(h, torch.zeros(2, D), torch.zeros(D)),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
