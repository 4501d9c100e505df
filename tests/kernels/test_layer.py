"""The layer on one buffer against plain PyTorch: values, every gradient, opcheck, compile, autocast, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ragkit_kernels.relational_conv import (
    build_layout,
    relational_conv,
    relational_layer,
    relational_layer_,
    relational_step,
    relu_dot,
)
from relconv_graphs import GRAPHS, draw, random_edges, same
from torch.library import opcheck

N, R, B, D = 30, 5, 3, 7
CASE = random_edges(N, 400, R, seed=3, hub=150)
LAYOUT = CASE.layout()


def seeds(dtype=torch.float64):
    return (torch.rand(N, B, generator=torch.Generator().manual_seed(5)) < 0.3).to(dtype)


def operands(D_out=D):
    """z, weight, bias, norm weight, norm bias."""
    return draw(N, B, 2 * D), draw(D_out, 2 * D), draw(D_out), draw(D_out, seed=1), draw(D_out, seed=2)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
@pytest.mark.parametrize("message", ["distmult", "transe"])
def test_step_and_layer_equal_the_reference(message, aggregate):
    x, r, q = draw(N, B, D), draw(R, D), draw(B, D, seed=3)
    run = {"boundary": (seeds(), q), "message": message, "aggregate": aggregate}
    same(lambda k: relational_step(x, r, LAYOUT, **run, backend=k), [x, r, q])
    given = operands()
    same(lambda k: relational_layer(*given, r, LAYOUT, **run, backend=k), [*given, r, q])
    dense = draw(N, B, D, seed=6)
    run["boundary"] = dense
    same(lambda k: relational_layer(*given, r, LAYOUT, **run, backend=k), [*given, r, dense])


def test_layer_is_what_it_says():
    z, w, b, g, c = operands()
    r, run = draw(R, D), {"boundary": (seeds(), draw(B, D, seed=3))}
    state = F.layer_norm(z @ w.T + b, (D,), g, c).relu() + z[..., :D]
    out = relational_layer(z, w, b, g, c, r, LAYOUT, **run)
    torch.testing.assert_close(out, torch.cat([state, relational_conv(state, r, LAYOUT, **run)], -1))
    torch.testing.assert_close(relational_layer(z, w, b, g, c, None, LAYOUT), state)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_in_place_is_the_same_without_gradient(dtype, residual, backend, monkeypatch):
    """Blocks of 5 rows, so that the last one is short."""
    from ragkit_kernels.relational_conv import layer_ops

    monkeypatch.setattr(layer_ops, "CACHED_NUMBERS", 5 * B * D)
    z, w, b, g, c = (t.detach().to(dtype) for t in operands())
    r, q = draw(R, D).detach().to(dtype), draw(B, D, seed=3).detach().to(dtype)
    run = {"boundary": (seeds(dtype), q), "residual": residual, "backend": backend}
    wanted = relational_layer(z, w, b, g, c, r, LAYOUT, **run)
    last = relational_layer(wanted, w, b, None, None, None, LAYOUT, residual=residual, backend=backend)
    work = z.clone()
    out = relational_layer_(work, w, b, g, c, r, LAYOUT, **run)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    assert out.data_ptr() == work.data_ptr()
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    out = relational_layer_(work, w, b, None, None, None, LAYOUT, residual=residual, backend=backend)
    torch.testing.assert_close(out, last, rtol=5 * tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_messages_written_to_a_given_place(backend):
    x, r, q = (t.detach() for t in (draw(N, B, D), draw(R, D), draw(B, D, seed=3)))
    for aggregate, width in (("sum", D), ("max", D), ("pna", 4 * D)):
        run = {"boundary": (seeds(), q), "aggregate": aggregate, "backend": backend}
        place = torch.full((N, B, width + 3), float("nan"), dtype=torch.float64)
        out = relational_conv(x, r, LAYOUT, out=place[..., 1:-2], **run)
        torch.testing.assert_close(out, relational_conv(x, r, LAYOUT, **run))
        assert place[..., 1].isfinite().all() and place[..., [0, -1, -2]].isnan().all()
    with pytest.raises(ValueError, match=r"out must be torch.float64 \[30, 3, 7\]"):
        relational_conv(x, r, LAYOUT, out=x[:3].clone(), backend=backend)
    with pytest.raises(ValueError, match="out must not share memory with x"):
        relational_conv(x, r, LAYOUT, out=x, backend=backend)
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        relational_conv(x.requires_grad_(), r, LAYOUT, out=torch.empty_like(x), backend=backend)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_empty_places_share_no_memory(backend):
    """Empty tensors are all at address 0; a batch without a row to compute has them."""
    nothing = torch.empty(0, dtype=torch.int64)
    layout = build_layout(nothing, nothing, nothing, 0, R)
    x, out = (torch.empty(0, B, D, dtype=torch.float64) for _ in range(2))
    assert relational_conv(x, draw(R, D).detach(), layout, out=out, backend=backend) is out


def test_in_place_has_no_gradient_and_says_so():
    with pytest.raises(RuntimeError, match="relational_layer_ has no gradient; use relational_layer"):
        relational_layer_(*operands(), draw(R, D), LAYOUT)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z = relational_step(draw(N, B, D).float(), draw(R, D).float(), LAYOUT)
        w, b, g, c = (t.float() for t in operands()[1:])
        wanted = relational_layer(z, w, b, g, c, draw(R, D).float(), LAYOUT)
        out = relational_layer_(z, w, b, g, c, draw(R, D).float(), LAYOUT)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parts_can_be_left_out(norm, residual, bias):
    z, w, b, g, c = operands()
    r = draw(R, D)
    given = [z, w, b if bias else None, *((g, c) if norm else (None, None))]
    inputs = [t for t in given if t is not None]
    same(lambda k: relational_layer(*given, r, LAYOUT, residual=residual, backend=k), [*inputs, r])
    same(lambda k: relational_layer(*given, None, LAYOUT, residual=residual, backend=k), inputs)


def test_the_last_layer_may_put_out_another_size():
    given = operands(D_out=4)
    same(lambda k: relational_layer(*given, None, LAYOUT, residual=False, backend=k), list(given))


def test_weights_mask_and_a_table_for_each_query():
    given, weight, r, x = operands(), draw(len(CASE)), draw(B, R, D), draw(N, B, D, seed=8)
    for aggregate in ("sum", "mean", "max"):
        run = {"edge_weight": weight, "edge_mask": torch.arange(len(CASE)) % 4 > 0, "aggregate": aggregate}
        same(lambda k, run=run: relational_layer(*given, r, LAYOUT, **run, backend=k), [*given, r, weight])
        same(lambda k, run=run: relational_step(x, r, LAYOUT, **run, backend=k), [x, r, weight])


@pytest.mark.parametrize("name", GRAPHS)
def test_awkward_graphs(name):
    case, width = GRAPHS[name], 131
    z, w, b, g, c = (draw(*s) for s in ((case.nodes, 1, 2 * width), (width, 2 * width), (width,), (width,), (width,)))
    r = draw(case.relations, width)
    same(lambda k: relational_layer(z, w, b, g, c, r, case.layout(), backend=k), [z, w, b, g, c, r], rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    """Against float64 on the same rounded inputs; the matrix product's rounding of h is part of the dtype."""
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    wide = [t.detach().to(dtype).double() for t in (*operands()[:3], draw(R, D))]
    norm = [t.detach().float() for t in operands()[3:]]
    run = {"boundary": (seeds(dtype), draw(B, D, seed=3).detach().to(dtype))}
    z, w, b, r = (t.to(dtype) for t in wide)
    ours = relational_layer(z, w, b, *norm, r, LAYOUT, **run)
    z, w, b, r = wide
    run["boundary"] = tuple(t.double() for t in run["boundary"])
    theirs = relational_layer(z, w, b, *(t.double() for t in norm), r, LAYOUT, **run)
    assert ours.dtype == dtype
    assert (ours.double() - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt() < tolerance


def test_only_what_needs_a_gradient_is_computed():
    z, w, b, g, c = operands()
    r = draw(R, D)
    frozen = [t.detach() for t in (w, b, g, c)]
    ours = torch.autograd.grad(relational_layer(z, *frozen, r.detach(), LAYOUT).sum(), z)[0]
    whole = torch.autograd.grad(relational_layer(z, w, b, g, c, r, LAYOUT).sum(), [z, r])
    torch.testing.assert_close(ours, whole[0])
    only = torch.autograd.grad(relational_layer(z.detach(), *frozen, r, LAYOUT).sum(), r)[0]
    torch.testing.assert_close(only, whole[1])


def test_opcheck():
    z, w, b, g, c = operands()
    r, q, flat = draw(R, D), draw(B, D, seed=3), LAYOUT.flat()
    for aggregate in ("sum", "max"):
        tail = (r, None, seeds(), q, None, None, flat, "distmult", aggregate)
        opcheck(torch.ops.ragkit.relational_step.default, (draw(N, B, D), *tail))
        opcheck(torch.ops.ragkit.relational_layer.default, (z, w, b, g, c, 1e-5, True, *tail))
    last = (None, None, None, None, None, None, flat, "distmult", "sum")
    out = torch.empty(N, B, D, dtype=torch.float64)
    tail = (r.detach(), None, seeds(), q.detach(), None, None, flat, "distmult", "sum")
    opcheck(torch.ops.ragkit.relational_conv_out.default, (out, draw(N, B, D).detach(), *tail))
    free = [t.detach() for t in (z, w, b, g, c)]
    opcheck(torch.ops.ragkit.relational_layer_.default, (*free, 1e-5, True, *last))
    opcheck(torch.ops.ragkit.relational_layer.default, (z, w, None, None, None, 1e-5, False, *last))


def model(x, r, q, linear, norm, head, mask):
    z = relational_step(x, r, LAYOUT, boundary=(mask, q))
    for table in (r, None):
        z = relational_layer(
            z, linear.weight, linear.bias, norm.weight, norm.bias, table, LAYOUT,
            boundary=(mask, q) if table is not None else None,
        )  # fmt: skip
    return relu_dot(z, q, head)


def test_two_layers_compile_into_one_graph():
    linear, norm = torch.nn.Linear(2 * D, D).double(), torch.nn.LayerNorm(D).double()
    x, r, q, head, mask = draw(N, B, D), draw(R, D), draw(B, D), draw(D), seeds()

    def loss(x, r, q):
        return model(x, r, q, linear, norm, head, mask).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(x, r, q), [x, r, q])
    for ours, theirs in zip(torch.autograd.grad(compiled(x, r, q), [x, r, q]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_in_the_narrow_dtype_and_gives_wide_gradients():
    linear, norm = torch.nn.Linear(2 * D, D), torch.nn.LayerNorm(D)
    x, r, q, head = (draw(*s, dtype=torch.float32) for s in ((N, B, D), (R, D), (B, D), (D,)))
    wanted = model(x, r, q, linear, norm, head, seeds(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        z = relational_step(x, r, LAYOUT, boundary=(seeds(torch.float32), q))
        out = model(x, r, q, linear, norm, head, seeds(torch.float32))
    assert (z.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    assert (out - wanted).norm() < 0.05 * wanted.norm()
    grads = torch.autograd.grad(out.sum(), [x, r, linear.weight, norm.weight])
    assert {g.dtype for g in grads} == {torch.float32}


def test_one_thread_gives_the_same_bits_as_two():
    linear, norm = torch.nn.Linear(2 * D, D), torch.nn.LayerNorm(D)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [draw(*s).detach().float().requires_grad_() for s in ((N, B, D), (R, D), (B, D), (D,))]
            out = model(*leaves[:3], linear, norm, leaves[3], seeds(torch.float32))
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_is_named():
    z, w, b, g, c = (t.detach() for t in operands())
    x, r = torch.zeros(N, B, D).double(), torch.zeros(R, D).double()
    narrow = build_layout(CASE.dst.clamp(max=19), CASE.src, CASE.rel, N, R, num_dst=20)
    for message, call in {
        "the fused layer has no 'pna'; use relational_conv": lambda: relational_step(x, r, LAYOUT, aggregate="pna"),
        "as many rows as nodes, found 20 and 30": lambda: relational_step(x, r, narrow),
        "relation must be [5, 7]": lambda: relational_layer(z, w, b, g, c, r[:2], LAYOUT),
        "weight must be [7, 14] for z [30, 3, 14], found [4, 14]": lambda: relational_layer(
            z, w[:4], b, g, c, None, LAYOUT
        ),
        "z must be contiguous [N, B, 2 D]": lambda: relational_layer(z.transpose(0, 1), w, b, g, c, None, LAYOUT),
        "weight of the LayerNorm must be [7], found [3]": lambda: relational_layer(z, w, b, g[:3], c, None, LAYOUT),
        "weight and bias of the LayerNorm come together": lambda: relational_layer(z, w, b, g, None, None, LAYOUT),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize("rows", [20, 40])
@pytest.mark.parametrize("aggregate", ["sum", "mean", "max", "pna"])
def test_rectangular_layouts(rows, aggregate):
    """`relational_conv` alone takes them: 20 rows hear 30 nodes, or 40 rows hear 30."""
    dst = torch.randint(rows, (200,), generator=torch.Generator().manual_seed(2))
    layout = build_layout(dst, CASE.src[:200], CASE.rel[:200], N, R, num_dst=rows)
    x, r, dense = draw(N, B, D), draw(R, D), draw(rows, B, D, seed=4)
    run = {"boundary": dense, "aggregate": aggregate}
    same(lambda k: relational_conv(x, r, layout, **run, backend=k), [x, r, dense])
