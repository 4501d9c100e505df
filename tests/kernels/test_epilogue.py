"""LayerNorm + ReLU + residual and the head against plain PyTorch: values, every gradient, opcheck, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from ragkit_kernels.relational_conv import norm_relu_residual, relu_dot
from relconv_graphs import draw, same
from torch.library import opcheck

N, B, D = 30, 3, 7


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
    wide = [t.detach().to(dtype).double() for t in (draw(N, B, 64), draw(N, B, 64, seed=1))]
    norm = [t.detach().float() for t in (draw(64), draw(64, seed=2))]
    ours = norm_relu_residual(*(t.to(dtype) for t in wide), *norm)
    theirs = norm_relu_residual(*wide, *(t.double() for t in norm))
    assert ours.dtype == dtype
    assert (ours.double() - theirs).pow(2).mean().sqrt() / theirs.pow(2).mean().sqrt() < tolerance
    h, c, w = (t.detach().to(dtype) for t in (draw(N, B, 64), draw(B, 64), draw(64)))
    score, wanted = relu_dot(h, c, w), relu_dot(h.double(), c.double(), w.double())
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_same_bits_on_one_thread_and_on_two():
    tensors = (
        draw(900, B, D),
        draw(900, B, D, seed=1),
        draw(D),
        draw(D, seed=2),
        draw(900, B, D, seed=3),
        draw(B, D),
        draw(D),
    )
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.detach().float().requires_grad_() for t in tensors]
            out, score = norm_relu_residual(*leaves[:4]), relu_dot(*leaves[4:])
            results.append([out, score, *torch.autograd.grad(out.sum() + score.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    h, x, w, b = draw(N, B, D), draw(N, B, D, seed=1), draw(D), draw(D, seed=2)
    opcheck(torch.ops.ragkit.norm_relu_residual.default, (h, x, w, b, 1e-5))
    opcheck(torch.ops.ragkit.norm_relu_residual.default, (h, None, None, None, 1e-5))
    opcheck(torch.ops.ragkit.relu_dot.default, (draw(N, B, 11), draw(B, 11), draw(11)))
    opcheck(torch.ops.ragkit.relu_dot.default, (draw(N, 1, 11), draw(B, 11), draw(11)))


def test_bad_input_is_named():
    h, x = torch.zeros(N, B, D), torch.zeros(N, B, D)
    for message, call in {
        "weight and bias of the LayerNorm come together": lambda: norm_relu_residual(h, x, torch.ones(D)),
        "h and x must both be [N, B, D], found [30, 3, 7], [30, 1, 7]": lambda: norm_relu_residual(h, x[:, :1]),
        "weight of the LayerNorm must be [7], found [3]": lambda: norm_relu_residual(
            h, x, torch.ones(3), torch.ones(3)
        ),
        "x must be torch.float32 with a contiguous last dimension": lambda: norm_relu_residual(h, x.bfloat16()),
        "h must be [N, B or 1, H]": lambda: relu_dot(h, torch.zeros(2, D), torch.zeros(D)),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
