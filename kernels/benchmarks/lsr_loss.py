"""K3, the LSR loss: ours against eager PyTorch (and torch.compile of that), forward and backward.

    python kernels/benchmarks/lsr_loss.py [--csv FILE] [--sizes 8x10 512x10000] [--with-compile]
    python kernels/benchmarks/lsr_loss.py --device cuda --dtype float32 bfloat16

Two parts: from given scores, and from embeddings (questions with their own passages up to `--shared-from` of them,
beyond that one set of candidates for all, as with in-batch negatives). The methods take turns in one run; peak memory
is what one call adds, on a CPU in a process of its own; the error is that of the gradient of the scores (or queries)
against float64.

The loss is far below a thousandth of a training step. What it is for: no NaN and no lost digits where one of the
distributions is sharp, and one pass over large candidate sets; on a CPU with few passages eager PyTorch is faster,
since a registered op costs more than the arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import append_rows, in_child, in_turn, memory_growth, show, where
from ragkit_kernels.lsr_loss import lsr_loss, lsr_loss_from_embeddings, lsr_loss_from_embeddings_reference
from ragkit_kernels.lsr_loss.reference import lsr_loss_reference
from torch import Tensor

GAMMA, BETA = 0.05, 1.0


def eager_loss(scores: Tensor, lm_scores: Tensor, mask: Tensor | None) -> Tensor:
    """KL(P_R||Q_LM) as one writes it in PyTorch, in float32."""
    s, t = scores.float() / GAMMA, lm_scores.float() / BETA
    if mask is not None:
        s, t = s.masked_fill(~mask, -1e9), t.masked_fill(~mask, -1e9)
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def eager_embeddings(queries: Tensor, passages: Tensor, lm_scores: Tensor, mask: Tensor | None) -> Tensor:
    """The products in the embeddings' dtype, then `eager_loss`."""
    shared = passages.ndim == 2
    scores = queries @ passages.T if shared else torch.bmm(passages, queries.unsqueeze(-1)).squeeze(-1)
    return eager_loss(scores, lm_scores, mask)


class Case:
    """Inputs of one size, and every method on them."""

    def __init__(self, B: int, K: int, D: int, shared: bool, dtype: torch.dtype, masked: bool, device: str) -> None:
        g = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1)

        queries, passages = draw(B, D), draw(*((K, D) if shared else (B, K, D)))
        scores = torch.einsum("bd,kd->bk" if shared else "bd,bkd->bk", queries, passages)
        self.queries, self.passages, self.scores = (
            t.to(device, dtype).requires_grad_() for t in (queries, passages, scores)
        )
        self.lm_scores = (-3 * torch.rand(B, K, generator=g)).to(device)
        self.mask = (torch.rand(B, K, generator=g) < 0.8).to(device) if masked else None
        self.compiled = {"scores": torch.compile(eager_loss), "embeddings": torch.compile(eager_embeddings)}

    def leaves(self, part: str) -> list[Tensor]:
        """What the method gives gradients for."""
        return [self.scores] if part == "scores" else [self.queries, self.passages]

    def grads(self, part: str, method: str, repeat: int = 1) -> tuple[Tensor, ...]:
        """Forward and backward, `repeat` times."""
        leaves, ours = self.leaves(part), lsr_loss if part == "scores" else lsr_loss_from_embeddings
        eager: Callable[..., Tensor] = eager_loss if part == "scores" else eager_embeddings
        for _ in range(repeat):
            if method == "ragkit":
                loss = ours(*leaves, self.lm_scores, GAMMA, BETA, mask=self.mask)
            else:
                loss = (self.compiled[part] if method == "compile" else eager)(*leaves, self.lm_scores, self.mask)
            found = torch.autograd.grad(loss, leaves)
        return found

    def exact(self, part: str) -> Tensor:
        """The gradient of the scores, or of the queries, in float64 on the CPU."""
        leaves = [t.detach().cpu().double().requires_grad_() for t in self.leaves(part)]
        function = lsr_loss_reference if part == "scores" else lsr_loss_from_embeddings_reference
        mask = None if self.mask is None else self.mask.cpu()
        loss = function(*leaves, self.lm_scores.cpu().double(), GAMMA, BETA, mask=mask)
        return torch.autograd.grad(loss, leaves)[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", default=["8x10", "512x10000"], help="questions x passages")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--shared-from", type=int, default=1000, help="passages from which on all share them")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--part", nargs="+", default=["scores", "embeddings"], choices=["scores", "embeddings"])
    parser.add_argument("--with-compile", action="store_true", help="torch.compile of the eager code too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", nargs=3, default=None, help=argparse.SUPPRESS)  # PART METHOD MASKED, in a child
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        part, method, masked = args.memory
        case = case_of(args, args.sizes[0], args.dtype[0], masked == "1")
        small = Case(2, 4, 8, case.passages.ndim == 2, case.queries.dtype, masked == "1", args.device)
        print(memory_growth(partial(small.grads, part, method), partial(case.grads, part, method), args.device))
        return
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        for dtype in args.dtype:
            for masked in (False, True):
                case = case_of(args, size, dtype, masked)
                for part in args.part:
                    rows += measure(args, size, dtype, masked, case, part)
    if args.csv:
        append_rows(args.csv, rows)


def case_of(args: argparse.Namespace, size: str, dtype: str, masked: bool) -> Case:
    B, K = (int(n) for n in size.split("x"))
    return Case(B, K, args.dim, args.shared_from <= K, getattr(torch, dtype), masked, args.device)


def measure(args: argparse.Namespace, size: str, dtype: str, masked: bool, case: Case, part: str) -> list[dict]:
    """Rows of every method of one part."""
    methods = ["ragkit", "eager", *(["compile"] if args.with_compile else [])]
    repeat = max(1, 2_000_000 // max(20_000, case.scores.numel() * (1 if part == "scores" else args.dim)))
    times = in_turn({m: partial(case.grads, part, m, repeat) for m in methods}, args.rounds, args.device)
    exact = case.exact(part)
    rows = []
    for method in methods:
        error = (case.grads(part, method)[0].cpu().double() - exact).norm() / exact.norm()
        rows.append(
            {
                **where(args.device),
                "part": part,
                "questions": len(case.scores),
                "passages": case.scores.shape[1],
                "dim": args.dim if part == "embeddings" else "",
                "shared": case.passages.ndim == 2,
                "masked": masked,
                "dtype": dtype,
                "method": method,
                "ms": round(times[method]["ms"] / repeat, 4),
                "peak_mib": round(memory(args, size, dtype, masked, case, part, method), 1),
                "error": f"{error:.1e}",
                "times_eager": round(times["eager"]["ms"] / times[method]["ms"], 2),
            }
        )
    print(show(rows, list(rows[0])[4:]), end="\n\n", flush=True)
    return rows


def memory(args: argparse.Namespace, size: str, dtype: str, masked: bool, case: Case, part: str, method: str) -> float:
    """Peak memory of one call, inputs not counted; on a CPU in a new process of the script."""
    if args.device.startswith("cuda"):
        return memory_growth(lambda: None, partial(case.grads, part, method), args.device)
    options = [f"--dim={args.dim}", f"--shared-from={args.shared_from}", f"--threads={args.threads}"]
    what = ["--sizes", size, "--dtype", dtype, "--memory", part, method, str(int(masked))]
    return in_child(__file__, *options, *what)


if __name__ == "__main__":
    main(sys.argv[1:])
