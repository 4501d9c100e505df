"""Takes the best of the trained LMs into the package: `python -m ragkit.small_world.ship_lm FOLDER [FOLDER ...]`.

The best is chosen on the validation world of made entities (`training.json`); only then is it measured on the shipped
facts, and its model card written with both.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragkit.files import atomic_dir, atomic_write_json, atomic_write_text
from ragkit.small_world import lm_path
from ragkit.small_world.build import SEED
from ragkit.small_world.lm_gates import GATES, measure
from ragkit.small_world.world import make_world, read_facts

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MEANING = {
    "em_gold": "exact match, gold passage alone",
    "gold_first_of_5": "gold passage first among five (the entity's other passages), by the answer's log-prob",
    "hard_auc": "gold against passages that hold the same answer string, share of pairs won",
    "hard_gold_first": "gold first among those",
    "em_gold_3": "exact match, gold passage and three distractors (two of the same entity)",
    "em_two_hop": "exact match on two-hop questions, both passages given",
    "unknown": 'answers "unknown" when four passages of others are given',
    "auc": "gold against the entity's other passages, share of pairs won",
}


def validation_score(numbers: dict[str, Any]) -> float:
    """What the best seed is chosen by: the mean of the three gated numbers and of the one with distractors."""
    return sum(numbers[k] for k in (*GATES, "em_gold_3")) / (len(GATES) + 1)


def card(training: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    """The model card."""
    gates = training["gates"]
    rows = "\n".join(
        f"| {meaning} | {gates[k]:.3f} | {f'{GATES[k]:.2f}' if k in GATES else ''} | {training[k]:.3f} |"
        for k, meaning in MEANING.items()
    )
    missed = [MEANING[k] for k, least in GATES.items() if gates[k] < least]
    verdict = "All gates are met." if not missed else f"Gates missed: {'; '.join(missed)}."
    tried = "\n".join(f"| {s['seed']} | {s['step']} | {s['cpu_seconds']} | {validation_score(s):.3f} |" for s in seeds)
    return f"""# The tiny LM of the small world

A Llama of {training["parameters"] / 1e6:.2f} million parameters (4 layers, 128 dimensions, byte-level BPE of 2,048
tokens) that answers a question from short passages. It exists so that a RAG system can be tuned and measured offline
on two CPU cores.

**It is no general language model.** It was trained on made entities with random facts, told and asked with the same
sentence and question templates as the small world. That template overlap is why it works there and nowhere else. No
real fact of the small world is in its training data, so a right answer was read from the passage.

## Prompt

```
Passage: Lima is the capital of Peru. Peru is a country in South America.
Question: What is the capital of Peru?
Answer: Lima
```

Several `Passage:` lines may stand above the question. Where no passage tells, it answers `unknown`.

## Scores

On {training["gate_questions"]} one-hop questions about the shipped real facts, unseen in training; beside it the
validation world of made entities{", on which the seed was chosen" if len(seeds) > 1 else ""}.

| what | real facts | gate | validation |
|---|---|---|---|
{rows}

{verdict} Measured by `python -m ragkit.small_world.lm_gates`.

## Training

`python -m ragkit.small_world.train_lm OUT --seed {training["seed"]}`: {training["step"]:,} steps,
{training["million_tokens"]} million tokens, {training["cpu_seconds"]:,} CPU seconds with {training["threads"]}
thread(s), float32, from the induction-head start of `lm_model.teach_copying`; Muon and AdamW.

| seed | steps | CPU seconds | validation score |
|---|---|---|---|
{tried}

Licence: Apache-2.0, as the rest of ragkit. The word list behind the made names is the vocabulary of all-MiniLM-L6-v2.
"""


def main() -> None:
    """Chooses, measures, copies, writes the card."""
    parser = argparse.ArgumentParser(description="Ship the best of the trained tiny LMs")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    args = parser.parse_args()
    seeds = [json.loads((f / "training.json").read_text(encoding="utf-8")) for f in args.folders]
    best = max(range(len(seeds)), key=lambda i: validation_score(seeds[i]))
    folder, training = args.folders[best], dict(seeds[best])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training["gates"] = measure(model, tokenizer, make_world(read_facts(), SEED), args.questions)
    training["gate_questions"] = args.questions
    with atomic_dir(lm_path()) as temporary:
        for name in FILES:
            shutil.copyfile(folder / name, temporary / name)
        atomic_write_json(temporary / "training.json", training)
        atomic_write_text(temporary / "README.md", card(training, seeds))
    print(json.dumps(training, indent=1))


if __name__ == "__main__":
    main()
