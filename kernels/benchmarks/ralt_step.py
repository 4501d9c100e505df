"""One RALT step (forward, backward, AdamW): the model's own loss against ragkit's, without the prompt's logits.

    python kernels/benchmarks/ralt_step.py [--csv results.csv] [--device cuda] [--model NAME] [--rows 8]

A random Llama (4 layers of 256, 32,000 tokens in the vocabulary) trains on rows of 256 tokens of which the last 32
are the response, as LoRA and as a whole, in turn within one run; and on rows whose tokens are all labelled, where
nothing is saved by leaving prompts out. Loss and gradient norm of both ways must agree before anything is timed. Peak
memory is what a step adds to model, gradients and optimizer: measured by CUDA itself; on a CPU in a process of its own
for each, by the resident set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lsr_scoring import make_model
from measure import append_rows, in_child, in_turn, memory_growth, show, where

from ragkit.tuning.fused_loss import training_loss

WAYS = ("own", "ragkit")
KINDS = ("lora", "full", "lora_all_labels", "full_all_labels")
SIZES = ("model", "dtype", "rows", "tokens", "response", "device")


def make_batch(args: argparse.Namespace, kind: str, vocabulary: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (args.rows, args.tokens), generator=random).to(args.device)  # [B, T]
    labels = ids.clone()
    if not kind.endswith("_all_labels"):
        labels[:, : args.tokens - args.response] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trainee(args: argparse.Namespace, kind: str, way: str, stack: ExitStack) -> tuple[Any, Any]:
    """The model to train, with its adapter and its way to the loss until the stack ends, and its optimizer."""
    model = make_model(args)
    if kind.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    model.train()
    if way == "ragkit":
        stack.enter_context(training_loss(model))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def step(model: Any, optimizer: Any, batch: dict[str, Any]) -> tuple[float, float]:
    """(loss, gradient norm) of one step."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # the gradients' memory is the model's, not the step's
    return loss.item(), norm.item()


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """Memory that one step adds at its peak; on a CPU in a process of its own."""
    if args.device == "cpu" and not args.measure_memory:
        return in_child(__file__, "--measure-memory", name, *(f"--{key}={getattr(args, key)}" for key in SIZES))
    kind, way = name.split("/")
    small = argparse.Namespace(**{**vars(args), "rows": 1, "tokens": 4, "response": 2})
    with ExitStack() as stack:
        model, optimizer = trainee(args, kind, way, stack)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        warm_up, method = (
            partial(step, model, optimizer, make_batch(sizes, kind, vocabulary)) for sizes in (small, args)
        )
        return memory_growth(warm_up, method, args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4x256x32000", help="LAYERSxWIDTHxVOCABULARY of a random Llama, or a name")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--response", type=int, default=32, help="tokens of its response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        print(peak_mib(args.measure_memory, args))
        return
    rows = []
    for kind in KINDS:
        steps: dict[str, Callable[[], Any]] = {}
        found = {}
        with ExitStack() as stack:
            for way in WAYS:
                model, optimizer = trainee(args, kind, way, stack)
                batch = make_batch(args, kind, model.get_output_embeddings().weight.shape[0])
                steps[way] = partial(step, model, optimizer, batch)
                found[way] = steps[way]()
            tolerance = 1e-5 if args.dtype == "float32" else 2e-2
            torch.testing.assert_close(
                torch.tensor(found["ragkit"]), torch.tensor(found["own"]), rtol=tolerance, atol=1e-5
            )
            times = in_turn(steps, args.rounds, args.device)
        del steps, model, optimizer
        peaks = {way: peak_mib(f"{kind}/{way}", args) for way in WAYS}
        for way in WAYS:
            rows.append(
                {
                    **where(args.device),
                    "model": args.model,
                    "dtype": args.dtype,
                    "rows": args.rows,
                    "tokens": args.tokens,
                    "labelled": args.tokens if kind.endswith("_all_labels") else args.response,
                    "trained": kind.split("_")[0],
                    "loss": way,
                    "ms": round(times[way]["ms"], 1),
                    "cpu_s": round(times[way]["cpu_s"], 3),
                    "faster_than_own": round(times["own"]["ms"] / times[way]["ms"], 2),
                    "peak_mib": round(peaks[way], 1),
                    "memory_of_own": round(peaks[way] / peaks["own"], 3),
                }
            )
        columns = ["trained", "labelled", "loss", "ms", "cpu_s", "faster_than_own", "peak_mib", "memory_of_own"]
        print(show(rows[-2:], columns), flush=True)
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
