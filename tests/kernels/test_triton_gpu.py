"""`pytest -m gpu`: the Triton kernels on a real GPU, the backend's functions and the registered ops."""

from __future__ import annotations

import pytest
import relconv_cases
import torch
from case_tools import DTYPES, TOLERANCE
from ragkit_kernels.relational_conv import (
    build_layout,
    norm_relu_residual,
    relational_conv,
    relational_conv_reference,
    relational_layer,
    relational_step,
    relu_dot,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("new_memory_is_nan"),
]


@pytest.mark.parametrize("name", relconv_cases.all_checks())
def test_backend(name):
    function, case = relconv_cases.all_checks()[name]
    if "bf16" in name and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no bfloat16")
    bad = [r for r in function(case, "cuda") if not r.ok()]
    assert not bad, bad


def power_law(nodes=20_000, count=100_000, relations=500, seed=0):
    """A large graph with a few heavy nodes and relations, many of degree 1."""
    g = torch.Generator().manual_seed(seed)

    def draw(size, power):
        weights = (torch.arange(size) + 1.0) ** -power
        return torch.multinomial(weights, count, replacement=True, generator=g)

    return build_layout(draw(nodes, 0.8), draw(nodes, 0.8), draw(relations, 1.0), nodes, relations)


def operands(layout, B, D, dtype, device="cuda"):
    """Multiples of 1/8, so that messages are exact in every dtype and all agree on which is the largest."""
    g = torch.Generator().manual_seed(1)
    shapes = ((layout.num_nodes, B, D), (layout.num_relations, D), (B, D), (layout.num_edges,))
    x, relation, query, weight = ((torch.randn(s, generator=g) * 8).round().div(8).to(dtype) for s in shapes)
    mask = (torch.rand(layout.num_nodes, B, generator=g) < 0.01).to(dtype)
    return [t.to(device).requires_grad_() for t in (x, relation, mask, query, weight)]


def run(leaves, layout, message, aggregate, g):
    x, relation, mask, query, weight = leaves
    options = {"boundary": (mask, query), "edge_weight": weight, "message": message, "aggregate": aggregate}
    out = relational_conv(x, relation, layout, **options, backend="kernel")
    return [out, *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("message", "aggregate"), [("distmult", "sum"), ("transe", "mean"), ("distmult", "max")])
def test_op_on_a_large_graph(dtype, message, aggregate):
    """Against float64 on the CPU; and 20 runs give the same bits."""
    layout = power_law()
    on_gpu = layout.to("cuda")
    leaves = operands(layout, 3, 72, DTYPES[dtype])
    g = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    ours = run(leaves, on_gpu, message, aggregate, g.cuda())
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    x, relation, mask, query, weight = wide
    options = {"boundary": (mask, query), "edge_weight": weight, "message": message, "aggregate": aggregate}
    exact = relational_conv_reference(x, relation, layout, **options)
    wanted = [exact, *torch.autograd.grad(exact, wide, g.double())]
    for k, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        error = float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm())
        assert error < TOLERANCE[DTYPES[dtype]] * (2 if k else 1), (k, error)
    for _ in range(19):
        again = run(leaves, on_gpu, message, aggregate, g.cuda())
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


def test_pna_gives_the_same_bits():
    layout = power_law(2_000, 20_000, 50).to("cuda")
    leaves = operands(layout, 3, 64, torch.float32)
    g = torch.randn(layout.num_nodes, 3, 4 * 64, device="cuda")
    first = run(leaves, layout, "distmult", "pna", g)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, layout, "distmult", "pna", g), first, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_layer_and_its_head(dtype):
    """The no-concat step, the norm and the head through their ops, with gradients, and 20 runs with the same bits.

    Where relu bends, rounding decides, so the error is held against that of PyTorch in the same dtype.
    """
    layout = power_law(1_000, 8_000, 50)
    N, B, D, kind = layout.num_nodes, 4, 64, DTYPES[dtype]
    g = torch.Generator().manual_seed(4)
    shapes = ((N, B, D), (D, 2 * D), (D,), (D,), (D,), (50, D), (B, D), (B, D), (D,))
    values = [torch.randn(s, generator=g).to(kind) for s in shapes]
    cotangent = torch.randn(N, B, generator=g)

    def layer(leaves, layout, backend):
        x, weight, bias, norm_weight, norm_bias, relation, query, c, w = leaves
        options = {"boundary": (torch.ones(N, B, dtype=x.dtype, device=x.device), query), "backend": backend}
        z = relational_step(x, relation, layout, **options)
        z = relational_layer(z, weight / 8, bias, norm_weight, norm_bias, relation, layout, **options)
        y = norm_relu_residual(z[..., D:].contiguous(), z[..., :D], norm_weight, norm_bias, backend=backend)
        out = relu_dot(y, c, w, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(out))]

    leaves = [t.cuda().requires_grad_() for t in values]
    wide = [t.double().requires_grad_() for t in values]
    same = [t.clone().requires_grad_() for t in values]
    ours, wanted = layer(leaves, layout.to("cuda"), "kernel"), layer(wide, layout, "reference")
    for k, (a, b, c) in enumerate(zip(ours, wanted, layer(same, layout, "reference"), strict=True)):
        error, usual = (float((t.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) for t in (a, c))
        assert error < 1.5 * usual + 3 * TOLERANCE[kind], (k, error, usual)  # four ops in a row
    for _ in range(19):
        again = layer(leaves, layout.to("cuda"), "kernel")
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


def test_more_than_2_31_elements():
    """A contiguous [N, B, D] tensor whose last rows need 64-bit offsets."""
    N, B, D = 90_000, 48, 512
    assert N * B * D > 2**31
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    few = torch.arange(N)
    layout = build_layout(few, few.flip(0), few % 7, N, 7)
    x = torch.empty(N, B, D, dtype=torch.float16, device="cuda").normal_()
    relation = torch.randn(7, D).half().cuda()
    out = relational_conv(x, relation, layout.to("cuda"), backend="kernel")
    torch.utils.deterministic.fill_uninitialized_memory = True
    for n in (0, 1, N // 2, N - 2, N - 1):
        wanted = x[N - 1 - n].float() * relation[n % 7].float()
        torch.testing.assert_close(out[n].float(), wanted, rtol=1e-3, atol=1e-3)
