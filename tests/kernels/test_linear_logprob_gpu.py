"""`pytest -m gpu`: `token_logprobs` on a real GPU, the backend's functions and the registered op."""

from __future__ import annotations

import math

import logprob_cases
import pytest
import torch
from ragkit_kernels.linear_logprob import sequence_logprob, token_logprobs, token_logprobs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("new_memory_is_nan"),
]
FULL = {"logit_scale": 0.7, "softcap": 20.0, "temperature": 1.3}


def modern() -> bool:
    return torch.cuda.get_device_capability()[0] >= 8


def kinds() -> list[tuple[torch.dtype, str]]:
    """(dtype, backend) that this GPU has; without one the list of them all, which is then skipped."""
    found = [(d, b) for d in (torch.float16, torch.bfloat16, torch.float32) for b in ("chunked", "kernel")]
    if torch.cuda.is_available() and not modern():
        found = [(torch.float16, "chunked"), (torch.float32, "chunked")]
    return [*found, (torch.float64, "chunked")]


@pytest.mark.parametrize("name", logprob_cases.all_checks())
def test_backend(name):
    function, case = logprob_cases.all_checks()[name]
    if not modern() and (name.startswith(("fused", "far")) or "bf16" in name):
        pytest.skip("this GPU has no fused kernel and no bfloat16")
    bad = [r for r in function(case, "cuda") if not r.ok()]
    assert not bad, bad


def inputs(T, V, D, dtype, seed=0):
    """Logits of about 4, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g) * 4 * D**-0.5
    bias, targets = torch.randn(V, generator=g), torch.randint(V, (T,), generator=g)
    targets[::10] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def run(leaves, targets, g, **options):
    hidden, weight, bias = leaves
    found = token_logprobs(hidden, weight, targets, bias=bias, **options)
    return [found, *torch.autograd.grad(found, leaves, g.to(found.dtype))]


@pytest.mark.parametrize(("dtype", "backend"), kinds())
@pytest.mark.parametrize("options", [{}, FULL])
def test_op(dtype, backend, options):
    """Against float64 on the CPU, with several blocks each way; and 20 runs give the same bits."""
    hidden, weight, bias, targets = inputs(777, 5001, 200, dtype)
    g = torch.randn(777, generator=torch.Generator().manual_seed(2))
    wide = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    exact = token_logprobs_reference(*wide[:2], targets, bias=wide[2], **options)
    wanted = [exact.detach(), *torch.autograd.grad(exact, wide, g.double())]
    leaves = [t.cuda().requires_grad_() for t in (hidden, weight, bias)]
    on = {"targets": targets.cuda(), "g": g.cuda(), "backend": backend, **options}
    coarse = dtype == torch.float16 and not modern()  # logits of 16 bits
    for chunk in (None, 100):
        ours = run(leaves, **on, chunk_rows=chunk)
        error = (ours[0].detach().cpu() - wanted[0]).abs().max()
        limit = 2e-3 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        assert error < (2e-2 if coarse else limit), error
        narrow = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        for k, (a, b) in enumerate(zip(ours[1:], wanted[1:], strict=True)):
            assert (a.cpu().double() - b).norm() < (5 if coarse else 1) * narrow * b.norm(), k
        for _ in range(19):
            again = run(leaves, **on, chunk_rows=chunk)
            assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


@pytest.mark.parametrize(("dtype", "backend"), [k for k in kinds() if k[0] in (torch.float16, torch.bfloat16)])
def test_a_sequence_is_twenty_times_closer_than_narrow_logits(dtype, backend):
    if not modern():
        pytest.skip("this GPU gives logits of 16 bits")
    hidden, weight, _, targets = inputs(640, 32_000, 512, dtype)
    targets.clamp_(min=0)
    exact = token_logprobs_reference(hidden.double(), weight.double(), targets).view(10, 64).sum(1)
    hidden, weight, targets = hidden.cuda(), weight.cuda(), targets.cuda()
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).view(10, 64).sum(1).cpu()
    for lengths in ([64] * 10, torch.full((10,), 64, device="cuda")):
        ours = sequence_logprob(hidden, weight, targets, lengths, backend=backend).cpu()
        assert (ours - exact).abs().max() < 2e-2
        assert (ours - exact).abs().mean() < (rounded - exact).abs().mean() / 20


@pytest.mark.parametrize(("dtype", "backend"), kinds())
def test_wrong_targets_are_nan_and_nothing_waits_for_the_gpu(dtype, backend):
    hidden, weight, bias, targets = (t.cuda() for t in inputs(33, 300, 64, dtype))
    targets[5], targets[7], hidden[10] = 300, -1, math.nan  # targets[10] is ignored
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    positions, lengths = torch.arange(33, device="cuda"), torch.tensor([13, 20], device="cuda")
    torch.cuda.synchronize()
    run(leaves, targets, torch.ones(33, device="cuda"), backend=backend)  # loads and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, *gradients = run(leaves, targets, torch.ones(33, device="cuda"), backend=backend)
        sums = sequence_logprob(hidden, weight, targets, lengths, positions, reduction="mean", backend=backend)
        sums.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isnan().nonzero().squeeze(1).tolist() == [5, 7] and sums.isnan().tolist() == [True, False]
    assert gradients[0].isnan().any(1).nonzero().squeeze(1).tolist() == [5, 7]
    assert not gradients[0][::10].any()


@pytest.mark.parametrize(("dtype", "backend"), kinds())
def test_memory_is_bounded(dtype, backend):
    """Forward: no more than the block; of the fused kernel, a few numbers per row. Neither makes [T, V]."""
    T, V, D = 2000, 40_000, 64
    hidden, weight, _, targets = (t.cuda() for t in inputs(T, V, D, dtype))
    token_logprobs(hidden, weight, targets, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logprobs(hidden, weight, targets, backend=backend, chunk_rows=50)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    block = 50 * V * 8
    assert grown < (4 << 20 if backend == "kernel" else block + T * D * 8 + (64 << 20)), grown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_compile(dtype):
    if not modern():
        pytest.skip("this GPU gives logits of 16 bits")
    hidden, weight, bias, targets = (t.cuda() for t in inputs(50, 3000, 64, torch.float32))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cuda", dtype):
        found = token_logprobs(hidden, weight, targets, bias=bias)
    narrow = [t.detach().to(dtype).double() for t in leaves[:2]]
    exact = token_logprobs_reference(*narrow, targets, bias=bias.detach().double())
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 2e-3
    gradients = torch.autograd.grad(found.sum(), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)

    def model(hidden, weight):
        return token_logprobs(hidden.to(dtype), weight.to(dtype), targets).sum()

    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight), model(hidden, weight))


@pytest.mark.parametrize(("dtype", "backend"), [k for k in kinds() if k[0] in (torch.float16, torch.bfloat16)])
def test_more_than_2_31_logits(dtype, backend):
    """T · V > 2³¹: rows at both ends against the reference, and (chunked) one block of all of them."""
    T, V, D = 17_000, 128_256, 64
    assert T * V > 2**31
    torch.utils.deterministic.fill_uninitialized_memory = False
    hidden, weight, _, targets = (t.cuda() for t in inputs(T, V, D, dtype))
    targets.clamp_(min=0)
    hidden.requires_grad_()
    whole = backend == "chunked" and torch.cuda.mem_get_info()[0] > 20 * 2**30
    found = token_logprobs(hidden, weight, targets, backend=backend, chunk_rows=T if whole else None)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    rows = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    some = hidden.detach()[rows].double().requires_grad_()
    exact = token_logprobs_reference(some, weight.double(), targets[rows])
    (wanted,) = torch.autograd.grad(exact.sum(), some)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert (found[rows] - exact).abs().max() < 2e-3
    assert (gradient[rows].double() - wanted).norm() < 2e-2 * wanted.norm()
