"""Trains the tiny LM: `python -m ragkit.small_world.train_lm OUT [--seed 0] [--steps 5000]`.

One script, one schedule: learning rate constant, then linear to 2 % over the last third; the rows get harder with the
share of the steps done (`lm_rows.scene`). The budget is in optimiser steps, so a busy machine changes the time and
not the result.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ragkit.files import atomic_write_json
from ragkit.small_world.lm_gates import measure
from ragkit.small_world.lm_model import make_model, make_tokenizer
from ragkit.small_world.lm_rows import row
from ragkit.small_world.muon import Muon
from ragkit.small_world.synthetic import tables
from ragkit.small_world.world import make_world

BATCH, LENGTH = 12, 256  # rows a step, tokens a row
OTHER_TOKENS = 0.2  # share of the tokens outside answers that are learnt too, and their weight in the loss
WARMUP, HOLD, LAST = 40, 0.65, 0.02
MUON_RATE, ADAM_RATE = 0.02, 3e-3


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rates: warm-up, constant, linear decay."""
    done = step / steps
    return min(1.0, (step + 1) / WARMUP) * (1.0 if done < HOLD else max(LAST, (1 - done) / (1 - HOLD)))


def batch(rng: random.Random, encode, stage: float, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Token ids [BATCH, T] and answer weights [BATCH, T]."""
    rows = [row(rng, encode, LENGTH, stage, vocabulary) for _ in range(BATCH)]
    longest = max(len(ids) for ids, _ in rows)
    ids, weights = torch.zeros(BATCH, longest, dtype=torch.long), torch.zeros(BATCH, longest)
    for r, (row_ids, row_weights) in enumerate(rows):
        ids[r, : len(row_ids)] = torch.tensor(row_ids)
        weights[r, : len(row_weights)] = torch.tensor(row_weights, dtype=torch.float)
    return ids, weights


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy on the answers, and a little on other tokens; the head sees only these positions."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # [B, T-1, D]
    target, answer = ids[:, 1:], weights[:, 1:] > 0
    other = ~answer & (target != 0) & (torch.rand(target.shape) < OTHER_TOKENS)
    on_answers = F.cross_entropy(model.lm_head(hidden[answer]), target[answer])
    return on_answers + OTHER_TOKENS * F.cross_entropy(model.lm_head(hidden[other]), target[other])


def best_threads(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> int:
    """One or two threads, whichever does a step faster now: on a busy machine two can be several times slower."""
    seconds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss_of(model, ids, weights).backward()
        start = time.perf_counter()
        for _ in range(2):
            loss_of(model, ids, weights).backward()
        seconds[threads] = time.perf_counter() - start
    model.zero_grad()
    return min(seconds, key=seconds.__getitem__)


def train(out: Path, seed: int, steps: int, threads: int | None = None, every: int = 400) -> dict[str, float]:
    """Trains one LM and saves it with its tokenizer and `training.json` in `out`.

    The numbers are on a validation world of made entities; the shipped world is not looked at.
    """
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    model = make_model(seed)
    raw = tokenizer.backend_tokenizer

    def encode(text: str) -> list[int]:
        return raw.encode(text, add_special_tokens=False).ids

    sizes = {"country": 40, "person": 40, "company": 30, "book": 30}
    validation = make_world(tables(random.Random(999), sizes), seed=999)
    rng = random.Random(11 + seed)
    torch.set_num_threads(threads or best_threads(model, *batch(random.Random(0), encode, 0.5, len(tokenizer))))
    torch.manual_seed(seed)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [Muon(hidden, MUON_RATE), torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [MUON_RATE, ADAM_RATE]
    start, cpu, tokens, numbers = time.time(), time.process_time(), 0, {}
    model.train()
    for step in range(steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps)
        ids, weights = batch(rng, encode, step / steps, len(tokenizer))
        loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        if (step + 1) % every == 0 or step + 1 == steps:
            numbers = measure(model, tokenizer, validation, n=600 if step + 1 == steps else 150)
            numbers |= {
                "seed": seed,
                "step": step + 1,
                "million_tokens": round(tokens / 1e6, 2),
                "cpu_seconds": round(time.process_time() - cpu),
                "wall_seconds": round(time.time() - start),
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            print(json.dumps({"loss": round(float(loss), 3), **numbers}), flush=True)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            atomic_write_json(out / "training.json", numbers)
            model.train()
    return numbers


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny LM of the small world")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=None, help="default: one or two, whichever is faster now")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.seed, args.steps, args.threads)


if __name__ == "__main__":
    main()
