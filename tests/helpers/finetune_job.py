"""Toy data sets whose questions can be learnt, and the small fine-tunings of test_finetune*.py.

As a program it is one of these in a process of its own, which the tests kill or leave without room on the disk.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch

from ragkit.config import GFMFinetuneConfig
from ragkit.gfm.finetune import GFMFinetuneTrainer
from ragkit.graph import KnowledgeGraph
from ragkit.runs import Run

RELATIONS = ["likes", "owns", "fears"]


class WordEncoder:
    """Embeds a text by which relation it names: an encoder without weights. Counts the texts that it was given."""

    name = "words"

    def __init__(self, width=5):
        self.width, self.texts = width, 0

    def encode(self, texts, side):
        self.texts += len(texts)
        rows = [[word in text for word in RELATIONS] + ["inverse" in text, side == "query"] for text in texts]
        found = torch.tensor(rows, dtype=torch.float32).reshape(len(texts), 5)
        return torch.nn.functional.pad(found, (0, self.width - 5))


def row(identifier, person, relation, answer, **more):
    return {
        "id": identifier,
        "question": f"What {relation} {person}?",
        "question_entities": [person],
        "supporting_entities": [answer],
        "supporting_facts": [f"about {answer}"],
        **more,
    }


def write_dataset(folder, people=20, seed=0, train=36, test=12):
    """A data set in GFM-RAG v1's layout: everyone has one neighbour by each relation, which is the answer to the
    question for it. Whom the test questions ask about, no training question does."""
    draw = random.Random(seed)
    names = [f"p{seed}x{i}" for i in range(people)]
    facts = {(name, relation): draw.choice(names) for name in names for relation in RELATIONS}
    triples = [(name, relation, tail) for (name, relation), tail in facts.items()]
    graph = KnowledgeGraph.from_triples(triples, {f"about {name}": [name] for name in names})
    graph.save(folder)
    rows = [row(f"q{i}", name, rel, tail) for i, ((name, rel), tail) in enumerate(facts.items())]
    parts = {"train": rows[:train], "test": rows[len(rows) - test :]}
    for split, chosen in parts.items():
        (Path(folder) / "processed" / "stage1" / f"{split}.json").write_text(json.dumps(chosen))
    return folder


def write_two(root):
    """The data sets "left" and "right", of different sizes."""
    write_dataset(Path(root) / "left", people=12, seed=1, train=22, test=9)
    write_dataset(Path(root) / "right", people=9, seed=2, train=13, test=6)
    return root


def config(root, **changes):
    """The settings of a short training on "left" and "right"; `changes` by group (train={...})."""
    values = {
        "seed": 3,
        "datasets": {"root": str(root), "train_names": ["left", "right"], "valid_share": 0.2, "cache": False},
        "model": {"entity_model": {"input_dim": 8, "hidden_dims": [8, 8]}},
        "optimizer": {"lr": 0.01},
        "doc_ranker": {"name": "score_weighted_idf"},
        "task": {"ks": [1, 5]},
        "train": {"batch_size": 4, "num_epoch": 3, "watched_metric": "ent_mrr", "num_threads": 1},
        "device": "cpu",
        "output_dir": str(Path(root) / "runs"),
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(values.get(name), dict) else change
    return GFMFinetuneConfig(**values)


def make(settings, run=None, **options):
    return GFMFinetuneTrainer(settings, encoder=WordEncoder(), run=run, **options)


def wait_after_evaluation(number):
    """Makes evaluation `number` the last thing this process does: its best model is written, its checkpoint is not."""
    import time

    from ragkit.gfm import training

    write, count = training._Best.on_evaluate, iter(range(1, 100))

    def waiting(self, *args, **kwargs):
        write(self, *args, **kwargs)
        if next(count) == number:
            (self.run.dir / "evaluated").touch()
            time.sleep(600)

    training._Best.on_evaluate = waiting


def train_without_room(settings, run, batch, largest):
    """Trains until a file is larger than `largest` bytes, which from a batch on cannot be written, as on a full disk.

    Returns:
        The error, and what is in the run folder then.
    """
    import resource
    import signal

    from ragkit.gfm import load_gfm
    from ragkit.gfm.training import best_of

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error to the writer instead of the end of the process
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make(settings, run)
    make_batch, count = trainer.make_batch, iter(range(1, 1000))

    def limited(key):
        if next(count) == batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        return make_batch(key)

    trainer.make_batch = limited
    error = None
    try:
        trainer.train(resume=bool(run.events()))
    except Exception as caught:
        error = caught
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "last": run.last_checkpoint().name,
        "best": best_of(run),
        "model": {name: tensor.tolist() for name, tensor in load_gfm(run.dir / "model").state_dict().items()},
    }


if __name__ == "__main__":
    run = Run.open(sys.argv[1])
    settings = GFMFinetuneConfig(**run.config())
    if os.environ.get("NO_ROOM"):
        for batch, largest in json.loads(os.environ["NO_ROOM"]):
            print(json.dumps(train_without_room(settings, run, batch, largest)), flush=True)
        sys.exit()
    trainer = make(settings, run)
    if os.environ.get("WAIT_AFTER_EVALUATION"):
        wait_after_evaluation(int(os.environ["WAIT_AFTER_EVALUATION"]))
    trainer.train(resume=bool(run.events()))
