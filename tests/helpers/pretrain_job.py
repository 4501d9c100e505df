"""Toy graphs whose held-out facts follow from the others, and the small pre-trainings of test_pretrain.py."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch

from ragkit.config import GFMPretrainConfig
from ragkit.gfm.pretrain import GFMPretrainTrainer
from ragkit.graph import KnowledgeGraph

WIDTH = 6


class HashEncoder:
    """Embeds a text as numbers drawn by its hash: an encoder without weights, the same in every process."""

    name = "hash"

    def __init__(self, width=WIDTH):
        self.width = width

    def encode(self, texts, side):
        seeds = [int.from_bytes(hashlib.blake2b(f"{side} {text}".encode(), digest_size=7).digest()) for text in texts]
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows) if rows else torch.zeros(0, self.width)


def family_triples(people, seed=0):
    """Everyone has a parent, the parent's parent is the grandparent, and neighbours are so both ways."""
    draw = random.Random(seed)
    names = [f"p{seed}x{i}" for i in range(people)]
    parent = {i: draw.randrange(people) for i in range(people)}
    triples = [(names[i], "parent", names[parent[i]]) for i in range(people)]
    triples += [(names[i], "grandparent", names[parent[parent[i]]]) for i in range(people)]
    others = draw.sample(range(people), people - people % 2)
    for one, other in zip(others[::2], others[1::2], strict=True):
        triples += [(names[one], "neighbour", names[other]), (names[other], "neighbour", names[one])]
    return list(dict.fromkeys(triples))


def family(people, seed=0):
    return KnowledgeGraph.from_triples(family_triples(people, seed))


def write_two(root):
    """The data sets "left" and "right", of different sizes, in the layout of GFM-RAG v1."""
    family(17, seed=1).save(Path(root) / "left")
    family(11, seed=2).save(Path(root) / "right")
    return root


def config(root, **changes):
    """The settings of a short pre-training on "left" and "right"; `changes` by group (train={...})."""
    values = {
        "seed": 3,
        "datasets": {"root": str(root), "train_names": ["left", "right"], "cache": False},
        "model": {"entity_model": {"input_dim": 8, "hidden_dims": [8, 8]}},
        "optimizer": {"lr": 0.01},
        "task": {"num_negative": 6, "valid_share": 0.1},
        "train": {"batch_size": 6, "num_epoch": 2, "num_threads": 1, "watched_metric": "mrr"},
        "device": "cpu",
        "output_dir": str(Path(root) / "runs"),
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(values.get(name), dict) else change
    return GFMPretrainConfig(**values)


def make(settings, run=None, **options):
    return GFMPretrainTrainer(settings, encoder=HashEncoder(), run=run, **options)
