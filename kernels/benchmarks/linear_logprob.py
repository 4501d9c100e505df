"""K2, log-probabilities of tokens under a linear head: ours against all logits at once, Liger and Cut Cross-Entropy.

    python kernels/benchmarks/linear_logprob.py [--csv FILE]
    pip install liger-kernel cut-cross-entropy    # for the GPU's peers; what is missing is left out, with a message
    python kernels/benchmarks/linear_logprob.py --device cuda --dtype bfloat16 --dim 2048 4096 \
        --vocabulary 32000 128256 --tokens 1024 5120 16384 [--csv FILE]

Three passes: forward (scoring); forward and backward with a gradient of the head (full fine-tuning); the same with a
frozen head (LoRA). The methods take turns in one run; peak memory is what one call adds, on a CPU in a process of its
own. `error` is the mean absolute error of the log-probability of 64 tokens against float64 of the same inputs. Liger
sums in its training passes, as it is meant to be used; its forward pass gives a loss per token like the others'.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import append_rows, in_child, in_turn, memory_growth, show, where
from ragkit_kernels.linear_logprob import token_logprobs
from torch import Tensor
from torch.nn.functional import cross_entropy

SEQUENCE = 64  # tokens of a response
PASSES = ("forward", "forward+backward", "frozen head")


def peer(module: str, name: str, package: str) -> Callable[..., Any] | None:
    """A function of another kit, or None and a message."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"without {package} ({error}); to compare with it: pip install {package}", file=sys.stderr)
        return None


class Case:
    """Inputs of one size, and every method on them: `method(pass_)` gives the log-probabilities [T], or their sum."""

    def __init__(self, tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, dim, generator=g, dtype=dtype).to(device)
        # Logits with a deviation of 3: a few hundred tokens share the probability, as in a language model. In place,
        # since the process's highest memory so far is where the measurement begins.
        self.weight = torch.randn(vocabulary, dim, generator=g, dtype=dtype).mul_(3 * dim**-0.5).to(device)
        self.targets = torch.randint(vocabulary, (tokens,), generator=g).to(device)
        self.gradient = torch.full((tokens,), -1 / tokens, device=device)

    def ragkit(self, _: str) -> Tensor:
        return token_logprobs(self.hidden, self.weight, self.targets)

    def ragkit_chunked(self, _: str) -> Tensor:
        return token_logprobs(self.hidden, self.weight, self.targets, backend="chunked")

    def log_softmax(self, _: str) -> Tensor:
        logits = (self.hidden @ self.weight.T).float()
        return logits.log_softmax(-1).gather(1, self.targets.unsqueeze(1)).squeeze(1)

    def cross_entropy(self, _: str) -> Tensor:
        return -cross_entropy((self.hidden @ self.weight.T).float(), self.targets, reduction="none")

    def liger(self, pass_: str) -> Tensor:
        function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        reduction = "none" if pass_ == "forward" else "sum"
        return -function(self.hidden, self.weight, self.targets, reduction=reduction)

    def cce(self, _: str, **options: Any) -> Tensor:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return -function(self.hidden, self.weight, self.targets, reduction="none", **options)

    def cce_exact(self, pass_: str) -> Tensor:
        """Without leaving out small gradients, as we do not either."""
        return self.cce(pass_, filter_eps=None)

    def call(self, method: str, pass_: str) -> None:
        """One forward pass, or one step of training."""
        run = getattr(self, method)
        if pass_ == "forward":
            with torch.no_grad():
                run(pass_)
            return
        leaves = [self.hidden] if pass_ == "frozen head" else [self.hidden, self.weight]
        for tensor in (self.hidden, self.weight):
            tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
        found = run(pass_)
        torch.autograd.grad(found, leaves, self.gradient[: found.numel()].view_as(found).to(found.dtype))
        for tensor in leaves:
            tensor.requires_grad_(False)

    def error(self, method: str) -> float:
        """Mean absolute error of the sums over `SEQUENCE` tokens, of the first 8 such sequences."""
        kept = slice(0, min(8 * SEQUENCE, len(self.targets) // SEQUENCE * SEQUENCE))
        with torch.no_grad():
            found = getattr(self, method)("forward")[kept].double()
            exact = []
            for start in range(0, kept.stop, SEQUENCE):  # float64 logits of few rows at a time
                rows = slice(start, start + SEQUENCE)
                logits = self.hidden[rows].double() @ self.weight.double().T
                exact.append(logits.log_softmax(-1).gather(1, self.targets[rows].unsqueeze(1)).sum())
        return float((found.view(-1, SEQUENCE).sum(1) - torch.stack(exact)).abs().mean())


PACKAGES = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "cce_exact": "cut-cross-entropy"}


def version_of(method: str) -> str:
    """Version of the kit that a method is from; "" for ours and PyTorch's, which have columns of their own."""
    return importlib.metadata.version(PACKAGES[method]) if method in PACKAGES else ""


def methods_of(device: str) -> list[str]:
    """What can be compared here."""
    found = ["ragkit", "log_softmax", "cross_entropy"]
    if device.startswith("cuda"):
        found.insert(1, "ragkit_chunked")
        if peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", PACKAGES["liger"]):
            found.append("liger")
        if peer("cut_cross_entropy", "linear_cross_entropy", PACKAGES["cce"]):
            found += ["cce", "cce_exact"]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=None, help="append the rows to this file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dim", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out, such as cce")
    parser.add_argument("--memory", nargs=2, default=None, help=argparse.SUPPRESS)  # METHOD PASS, in a child
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        kind = getattr(torch, args.dtype[0])
        small = Case(SEQUENCE, args.dim[0], 100, kind, args.device)
        case = Case(args.tokens[0], args.dim[0], args.vocabulary[0], kind, args.device)
        print(memory_growth(partial(small.call, *args.memory), partial(case.call, *args.memory), args.device))
        return
    methods = [m for m in methods_of(args.device) if m not in args.without]
    for dtype, vocabulary, dim, tokens in itertools.product(args.dtype, args.vocabulary, args.dim, args.tokens):
        case = Case(tokens, dim, vocabulary, getattr(torch, dtype), args.device)
        for pass_ in PASSES:
            rows = measure(args, case, dtype, methods, pass_)
            if args.csv and rows:  # at once: a lent GPU may be taken back
                append_rows(args.csv, rows)


def measure(
    args: argparse.Namespace, case: Case, dtype: str, methods: list[str], pass_: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every method of one pass."""
    able = [m for m in methods if fits(case, m, pass_)]
    times = in_turn({m: partial(case.call, m, pass_) for m in able}, args.rounds, args.device)
    (tokens, dim), vocabulary = case.hidden.shape, len(case.weight)
    rows = []
    for method in able:
        if args.device.startswith("cuda"):
            peak = memory_growth(lambda: None, partial(case.call, method, pass_), args.device)
        else:
            sizes = {"dim": dim, "vocabulary": vocabulary, "tokens": tokens, "dtype": dtype, "threads": args.threads}
            peak = in_child(__file__, *(f"--{k}={v}" for k, v in sizes.items()), "--memory", method, pass_)
        base = times.get("log_softmax", {}).get("ms")
        rows.append(
            {
                **where(args.device),
                "tokens": tokens,
                "dim": dim,
                "vocabulary": vocabulary,
                "dtype": dtype,
                "pass": pass_,
                "method": method,
                "version": version_of(method),
                "ms": round(times[method]["ms"], 2),
                "cpu_s": round(times[method]["cpu_s"], 3),
                "peak_mib": round(peak, 1),
                "error": f"{case.error(method):.2e}" if pass_ == "forward" else "",
                "times_log_softmax": round(base / times[method]["ms"], 2) if base else "",
            }
        )
    columns = ["tokens", "dim", "vocabulary", "dtype", "pass", "method", "ms", "cpu_s", "peak_mib", "error"]
    print(show(rows, [*columns, "times_log_softmax"]), end="\n\n", flush=True)
    return rows


def fits(case: Case, method: str, pass_: str) -> bool:
    """Whether the method has memory enough; on a GPU also its warm-up. What does not fit is named."""
    if not case.hidden.is_cuda:
        return True
    try:
        case.call(method, pass_)
    except torch.OutOfMemoryError:
        print(f"{method}, {pass_}: out of memory", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
