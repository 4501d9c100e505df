"""Checks of the Triton backend of `token_logprobs` that run wherever its kernels do: on a GPU, or in the interpreter.

    TRITON_INTERPRET=1 python tests/kernels/logprob_cases.py    # one JSON line per check

Every function of the backend is compared with the reference in float64 on the same rounded inputs. New memory is NaN
(see case_tools.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import case_tools
import torch
from case_tools import DTYPES, Result, compare, copy_to
from ragkit_kernels.linear_logprob import chunked, token_logprobs_reference
from ragkit_kernels.linear_logprob.reference import scaling
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One call of the backend.

    Attributes:
        T, V, D: Rows, vocabulary, columns.
        span: Blocks of columns per program of the fused kernel (128 columns each, 64 for float32).
        full: With bias, scale, cap and temperature; ignored targets, and ones outside the vocabulary.
        strided: Hidden states, weight and bias are parts of wider or transposed tensors.
        extreme: Logits of hundreds, and tokens that a bias of -inf forbids.
        budget: Logits of a block, for the chunked driver.
    """

    T: int
    V: int
    D: int
    dtype: str = "fp32"
    span: int = 1
    full: bool = False
    strided: bool = False
    extreme: bool = False
    budget: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("full", "strided", "extreme") if getattr(self, name)]
        numbers = f"T{self.T}-V{self.V}-D{self.D}-{self.span or self.budget}"
        return "-".join([numbers, self.dtype, *flags])

    @property
    def options(self) -> dict[str, float | None]:
        if not self.full:
            return {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
        return {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}

    def call(self) -> chunked.Options:
        return chunked.Options(*scaling(**self.options), IGNORED, self.budget)


FUSED = [
    Case(1, 1, 1),
    Case(3, 200, 32, span=2, full=True),
    Case(70, 70, 40, full=True, strided=True),
    Case(65, 300, 33, "fp16", strided=True),
    Case(130, 400, 64, "fp16", span=3, full=True),
    Case(5, 600, 128, "fp16", span=2),
    Case(4, 150, 8, extreme=True),
    Case(3, 260, 16, "fp16", extreme=True, full=True),
    Case(0, 10, 8),
]
CHUNKED = [
    Case(5, 70, 8, span=0, budget=5 * 70, full=True),
    Case(5, 70, 8, span=0, budget=60, strided=True),
    Case(9, 300, 5, "fp16", span=0, budget=1200, full=True, strided=True),
    Case(4, 2500, 3, span=0, full=True),
    Case(6, 2100, 3, "fp16", span=0, extreme=True),
    Case(3, 40, 8, "bf16", span=0, full=True),
    Case(0, 10, 8, span=0),
]


@dataclass
class Inputs:
    """Arguments, on the CPU."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None


def inputs_of(case: Case) -> Inputs:
    T, V, D, dtype = case.T, case.V, case.D, DTYPES[case.dtype]
    g = torch.Generator().manual_seed(T + V + D)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        if case.strided:  # hidden: columns of a wider tensor; weight: those of a transposed one
            wide = torch.randn(columns + 3, rows + 2, generator=g)
            wide = wide.T if rows == V else wide.reshape(rows + 2, columns + 3)
            return (wide * scale).to(dtype)[2:, 3:]
        return (torch.randn(rows, columns, generator=g) * scale).to(dtype)

    hidden = draw(T, D, 100.0 if case.extreme else 1.0)
    weight = draw(V, D, 2 * max(D, 1) ** -0.5)
    targets = torch.randint(V, (T,), generator=g)
    bias = torch.randn(V, 2, generator=g).to(dtype)[:, 1] if case.full or case.extreme else None
    if case.extreme and bias is not None:
        forbidden = torch.arange(V) % 3 == 1
        bias = bias.masked_fill(forbidden, -math.inf) if not case.full else bias
        targets -= forbidden[targets].long()
    if case.full and T > 2:
        targets[0], targets[T // 2] = IGNORED, V + 7
    return Inputs(hidden, weight, targets, bias)


def exact(case: Case, i: Inputs, dtype: torch.dtype, grad: Tensor | None = None) -> list[Tensor]:
    """Log-probabilities and, for `grad` [T], the gradients of hidden, weight and bias by autograd."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (i.hidden, i.weight, i.bias)]
    hidden, weight, bias = leaves
    found = token_logprobs_reference(hidden, weight, i.targets, bias=bias, **case.options)
    if grad is None:
        return [found]
    known = [t for t in leaves if t is not None]
    return [found, *torch.autograd.grad(found, known, grad.to(dtype))]


def known(case: Case, i: Inputs) -> Tensor:
    """Rows whose target is in the vocabulary, or ignored."""
    return (i.targets < case.V) | (i.targets == IGNORED)


def on(i: Inputs, device: str) -> Inputs:
    moved = [None if t is None else copy_to(t, device) for t in (i.hidden, i.weight, i.targets, i.bias)]
    return Inputs(*moved)


def fused_results(case: Case, device: str) -> Iterator[Result]:
    """Log-probabilities and log-sum-exp of the fused kernel."""
    from ragkit_kernels.linear_logprob import triton_backend as backend

    i = inputs_of(case)
    o, arch = on(i, device), 80 if device == "cpu" else None
    logprobs, lse = backend.fused_forward(o.hidden, o.weight, o.targets, o.bias, case.call(), arch, case.span)
    assert logprobs.dtype == lse.dtype == torch.float32
    ok = known(case, i)
    assert logprobs.cpu()[~ok].isnan().all() and lse.cpu()[~ok].isnan().all()
    wide, same = exact(case, i, torch.float64)[0], exact(case, i, torch.float32)[0]
    yield compare("log-probabilities", logprobs.cpu()[ok], wide[ok], same[ok], torch.float32, gradient=False)
    zeros = Inputs(i.hidden, i.weight, torch.zeros_like(i.targets), i.bias)
    for_zero = [exact(case, zeros, kind)[0] for kind in (torch.float64, torch.float32)]
    o = on(zeros, device)
    first = backend.fused_forward(o.hidden, o.weight, o.targets, o.bias, case.call(), arch, case.span)
    yield compare("of token 0", first[0], *for_zero, torch.float32, gradient=False)
    assert torch.equal(first[1].cpu()[ok], lse.cpu()[ok])  # the log-sum-exp knows no target


def chunked_results(case: Case, device: str) -> Iterator[Result]:
    """Forward and backward by blocks, with the row kernels between library products."""
    from ragkit_kernels.linear_logprob import triton_backend as backend

    i, dtype = inputs_of(case), DTYPES[case.dtype]
    i.targets = torch.where(known(case, i), i.targets, 0)
    i.hidden[i.targets == IGNORED] = math.nan  # takes no part
    o = on(i, device)
    narrow = chunked.Dtypes.of(o.hidden).logits if case.T else torch.float32
    logprobs, lse = chunked.forward(o.hidden, o.weight, o.targets, o.bias, case.call(), backend)
    grad = torch.randn(case.T, generator=torch.Generator().manual_seed(1))
    needs = [True, True, i.bias is not None]
    tail = (o.hidden, o.weight, o.targets, o.bias, case.call())
    found = chunked.backward(grad.to(device), lse, *tail, needs, backend)
    wide, same = (exact(case, i, kind, grad) for kind in (torch.float64, torch.float32))
    yield compare("log-probabilities", logprobs, wide[0], same[0], narrow, gradient=False)
    for k in range(len(wide) - 1):
        assert found[k].dtype == dtype
        yield compare(("dhidden", "dweight", "dbias")[k], found[k], wide[k + 1], same[k + 1], dtype, gradient=True)
        one = [n == k for n in range(3)]
        alone = chunked.backward(grad.to(device), lse, *tail, one, backend)
        assert torch.equal(alone[k], found[k]) and not any(alone[n].numel() for n in range(3) if n != k)


def gradient_results(case: Case, device: str) -> Iterator[Result]:
    """The gradient of a block of products in place, into narrow memory, and for a target outside the vocabulary."""
    from ragkit_kernels.linear_logprob import triton_backend as backend

    i, dtype = inputs_of(case), DTYPES[case.dtype]
    grad = torch.randn(case.T, generator=torch.Generator().manual_seed(1))
    products = (i.hidden.float() @ i.weight.float().T).requires_grad_()
    results = {}
    for kind in (torch.float64, torch.float32):
        leaf = products.detach().to(kind).requires_grad_()
        bias = torch.zeros(case.V, dtype=kind) if i.bias is None else i.bias.to(kind)
        found = token_logprobs_reference(leaf + bias, torch.eye(case.V, dtype=kind), i.targets, **case.options)
        results[kind] = torch.autograd.grad(found, leaf, grad.to(kind))[0]
        if kind == torch.float64:
            zero = torch.zeros_like(i.targets)
            first = token_logprobs_reference(leaf + bias, torch.eye(case.V, dtype=kind), zero, **case.options)
            inner, outer = scaling(**case.options)
            z = (leaf + bias)[:, 0]
            lse = (z * outer if inner is None else outer * torch.tanh(inner * z)) - first
    lse = torch.where(known(case, i), lse.detach(), math.nan)
    C = case.V // 2
    options = case.call()
    for columns in (slice(0, C), slice(C, case.V)):
        block = products.detach()[:, columns].contiguous().to(device)
        narrow = torch.empty(block.shape, dtype=dtype, device=device)
        bias = None if i.bias is None else i.bias[columns].to(device)
        arguments = (bias, i.targets.to(device), columns.start, options.inner, options.outer, lse.float().to(device))
        for out in (narrow, block):  # in place at last
            backend.gradient_rows(block, *arguments, grad.to(device), IGNORED, out)
            ok = known(case, i)
            assert out.cpu()[~ok].isnan().all() and not out.cpu()[i.targets == IGNORED].any()
            both = (results[kind][ok, columns] for kind in (torch.float64, torch.float32))
            yield compare("products", out.cpu()[ok], *both, out.dtype, gradient=True)


STRIDE = 2**27  # times 17 is more than 2³¹, and the stride itself still fits into 32 bits


def far_results(dim: int, device: str) -> Iterator[Result]:
    """The last rows (or columns) of hidden and weight lie more than 2³¹ elements from the first.

    One allocation of 5 GB; only the few pages that are touched become real memory.
    """
    from ragkit_kernels.linear_logprob import triton_backend as backend

    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(18 * STRIDE, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    case = Case(18, 18, 18, "fp16")
    i = inputs_of(case)
    strides = (STRIDE, 1) if dim == 0 else (1, STRIDE)
    hidden, weight = (memory.as_strided((18, 18), strides, start) for start in (0, 1 << 12))
    hidden.copy_(i.hidden)
    weight.copy_(i.weight)
    logprobs, _ = backend.fused_forward(
        hidden, weight, i.targets.to(device), None, case.call(), 80 if device == "cpu" else None, 1
    )
    wide, same = exact(case, i, torch.float64)[0], exact(case, i, torch.float32)[0]
    yield compare("log-probabilities", logprobs, wide, same, torch.float32, gradient=False)


def all_checks() -> dict[str, tuple]:
    """Name -> (function, case), in the order in which they run."""
    checks: dict[str, tuple] = {f"fused-{case}": (fused_results, case) for case in FUSED}
    checks |= {f"chunked-{case}": (chunked_results, case) for case in CHUNKED}
    for dtype in ("fp32", "fp16"):
        case = Case(5, 90, 4, dtype, full=True)
        checks |= {f"gradient-{case}": (gradient_results, case)}
    return checks | {f"far-{name}": (far_results, dim) for dim, name in enumerate(("rows", "columns"))}


if __name__ == "__main__":
    case_tools.main(all_checks())
