"""LM scores of (question, passage) pairs: what LSR waits for.

    python kernels/benchmarks/lsr_scoring.py [--csv results.csv] [--device cuda] [--model NAME] [--questions 2]

A random Llama (4 layers of 256, 32,000 tokens in the vocabulary) scores 64 response tokens after prompts of 448
tokens, 8 passages to a question, in turn within one run:

- `one_by_one`: a forward pass for each pair with all its logits, as FedRAG's `compute_target_sequence_proba` does;
- `full_logits`: the 8 pairs of a question at once, all logits, `log_softmax`, then the response's tokens;
- `ragkit`: `Generator.sequence_logprob`; `ragkit_shared` the same where the question stands before the passages, with
  `--shared` tokens in common;
- `cached`: the scores read back from the disk cache, as every epoch after the first does, keys and all.

Peak memory is what a call adds to the model: measured by CUDA itself; on a CPU in a process of its own for each, by
the resident set. The tokens are random: no way is faster for what they say.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import append_rows, in_child, in_turn, memory_growth, show, where
from torch import Tensor

from ragkit.rag.lm_digest import lm_digest
from ragkit.rag.scoring import score_responses
from ragkit.tuning.score_cache import ScoreCache, pair_key

PASSAGES = 8


def make_model(args: argparse.Namespace) -> Any:
    """A random Llama, or a model by name, folder or "LAYERSxWIDTHxVOCABULARY"."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, args.dtype)
    if args.model.count("x") != 2:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    layers, width, vocabulary = map(int, args.model.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=max(64, width * 8 // 3 // 64 * 64),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=4096,
        dtype=dtype,
    )
    with torch.device(args.device):
        return LlamaForCausalLM(config).to(dtype).eval()


def make_pairs(args: argparse.Namespace, vocabulary: int, shared: int) -> SimpleNamespace:
    """Token ids of prompts and responses, PASSAGES to a question, that begin alike in `shared` tokens."""
    random = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=random).tolist()

    pairs = SimpleNamespace(prompts=[], responses=[], groups=[])
    for question in range(args.questions):
        start, response = tokens(shared), tokens(args.target)
        for _ in range(PASSAGES):
            pairs.prompts.append(start + tokens(args.prompt - shared))
            pairs.responses.append(response)
            pairs.groups.append(question)
    return pairs


@torch.no_grad()
def one_by_one(model: Any, pairs: SimpleNamespace) -> Tensor:
    """One forward pass for each pair, all logits; then token by token (with the right shift, in the log domain)."""
    sums = []
    for prompt, response in zip(pairs.prompts, pairs.responses, strict=True):
        ids = torch.tensor([prompt + response], device=model.device)  # [1, T]
        logits = model(input_ids=ids).logits  # [1, T, V]
        total = 0.0
        for number, token in enumerate(response):
            probabilities = torch.softmax(logits[0, len(prompt) + number - 1].float(), dim=-1)  # [V]
            total += torch.log(probabilities[token]).item()
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


@torch.no_grad()
def full_logits(model: Any, pairs: SimpleNamespace) -> Tensor:
    """The pairs of a question at once: all logits, all log-probabilities, then those that are wanted."""
    sums = []
    for first in range(0, len(pairs.prompts), PASSAGES):
        chosen = slice(first, first + PASSAGES)
        rows = [p + r for p, r in zip(pairs.prompts[chosen], pairs.responses[chosen], strict=True)]
        ids = torch.tensor(rows, device=model.device)  # [B, T], all of one length
        logprobs = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)  # [B, T - 1, V]
        found = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)  # [B, T - 1]
        start = len(pairs.prompts[first]) - 1
        sums.append(found[:, start:].double().sum(1).cpu())
    return torch.cat(sums)


def ragkit(model: Any, pairs: SimpleNamespace) -> Tensor:
    """As `Generator.sequence_logprob` calls it."""
    return score_responses(
        model,
        pairs.prompts,
        pairs.responses,
        0,
        batch_size=pairs.batch_size,
        groups=pairs.groups,
        memory_mib=pairs.memory,
    )


def cached(model: Any, pairs: SimpleNamespace) -> Tensor:
    """What `score_passages` does where every pair is known: digest, keys, look-up."""
    with ScoreCache(pairs.folder, lm_digest(model)) as cache:
        keys = [pair_key(p, r) for p, r in zip(pairs.prompts, pairs.responses, strict=True)]
        known = cache.get(keys)
    return torch.tensor([known[key][0] for key in keys], dtype=torch.float64)


METHODS: dict[str, Callable[[Any, SimpleNamespace], Tensor]] = {
    "one_by_one": one_by_one,
    "full_logits": full_logits,
    "ragkit": ragkit,
    "ragkit_shared": ragkit,
    "cached": cached,
}


def calls(args: argparse.Namespace, names: list[str], folder: str) -> tuple[Any, dict[str, Callable[[], Tensor]]]:
    """The model, and each method with its own pairs."""
    model = make_model(args)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    methods: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        pairs = make_pairs(args, vocabulary, args.shared if name == "ragkit_shared" else 0)
        pairs.batch_size, pairs.memory, pairs.folder = args.batch_size, args.memory, folder
        if name == "cached":
            values = ragkit(model, pairs)
            with ScoreCache(folder, lm_digest(model)) as cache:
                keys = [pair_key(p, r) for p, r in zip(pairs.prompts, pairs.responses, strict=True)]
                cache.put(keys, values.tolist(), [args.target] * len(keys))
        methods[name] = partial(METHODS[name], model, pairs)
    return model, methods


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """Memory that one call adds at its peak; on a CPU in a process of its own."""
    if args.device == "cpu" and not args.measure_memory:
        sizes = [
            f"--{key}={getattr(args, key)}".replace("batch_size", "batch-size")
            for key in SIZES
            if getattr(args, key) is not None
        ]
        return in_child(__file__, "--measure-memory", name, *sizes)
    with tempfile.TemporaryDirectory() as folder:
        model, methods = calls(args, [name], folder)
        small = argparse.Namespace(**{**vars(args), "questions": 1, "prompt": 8, "target": 2, "shared": 4})
        pairs = make_pairs(small, model.get_output_embeddings().weight.shape[0], 0)
        pairs.prompts, pairs.responses, pairs.groups = pairs.prompts[:1], pairs.responses[:1], pairs.groups[:1]
        pairs.batch_size, pairs.memory, pairs.folder = args.batch_size, args.memory, folder
        warm_up = methods[name] if name == "cached" else partial(METHODS[name], model, pairs)
        return memory_growth(warm_up, methods[name], args.device)


SIZES = ("model", "dtype", "questions", "prompt", "target", "shared", "batch_size", "memory", "device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4x256x32000", help="LAYERSxWIDTHxVOCABULARY of a random Llama, or a name")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--questions", type=int, default=1, help=f"each with {PASSAGES} passages")
    parser.add_argument("--prompt", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--target", type=int, default=64, help="tokens of a response")
    parser.add_argument("--shared", type=int, default=192, help="tokens that prompts share in ragkit_shared")
    parser.add_argument("--batch-size", dest="batch_size", type=int, default=64, help="score_batch_size")
    parser.add_argument("--memory", type=int, help="score_memory in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--measure-memory", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        print(peak_mib(args.measure_memory, args))
        return
    names = args.methods.split(",")
    with tempfile.TemporaryDirectory() as folder:
        _, methods = calls(args, names, folder)
        values = {name: method() for name, method in methods.items()}
        loose = args.dtype != "float32"
        for name in set(names) - {"ragkit_shared"}:
            torch.testing.assert_close(values[name], values[names[0]], rtol=1e-2 if loose else 1e-6, atol=1e-3)
        times = in_turn(methods, args.rounds, args.device)
        del methods
    pairs = args.questions * PASSAGES
    rows = []
    for name in names:
        rows.append(
            {
                **where(args.device),
                "model": args.model,
                "dtype": args.dtype,
                "prompt": args.prompt,
                "target": args.target,
                "shared": args.shared if name == "ragkit_shared" else 0,
                "pairs": pairs,
                "way": name,
                "s_per_pair": float(f"{times[name]['ms'] / 1000 / pairs:.4g}"),
                "cpu_s_per_pair": float(f"{times[name]['cpu_s'] / pairs:.4g}"),
                "faster_than_one_by_one": round(times[names[0]]["ms"] / times[name]["ms"], 2),
                "peak_mib": round(peak_mib(name, args), 1),
                "error_nats": float(f"{(values[name] - values[names[0]]).abs().max():.2g}")
                if name != "ragkit_shared"
                else "",
            }
        )
        print(
            show(
                rows[-1:], ["way", "s_per_pair", "cpu_s_per_pair", "faster_than_one_by_one", "peak_mib", "error_nats"]
            ),
            flush=True,
        )
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
