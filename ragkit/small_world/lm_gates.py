"""What the tiny LM must be able to do before it may teach a retriever: `python -m ragkit.small_world.lm_gates`.

All gates are on a `World` whose entities, values and passages the LM never saw in training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ragkit.small_world.lm_rows import PAD, prompt_text
from ragkit.small_world.world import World, make_world, read_facts

GATES = {"em_gold": 0.90, "gold_first_of_5": 0.95, "hard_auc": 0.95}
Item = tuple[list[str], str, str]  # passages, question, answer


@torch.no_grad()
def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item], batch: int = 32
) -> tuple[list[bool], list[float]]:
    """For each item: is the greedy answer exact, and the log-prob of the answer and its end (nats, summed).

    Exact means that the most likely token at every answer position is the right one, end token included: the same as
    greedy decoding.
    """
    prompts = [tokenizer(prompt_text(passages, question))["input_ids"] for passages, question, _ in items]
    answers = [
        [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for _, _, answer in items
    ]
    exact, scores = [False] * len(items), [0.0] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(prompts[i]) + len(answers[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), PAD)
        for r, i in enumerate(chosen):
            ids[r, : len(prompts[i]) + len(answers[i])] = torch.tensor(prompts[i] + answers[i])
        hidden = model.model(
            input_ids=ids
        ).last_hidden_state  # padding is on the right: causal attention never sees it
        for r, i in enumerate(chosen):
            at = slice(len(prompts[i]) - 1, len(prompts[i]) + len(answers[i]) - 1)
            logp = model.lm_head(hidden[r, at]).float().log_softmax(-1)
            target = torch.tensor(answers[i])
            exact[i] = bool((logp.argmax(-1) == target).all())
            scores[i] = float(logp.gather(1, target[:, None]).sum())
    return exact, scores


def _same_answer(world: World, row: dict[str, Any]) -> list[str]:
    """Passages that hold the answer as whole words but do not support the question."""
    answer = f" {row['answer']}"
    ends = (".", ",", " ")
    return [
        key
        for key, text in world.passages.items()
        if key not in row["supporting_facts"] and any(answer + end in f" {text}" for end in ends)
    ]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, n: int = 300, seed: int = 8
) -> dict[str, float]:
    """The gates and some numbers beside them, on `n` one-hop questions about test and training entities.

    Returns:
        `em_gold`: exact match with the gold passage alone. `em_gold_3`: gold and three distractors (at most two of
        the same entity). `gold_first_of_5` and `auc`: gold against four passages that share most with the question
        (its entity's other facets first, then the same facet of others), by the answer's log-prob.
        `hard_gold_first`, `hard_auc`: gold against at most three passages that hold the same answer string.
        `em_two_hop`: both supporting passages given. `unknown`: share of questions given four passages of others
        that are answered "unknown".
    """
    model.eval()
    rng = random.Random(seed)
    one = [r for r in [*world.test, *world.train] if r["hops"] == 1]
    two = [r for r in [*world.test, *world.train] if r["hops"] == 2]
    rows = rng.sample(one, min(n, len(one)))
    keys = list(world.passages)
    of_entity: dict[str, list[str]] = {}
    for key in keys:
        of_entity.setdefault(key.split(" [")[0], []).append(key)

    def distractors(row: dict[str, Any], count: int, same: int) -> list[str]:
        gold = row["supporting_facts"]
        own = [k for k in of_entity[row["entity"]] if k not in gold]
        chosen = rng.sample(own, min(same, len(own)))
        rest = [k for k in keys if k not in chosen and k not in gold]
        return chosen + rng.sample(rest, count - len(chosen))

    def item(passage_keys: list[str], row: dict[str, Any], answer: str | None = None) -> Item:
        return [world.passages[k] for k in passage_keys], row["question"], answer or row["answer"]

    def share(items: list[Item]) -> float:
        exact, _ = read(model, tokenizer, items)
        return sum(exact) / len(exact)

    out = {"em_gold": share([item(r["supporting_facts"], r) for r in rows])}
    mixed = []
    for r in rows:
        passages = [*r["supporting_facts"], *distractors(r, 3, 2)]
        rng.shuffle(passages)
        mixed.append(item(passages, r))
    out["em_gold_3"] = share(mixed)
    out["em_two_hop"] = share(
        [item(rng.sample(r["supporting_facts"], 2), r) for r in rng.sample(two, min(n, len(two)))]
    )
    out["unknown"] = share([item(distractors(r, 4, 0), r, "unknown") for r in rows])
    out["gold_first_of_5"], out["auc"], _ = _ranking(
        model, tokenizer, item, rows, {r["id"]: distractors(r, 4, 4) for r in rows}
    )
    shared = {r["id"]: _same_answer(world, r) for r in rows}
    hard = [r for r in rows if shared[r["id"]]]
    against = {r["id"]: rng.sample(shared[r["id"]], min(3, len(shared[r["id"]]))) for r in hard}
    out["hard_gold_first"], out["hard_auc"], out["hard_pairs"] = _ranking(model, tokenizer, item, hard, against)
    return {k: round(v, 4) for k, v in out.items()}


def _ranking(
    model: Any, tokenizer: Any, item: Any, rows: list, against: dict[str, list[str]]
) -> tuple[float, float, float]:
    """Share of questions whose gold passage scores highest, share of pairs won, number of pairs."""
    items, owner = [], []
    for r in rows:
        for key in [r["supporting_facts"][0], *against[r["id"]]]:
            items.append(item([key], r))
            owner.append(r["id"])
    _, scores = read(model, tokenizer, items)
    by_row: dict[str, list[float]] = {}
    for who, score in zip(owner, scores, strict=True):
        by_row.setdefault(who, []).append(score)
    first = sum(s[0] > max(s[1:]) for s in by_row.values())
    pairs = [s[0] > other for s in by_row.values() for other in s[1:]]
    return first / max(1, len(by_row)), sum(pairs) / max(1, len(pairs)), float(len(pairs))


def main() -> None:
    """Prints the gates of an LM folder on the shipped facts; exit status 1 if one is missed."""
    from ragkit.small_world import lm_path

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "lm", nargs="?", type=Path, default=lm_path(), help="folder of the LM (default: the shipped one)"
    )
    parser.add_argument("--questions", type=int, default=600)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.lm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.lm)
    numbers = measure(model, tokenizer, make_world(read_facts()), args.questions)
    print(json.dumps(numbers, indent=1))
    missed = [k for k, least in GATES.items() if numbers[k] < least]
    for gate, least in GATES.items():
        print(f"{gate:18s} {numbers[gate]:.3f}  gate {least:.2f}  {'MISSED' if gate in missed else 'ok'}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
