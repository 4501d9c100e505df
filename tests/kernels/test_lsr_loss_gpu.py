"""`pytest -m gpu`: the LSR loss on a real GPU, the backend's functions and the registered ops."""

from __future__ import annotations

import lsr_loss_cases
import pytest
import torch
from ragkit_kernels.lsr_loss import DIRECTIONS, lsr_loss, lsr_loss_from_embeddings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("new_memory_is_nan"),
]


@pytest.mark.parametrize("name", lsr_loss_cases.all_checks())
def test_backend(name):
    function, case = lsr_loss_cases.all_checks()[name]
    if "bf16" in name and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no bfloat16")
    bad = [r for r in function(case, "cuda") if not r.ok()]
    assert not bad, bad


def leaves_of(kind, B, K, D, dtype):
    g = torch.Generator().manual_seed(3)
    shapes = {"scores": [(B, K)], "own": [(B, D), (B, K, D)], "shared": [(B, D), (K, D)]}[kind]
    scale = 1.0 if kind == "scores" else D**-0.25
    leaves = [(torch.randn(s, generator=g) * scale).to(dtype).cuda().requires_grad_() for s in shapes]
    return leaves, torch.randn(B, K, generator=g).cuda(), (torch.rand(B, K, generator=g) < 0.8).cuda()


@pytest.mark.parametrize("kind", ["scores", "own", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K", [10, 200, 5000])
def test_op(kind, dtype, K):
    """Value and gradients against float64 on the CPU; 20 runs with the same bits; nothing waits for the GPU."""
    leaves, lm_scores, mask = leaves_of(kind, 6, K, 48, dtype)
    function = lsr_loss if kind == "scores" else lsr_loss_from_embeddings

    def run(leaves, lm_scores, mask, backend):
        loss = function(*leaves, lm_scores, 0.2, 1.0, DIRECTIONS[0], mask, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    ours = run(leaves, lm_scores, mask, "kernel")
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    exact = run(wide, lm_scores.cpu().double(), mask.cpu(), "reference")
    for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
        limit = 1e-3 if dtype == torch.float16 and k else 4e-6
        assert (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm() < limit, k
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            again = run(leaves, lm_scores, mask, "kernel")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
