"""Checks of the LSR loss's Triton backend that run wherever its kernels do: on a GPU, or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/lsr_loss_cases.py    # one JSON line per check

Every function of the backend is compared with the reference in float64 on the same rounded inputs. New memory is NaN
(see case_tools.py), and so is whatever stands behind the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import case_tools
import torch
from case_tools import DTYPES, Result, compare, copy_to
from ragkit_kernels.lsr_loss import DIRECTIONS, lsr_loss_from_embeddings_reference, lsr_loss_reference
from torch import Tensor

GAMMA, BETA = 0.1, 0.5
SEEK, COVER = DIRECTIONS


@dataclass(frozen=True)
class Case:
    """One call of the backend.

    Attributes:
        B, K: Questions and passages.
        D: Columns of the embeddings; 0: scores are given.
        mask: With masked passages, NaN behind them, and (from 2 questions on) a row without any passage.
        strided: Inputs are transposed or parts of wider tensors.
        shared: All questions share the passages.
        extreme: Probabilities that underflow, and in the covering direction one of exactly 0.
    """

    B: int
    K: int
    direction: str
    dtype: str = "fp32"
    D: int = 0
    mask: bool = False
    strided: bool = False
    shared: bool = False
    extreme: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("mask", "strided", "shared", "extreme") if getattr(self, name)]
        side = "seek" if self.direction == SEEK else "cover"
        return "-".join([f"B{self.B}-K{self.K}", *([f"D{self.D}"] if self.D else []), side, self.dtype, *flags])


WIDTHS = (1, 10, 16, 17, 300, 1024, 1025, 1500, 3100)
CASES = [
    *(Case(3, K, direction, mask=True) for K in WIDTHS for direction in DIRECTIONS),
    *(Case(2, K, d, "fp16", strided=True) for K in (1, 7, 1500) for d in DIRECTIONS),
    *(Case(4, K, d, "bf16", mask=True, strided=True) for K in (10, 1500) for d in DIRECTIONS),
    *(Case(3, K, d, mask=K > 9, extreme=True) for K in (3, 40, 1500) for d in DIRECTIONS),
    *(Case(0, K, SEEK) for K in (5, 1500)),
    *(Case(3, K, d, D=D, mask=True) for K, D, d in ((1, 1, SEEK), (10, 130, COVER), (64, 31, SEEK), (65, 31, COVER))),
    *(Case(3, K, d, "fp16", D=40, mask=True, strided=True) for K, d in ((10, SEEK), (70, COVER), (1100, SEEK))),
    *(Case(2, K, SEEK, "bf16", D=40) for K in (5, 80)),
    *(Case(0, K, COVER, D=8) for K in (5, 70)),
    *(Case(3, K, d, "fp16", D=20, mask=True, shared=True) for K, d in ((9, COVER), (1500, SEEK))),
]


@dataclass
class Inputs:
    """Arguments on the CPU; `scores`, or `queries` and `passages`."""

    lm_scores: Tensor
    mask: Tensor | None
    scores: Tensor | None = None
    queries: Tensor | None = None
    passages: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [t for t in (self.scores, self.queries, self.passages) if t is not None]


def inputs_of(case: Case) -> Inputs:
    B, K, D, dtype = case.B, case.K, case.D, DTYPES[case.dtype]
    g = torch.Generator().manual_seed(len(str(case)) + K)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        """With other strides than a new tensor, where that is asked for: its last two dimensions exchanged."""
        if case.strided:
            *first, rows, columns = shape
            wide = torch.randn(*first, columns + 1, rows + 3, generator=g) * scale
            return wide.to(dtype)[..., 1:, 2:-1].transpose(-1, -2)
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    lm_scores = draw(B, K, scale=2.0).float() - 5
    mask = None
    if case.mask:
        mask = torch.rand(K, B, generator=g).T < 0.7
        mask[:, K // 2] = True
        if B > 1:
            mask[1] = False
    if D:
        shape = (K, D) if case.shared else (B, K, D)
        found = Inputs(lm_scores, mask, None, draw(B, D, scale=D**-0.5), draw(*shape))
    else:
        found = Inputs(lm_scores, mask, draw(B, K))
    if case.extreme:  # 500 tokens at -3 nats beside one token at -1
        found.lm_scores[:, 0], found.lm_scores[:, 1] = -1500.0, -1.0
        found.lm_scores[:, 2] = -900.0 if case.direction == SEEK else float("-inf")
        found.leaves()[0].mul_(3)
    if mask is not None:
        found.lm_scores.masked_fill_(~mask, float("nan"))
        if found.scores is not None:
            found.scores.masked_fill_(~mask, float("nan"))
        if found.passages is not None:
            used = mask.any(0) if case.shared else mask
            found.passages.masked_fill_(~used.unsqueeze(-1), float("nan"))
    return found


def reference(case: Case, i: Inputs, dtype: torch.dtype, grad: Tensor | None = None) -> list[Tensor]:
    """losses [B] and the gradients of their sum (or for `grad` [B]) by autograd."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in i.leaves()]
    function = lsr_loss_reference if i.scores is not None else lsr_loss_from_embeddings_reference
    losses = function(*leaves, i.lm_scores.to(dtype), GAMMA, BETA, case.direction, i.mask, "none")
    return [losses, *torch.autograd.grad(losses, leaves, torch.ones_like(losses) if grad is None else grad.to(dtype))]


def score_results(case: Case, device: str) -> Iterator[Result]:
    """Losses and their gradient of given scores."""
    from ragkit_kernels.lsr_loss import triton_backend as backend

    i = inputs_of(case)
    arguments = [None if t is None else copy_to(t, device) for t in (i.scores, i.lm_scores, i.mask)]
    losses, dscores = backend.loss_forward(*arguments, GAMMA, BETA, case.direction)
    exact, same = reference(case, i, torch.float64), reference(case, i, torch.float32)
    assert losses.dtype == dscores.dtype == torch.float32
    yield compare("losses", losses, exact[0], same[0], torch.float32, gradient=False)
    yield compare("dscores", dscores, exact[1], same[1], torch.float32, gradient=True)
    if i.mask is not None:
        assert not dscores.cpu()[~i.mask].any() and not losses.cpu()[~i.mask.any(1)].any()


def embedding_results(case: Case, device: str) -> Iterator[Result]:
    """Losses of embeddings and the gradients of both, together and alone."""
    from ragkit_kernels.lsr_loss import triton_backend as backend

    i = inputs_of(case)
    queries, passages, lm_scores, mask = (
        None if t is None else copy_to(t, device) for t in (i.queries, i.passages, i.lm_scores, i.mask)
    )
    losses, dscores = backend.embeddings_forward(queries, passages, lm_scores, mask, GAMMA, BETA, case.direction)
    grad = torch.randn(case.B, generator=torch.Generator().manual_seed(1))
    exact, same = (reference(case, i, dtype, grad) for dtype in (torch.float64, torch.float32))
    yield compare("losses", losses, exact[0], same[0], torch.float32, gradient=False)
    whole = (grad.to(device), dscores, queries, passages, mask is not None)
    both = backend.embeddings_backward(*whole, [True, True])
    alone = (
        backend.embeddings_backward(*whole, [True, False])[0],
        backend.embeddings_backward(*whole, [False, True])[1],
    )
    for k, name in enumerate(("dqueries", "dpassages")):
        assert both[k].dtype == DTYPES[case.dtype] and torch.equal(both[k], alone[k])
        yield compare(name, both[k], exact[k + 1], same[k + 1], DTYPES[case.dtype], gradient=True)


STRIDE = 2**27  # times 17 is more than 2³¹, and the stride itself still fits into 32 bits


def far_results(axis: str, device: str) -> Iterator[Result]:
    """The last row (or column) of the scores and of the embeddings lies more than 2³¹ elements from the first.

    One allocation of 5 GB; only the few pages that are touched become real memory.
    """
    from ragkit_kernels.lsr_loss import triton_backend as backend

    rows, columns = (18, 3) if axis == "row" else (3, 18)
    strides = (STRIDE, 1) if axis == "row" else (1, STRIDE)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    memory = torch.empty(18 * STRIDE, dtype=torch.float16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    case = Case(rows, columns, SEEK, "fp16")
    i = inputs_of(case)
    scores = memory.as_strided((rows, columns), strides)
    scores.copy_(i.scores)
    losses, dscores = backend.loss_forward(scores, i.lm_scores.to(device), None, GAMMA, BETA, SEEK)
    exact, same = reference(case, i, torch.float64), reference(case, i, torch.float32)
    yield compare("losses", losses, exact[0], same[0], torch.float32, gradient=False)
    yield compare("dscores", dscores, exact[1], same[1], torch.float32, gradient=True)

    case = Case(rows, columns, SEEK, "fp16", D=2)
    i = inputs_of(case)
    passages = memory.as_strided((rows, columns, 2), (*(s if s > 1 else 2 for s in strides), 1), 1 << 12)
    passages.copy_(i.passages)
    i.passages = passages.cpu() if device != "cpu" else passages.contiguous()
    losses, dscores = backend.embeddings_forward(
        i.queries.to(device), passages, i.lm_scores.to(device), None, GAMMA, BETA, SEEK
    )
    found = backend.embeddings_backward(
        torch.ones(rows, device=device), dscores, i.queries.to(device), passages, False, [True, True]
    )
    exact, same = reference(case, i, torch.float64), reference(case, i, torch.float32)
    yield compare("losses", losses, exact[0], same[0], torch.float32, gradient=False)
    for k, name in enumerate(("dqueries", "dpassages")):
        yield compare(name, found[k], exact[k + 1], same[k + 1], torch.float16, gradient=True)


def all_checks() -> dict[str, tuple]:
    """Name -> (function, case), in the order in which they run."""
    checks: dict[str, tuple] = {str(case): (embedding_results if case.D else score_results, case) for case in CASES}
    return checks | {f"far-{axis}": (far_results, axis) for axis in ("row", "column")}


if __name__ == "__main__":
    case_tools.main(all_checks())
