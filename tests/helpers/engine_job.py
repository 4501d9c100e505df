"""The small trainings that test_engine.py runs, here and in processes of their own that it kills."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ragkit.config import TrainConfig
from ragkit.engine import RunTrainer, freeze, run_training, training_arguments
from ragkit.runs import Run

SETTINGS = TrainConfig(
    batch_size=4,
    num_epochs=2.5,
    learning_rate=0.01,
    warmup_steps=2,
    schedule="cosine",
    save_steps=3,
    num_threads=1,
    seed=5,
)


class Net(nn.Module):
    """Dropout (random numbers), batch norm (buffers), two layers with one weight (shared memory), a frozen part."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)
        self.right.weight = self.left.weight
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.frozen = freeze(nn.Linear(3, 3))

    def forward(self, x):
        return self.out(self.drop(self.norm(self.left(x) + self.right(x)))).squeeze(-1)


def squared_error(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def collate_points(rows):
    return {
        "x": torch.stack([r[1] for r in rows]),
        "y": torch.stack([r[2] for r in rows]),
        "ids": [r[0] for r in rows],
    }


def collate_tokens(rows):
    tokens = torch.stack([r[1] for r in rows])
    return {"input_ids": tokens, "labels": tokens, "ids": [r[0] for r in rows]}


def plain(run, config, **options):
    """A module that is not from transformers, with its own loss function."""
    torch.manual_seed(1)
    net = Net()
    points = [(f"q{i}", torch.randn(4), torch.randn(())) for i in range(22)]
    values = {"loss_fn": squared_error, "train_dataset": points, "data_collator": collate_points, **options}
    return RunTrainer(net, training_arguments(config, run, device="cpu"), run, **values)


def llama(run, config, lora=False, **options):
    """A causal LM with the loss of its own; with `lora`, only adapters learn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_dropout=0.2, tie_word_embeddings=True, **sizes))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))
    rows = [(f"q{i}", torch.randint(0, 50, (7,))) for i in range(22)]
    values = {"train_dataset": rows, "data_collator": collate_tokens, **options}
    return RunTrainer(model, training_arguments(config, run, device="cpu"), run, **values)


def adapters(run, config, **options):
    return llama(run, config, lora=True, **options)


KINDS = {"plain": plain, "llama": llama, "adapters": adapters}


def hang_in(name):
    """Makes torch.save write half of the file `name` (checkpoint-6/optimizer.pt) and then wait to be killed."""
    save = torch.save

    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if str(path).endswith(name):
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            Path(path).with_name("half-written").touch()
            time.sleep(600)

    torch.save = half


if __name__ == "__main__":
    kind, folder = sys.argv[1], sys.argv[2]
    if os.environ.get("HANG_IN"):
        hang_in(os.environ["HANG_IN"])
    run_training(KINDS[kind](Run.open(folder), SETTINGS))
